"""Training data that is the same however it is loaded.

A DataLoader's random numbers (crops, for example) come from its worker
processes, whose generators nobody can save. Here every item gets random
numbers of its own, which depend on the seed, the epoch and the item's place in
the epoch, and on nothing else: not on the number of workers, not on what the
network draws, and not on whether the run was interrupted.

Authors
 * The sb_memeff authors 2026
"""

import contextlib
import random

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

__all__ = ["NumberedSampler", "SeededDataset", "seeded"]


@contextlib.contextmanager
def seeded(*numbers):
    """Seeds Python's, numpy's and torch's generators for a while.

    Afterwards they are where they were. The accelerators' generators are left
    alone.

    Arguments
    ---------
    *numbers : int
        What the seed depends on; not negative.

    Yields
    ------
    None

    Example
    -------
    >>> with seeded(1, 2):
    ...     first = torch.rand(3)
    >>> with seeded(1, 2):
    ...     print(torch.equal(first, torch.rand(3)))
    True
    """
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    # torch.manual_seed would seed the accelerators too.
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


class NumberedSampler(Sampler):
    """Hands out each index with its place in the epoch.

    Arguments
    ---------
    sampler : torch.utils.data.Sampler
        Of indices, or of batches of indices.

    Example
    -------
    >>> sampler = torch.utils.data.BatchSampler([7, 8, 9], 2, drop_last=False)
    >>> list(NumberedSampler(sampler))
    [[(0, 7), (1, 8)], [(2, 9)]]
    """

    def __init__(self, sampler):
        self.sampler = sampler

    def __len__(self):
        return len(self.sampler)

    def __iter__(self):
        place = 0
        for index in self.sampler:
            if isinstance(index, (list, tuple)):
                yield [(place + n, i) for n, i in enumerate(index)]
                place += len(index)
            else:
                yield place, index
                place += 1


class SeededDataset(Dataset):
    """A dataset whose items draw random numbers of their own.

    Arguments
    ---------
    dataset : torch.utils.data.Dataset
        Any with items at indices; its attributes can be read through this
        object.
    seed : int
        Seed of the run.
    rank : int
        Number of the process, so that each draws other numbers.

    Example
    -------
    >>> class Noise(Dataset):
    ...     def __getitem__(self, index):
    ...         return torch.rand(2)
    >>> data = SeededDataset(Noise(), seed=1)
    >>> torch.equal(data[5, 0], data[5, 0]), torch.equal(data[5, 0], data[6, 0])
    (True, False)
    >>> before = data[5, 0]
    >>> data.set_epoch(2)
    >>> torch.equal(before, data[5, 0])
    False
    """

    def __init__(self, dataset, seed, rank=0):
        self.dataset = dataset
        self.seed = seed
        self.rank = rank
        # In shared memory: workers that live on see the next epoch.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch):
        """Begins an epoch.

        Arguments
        ---------
        epoch : int
            Its number.
        """
        self._epoch.fill_(epoch)

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, place_and_index):
        """An item.

        Arguments
        ---------
        place_and_index : tuple of int
            As NumberedSampler gives them.
        """
        place, index = place_and_index
        with seeded(self.seed, int(self._epoch), self.rank, place):
            return self.dataset[index]

    def __getattr__(self, name):
        if name == "dataset" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.dataset, name)
