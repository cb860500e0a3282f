"""Training data that is the same however it is loaded.

Authors
 * The sb_memeff authors 2026
"""

import logging
import random

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset

from sb_memeff.dataio.recoverables import SamplerPosition
from sb_memeff.dataio.reproducible import (
    NumberedSampler,
    SeededDataset,
    SeededSampler,
    seeded,
    set_epoch,
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
    tuples = NumberedSampler([(3, 1), (2, 0), (3,)])
    assert list(tuples) == list(batches)


def test_attributes_are_those_of_the_dataset():
    dataset = SeededDataset(Noise(), seed=1)
    assert dataset.name == "noise" and len(dataset) == 12
    with pytest.raises(AttributeError, match="nothing"):
        _ = dataset.nothing


def lazily():
    """Indices that are drawn when they are asked for."""
    for _ in range(50):
        yield random.randrange(1000) + int(torch.randint(1000, ()))
        yield int(np.random.randint(1000))


class Lazily:
    """A sampler of them."""

    def __iter__(self):
        return lazily()


@pytest.mark.parametrize("ahead", [1, 7])
def test_a_lazy_sampler_goes_through_one_stream(ahead):
    """Other draws in between do not matter, and are not affected."""
    with seeded(3, 2, 0, 0, 1):
        expected = list(lazily())
    sampler = SeededSampler(Lazily(), seed=3, ahead=ahead)
    set_epoch(sampler, 2)
    found = []
    with seeded(9):
        undisturbed = [torch.rand(()).item() for _ in expected]
    with seeded(9):
        drawn = []
        for index in sampler:
            found.append(index)
            drawn.append(torch.rand(()).item())
    assert found == expected and drawn == undisturbed
    assert len(set(found)) > 80


def test_position_that_was_loaded_is_saved_again(tmp_path):
    """Before the interrupted epoch goes on."""

    def build():
        generator = torch.Generator().manual_seed(5)
        return SeededSampler(
            torch.utils.data.RandomSampler(range(9), generator=generator), 1
        )

    sampler = build()
    expected = [list(sampler), list(sampler)]
    SamplerPosition(sampler).save(tmp_path / "0")
    for n in range(4):
        sampler = build()
        position = SamplerPosition(sampler)
        position.load(tmp_path / str(n), end_of_epoch=False)
        if n % 2:
            position.resume()
        position.save(tmp_path / str(n + 1))
    position.resume()
    assert list(sampler) == expected[1]


GENERATORS = {
    "torch": lambda seed: torch.Generator().manual_seed(seed),
    "python": random.Random,
    "numpy": np.random.default_rng,
    "old numpy": np.random.RandomState,
}


class Owner:
    """A sampler with a generator of its own."""

    def __init__(self, generator):
        self.generator = generator

    def __iter__(self):
        for _ in range(9):
            if isinstance(self.generator, torch.Generator):
                yield torch.rand((), generator=self.generator).item()
            else:
                yield self.generator.random()


@pytest.mark.parametrize("kind", GENERATORS)
def test_the_next_epoch_goes_on_with_its_own_generator(kind, tmp_path):
    """If it begins in another process, too."""
    sampler = SeededSampler(Owner(GENERATORS[kind](5)), seed=1)
    first = list(sampler)
    SamplerPosition(sampler).save(tmp_path / "position")
    second = list(sampler)
    assert second != first
    resumed = SeededSampler(Owner(GENERATORS[kind](7)), seed=1)
    position = SamplerPosition(resumed)
    position.load(tmp_path / "position", end_of_epoch=True)
    position.resume()
    assert list(resumed) == second


def test_fewer_items_than_before_the_interruption_are_said(caplog):
    """Also if there are not as many left as had been given out."""
    begun = SeededSampler(list(range(9)), seed=1)
    iterator = iter(begun)
    assert [next(iterator) for _ in range(6)] == list(range(6))
    for items, said in ((9, False), (6, False), (4, True)):
        sampler = SeededSampler(list(range(items)), seed=1)
        sampler.resume(begun.position(), end_of_epoch=False)
        with caplog.at_level(logging.WARNING):
            assert list(sampler) == list(range(items))
        assert ("another order" in caplog.text) == said


def test_the_epoch_reaches_samplers_within_samplers():
    class Told(torch.utils.data.Sampler):
        epoch = None

        def set_epoch(self, epoch):
            self.epoch = epoch

    class Holder(Told):
        def __init__(self, *others):
            self.parts = others
            # Goes round in a circle.
            self.itself = self

    inner = [Told(), Told()]
    outer = Holder(
        NumberedSampler(SeededSampler(inner[0], 1)), Holder(inner[1])
    )
    set_epoch(outer, 4)
    assert [t.epoch for t in (outer, *inner)] == [4, 4, 4]
    set_epoch([1, 2, 3], 4)
