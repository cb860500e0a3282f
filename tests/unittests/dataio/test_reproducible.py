"""Training data that is the same however it is loaded.

Authors
 * The sb_memeff authors 2026
"""

import random

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset

from sb_memeff.dataio.reproducible import (
    NumberedSampler,
    SeededDataset,
    seeded,
)


class Noise(Dataset):
    """Items with numbers from three generators."""

    name = "noise"

    def __len__(self):
        return 12

    def __getitem__(self, index):
        drawn = [random.random(), np.random.rand(), torch.rand(()).item()]
        return torch.tensor([index, *drawn], dtype=torch.float64)


def epoch(dataset, **options):
    sampler = NumberedSampler(list(range(11, -1, -1)))
    loader = DataLoader(dataset, sampler=sampler, batch_size=5, **options)
    return loader, torch.cat(list(loader))


def test_generators_are_put_back():
    state = torch.get_rng_state()
    expected = random.Random()
    expected.setstate(random.getstate())
    with pytest.raises(KeyError), seeded(1, 2, 3):
        random.random(), torch.rand(1)
        raise KeyError
    assert torch.equal(state, torch.get_rng_state())
    assert random.random() == expected.random()


def test_same_items_for_any_number_of_workers():
    dataset = SeededDataset(Noise(), seed=1)
    _, alone = epoch(dataset)
    for options in ({"num_workers": 1}, {"num_workers": 2}):
        assert torch.equal(alone, epoch(dataset, **options)[1])
    # Every number is another one.
    assert len(alone[:, 1:].unique()) == 36


def test_epochs_seeds_ranks_and_repeats_differ():
    dataset = SeededDataset(Noise(), seed=1)
    first = dataset[0, 4]
    dataset.set_epoch(1)
    others = [
        dataset[0, 4],
        SeededDataset(Noise(), seed=2)[0, 4],
        SeededDataset(Noise(), seed=1, rank=1)[0, 4],
        # The same item again in the same epoch.
        SeededDataset(Noise(), seed=1)[7, 4],
    ]
    assert not any(torch.equal(first[1:], other[1:]) for other in others)


def test_workers_that_live_on_see_the_next_epoch():
    dataset = SeededDataset(Noise(), seed=1)
    loader, first = epoch(dataset, num_workers=1, persistent_workers=True)
    dataset.set_epoch(1)
    second = torch.cat(list(loader))
    assert torch.equal(first[:, 0], second[:, 0])
    assert not torch.equal(first[:, 1:], second[:, 1:])
    dataset.set_epoch(0)
    assert torch.equal(first, torch.cat(list(loader)))


def test_batches_are_numbered_like_their_items():
    indices = [3, 1, 2, 0, 3]
    flat = list(NumberedSampler(indices))
    batches = NumberedSampler(BatchSampler(indices, 2, drop_last=False))
    assert len(batches) == 3
    assert [pair for batch in batches for pair in batch] == flat


def test_attributes_are_those_of_the_dataset():
    dataset = SeededDataset(Noise(), seed=1)
    assert dataset.name == "noise" and len(dataset) == 12
    with pytest.raises(AttributeError, match="nothing"):
        _ = dataset.nothing
