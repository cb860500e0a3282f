"""Training data that is the same for any number of workers and after resuming.

A DataLoader's random numbers (crops, for example) come from its worker
processes, whose generators cannot be saved. Here each item has its own random
numbers, which depend only on the seed, the epoch and the item's number in the
epoch. They do not depend on the number of workers, on random numbers drawn by
the network, or on interruptions. With any sampler, the order of the items
changes from epoch to epoch and is the same after an interruption.

Authors
 * The sb_memeff authors 2026
"""

import contextlib
import hashlib
import itertools
import random
from collections.abc import Generator, Iterable, Iterator, Sized
from typing import Any, cast

import numpy as np
import torch
from speechbrain.dataio.sampler import DistributedSamplerWrapper
from speechbrain.utils.logger import get_logger
from torch.utils.data import Dataset, Sampler
from torch.utils.data.distributed import DistributedSampler

from sb_memeff.dataio.preparation import DamagedFile
from sb_memeff.nnet.replay.random_states import forked_generators
from sb_memeff.utils.settings import check_switches

__all__ = [
    "NumberedSampler",
    "SeededDataset",
    "SeededSampler",
    "SharedSampler",
    "seeded",
    "set_epoch",
]

logger = get_logger(__name__)

CPU = torch.device("cpu")
# Number of indices compared to detect that a resumed epoch has another order.
COMPARED = 64
# Number of items in a row that may be damaged.
TRIED = 10


@contextlib.contextmanager
def seeded(*numbers: int) -> Generator[None, None, None]:
    """Seeds Python's, numpy's and torch's generators within a context.

    Their states are restored afterwards. The accelerators' generators are not
    touched.

    Arguments
    ---------
    *numbers : int
        Non-negative numbers that determine the seed.

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
    with forked_generators(CPU):
        seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
        random.seed(seed)
        np.random.seed(seed)
        # torch.manual_seed would seed the accelerators too.
        torch.default_generator.manual_seed(seed)
        yield


def _global_states() -> tuple[Any, Any, torch.Tensor]:
    return random.getstate(), np.random.get_state(), torch.get_rng_state()


def _set_global_states(states: tuple[Any, Any, torch.Tensor]) -> None:
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])


def set_epoch(sampler: Iterable[Any], epoch: int) -> None:
    """Sets the epoch of a sampler and of all samplers within it.

    Arguments
    ---------
    sampler : torch.utils.data.Sampler or iterable
        Of indices, or of batches of indices. Samplers without
        ``set_epoch`` are skipped.
    epoch : int
        Number of the epoch.

    Example
    -------
    >>> from speechbrain.dataio.sampler import ReproducibleRandomSampler
    >>> sampler = ReproducibleRandomSampler([0, 1, 2, 3])
    >>> batches = torch.utils.data.BatchSampler(sampler, 2, drop_last=False)
    >>> set_epoch(batches, 5)
    >>> sampler.epoch
    5
    """
    for part in _parts(sampler):
        if hasattr(part, "set_epoch"):
            part.set_epoch(epoch)


def _parts(sampler: object) -> Iterator[Any]:
    """Yields a sampler and the samplers within it, each once."""
    found = []
    waiting = [sampler]
    while waiting:
        part = waiting.pop()
        if any(part is other for other in found):
            continue
        found.append(part)
        yield part
        for name, value in getattr(part, "__dict__", {}).items():
            values = value if isinstance(value, (list, tuple)) else [value]
            waiting.extend(
                v
                for v in values
                # A sampler need not be a Sampler: any iterable works.
                if isinstance(v, Sampler)
                or ("sampler" in name and hasattr(v, "__dict__"))
            )


def _generators(sampler: object) -> list[Any]:
    """The random generators of a sampler and the samplers within it."""
    kinds = (
        torch.Generator,
        random.Random,
        np.random.Generator,
        np.random.RandomState,
    )
    return [
        value
        for part in _parts(sampler)
        for value in getattr(part, "__dict__", {}).values()
        if isinstance(value, kinds)
    ]


def _get_state(generator: Any) -> Any:
    # In types that torch.load reads with weights_only.
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, np.random.Generator):
        return _without_arrays(generator.bit_generator.state)
    return _without_arrays(generator.get_state(legacy=False))


def _without_arrays(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_arrays(v) for k, v in value.items()}
    return value.tolist() if isinstance(value, np.ndarray) else value


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    else:
        generator.set_state(state)


class SeededSampler(Sampler):
    """A sampler whose order depends only on the seed and the epoch.

    Python's, numpy's and torch's generators are seeded for each epoch while the
    sampler draws from them, and restored. The sampler's own generators
    continue from epoch to epoch; their states are part of ``position``. Other
    state of the sampler (a counter, for example) is not restored: if it changes
    the order of a resumed epoch, a warning is logged.

    Arguments
    ---------
    sampler : torch.utils.data.Sampler or iterable
        Of indices, or of batches of indices.
    seed : int
        Seed of the run, the same on all processes.
    ahead : int
        Number of indices to draw at a time: the batch size if the sampler
        yields single indices.

    Example
    -------
    >>> data = torch.utils.data.RandomSampler(range(100))
    >>> sampler = SeededSampler(data, seed=1)
    >>> first = list(sampler)
    >>> first == list(sampler), sorted(first) == list(range(100))
    (True, True)
    >>> sampler.set_epoch(2)
    >>> first == list(sampler)
    False
    """

    def __init__(self, sampler: Iterable[Any], seed: int, ahead: int = 1):
        self.sampler = sampler
        self.seed = seed
        self.ahead = ahead
        self.epoch = 0
        self._start: list[Any] | None = None
        self._first: list[str] = []
        self._resumed: dict[str, Any] | None = None

    def set_epoch(self, epoch: int) -> None:
        """Begins an epoch.

        Arguments
        ---------
        epoch : int
            Number of the epoch.
        """
        self.epoch = epoch

    def __len__(self) -> int:
        return len(cast(Sized, self.sampler))

    def __iter__(self) -> Iterator[Any]:
        resumed, self._resumed = self._resumed, None
        if resumed is not None:
            self._set_generators(resumed["start"])
        self._start = [_get_state(g) for g in _generators(self.sampler)]
        self._first = first = []
        compared = 0 if resumed is None else resumed["compared"]
        # Five numbers, so that the seed differs from all items' (of four).
        with seeded(self.seed, self.epoch, 0, 0, 1):
            iterator = iter(self.sampler)
            states = _global_states()
        while True:
            with forked_generators(CPU):
                _set_global_states(states)
                indices = list(itertools.islice(iterator, self.ahead))
                states = _global_states()
            for index in indices:
                if len(first) < COMPARED:
                    first.append(repr(index))
                    if len(first) == compared:
                        self._compare(cast("dict[str, Any]", resumed))
                yield index
            if not indices:
                break
        if len(first) < compared:
            self._compare(cast("dict[str, Any]", resumed))

    def position(self) -> dict[str, Any]:
        """Returns the sampler's position, for ``resume``.

        Returns
        -------
        dict
            States of its generators at the start of the epoch and now, and a
            digest of the epoch's order.
        """
        if self._resumed is not None:
            return self._resumed
        now = [_get_state(g) for g in _generators(self.sampler)]
        return {
            "start": now if self._start is None else self._start,
            "now": now,
            "compared": len(self._first),
            "order": _digest(self._first),
        }

    def resume(self, position: dict[str, Any], end_of_epoch: bool) -> None:
        """Moves to the position of an interrupted training's sampler.

        Arguments
        ---------
        position : dict
            Result of that sampler's ``position``.
        end_of_epoch : bool
            Whether a new epoch begins. Otherwise the next iteration continues
            the interrupted epoch.
        """
        if end_of_epoch:
            self._set_generators(position["now"])
        else:
            self._resumed = position

    def _set_generators(self, states: list[Any]) -> None:
        for generator, state in zip(_generators(self.sampler), states):
            _set_state(generator, state)

    def _compare(self, resumed: dict[str, Any]) -> None:
        if _digest(self._first) == resumed["order"]:
            return
        logger.warning(
            f"{type(self.sampler).__name__} gives epoch {self.epoch} another "
            "order than before the interruption: this epoch repeats some items "
            "and omits others. If neither the data nor the sampler's settings "
            "have changed, make the order depend only on set_epoch and on "
            "random generators."
        )


def _digest(indices: list[str]) -> str:
    return hashlib.sha256("\n".join(indices).encode()).hexdigest()


class SharedSampler(DistributedSampler):
    """This process's share of a sampler's indices, or batches of indices.

    SpeechBrain's DistributedSamplerWrapper, but its order depends on the seed
    of the run, and a share of one index or batch is a share too. (There it is
    taken apart.)

    Arguments
    ---------
    wrapper : DistributedSamplerWrapper
        The sampler, processes and options.
    seed : int
        Seed of the run, the same on all processes.

    Example
    -------
    >>> batches = torch.utils.data.BatchSampler(range(4), 2, drop_last=False)
    >>> wrapper = DistributedSamplerWrapper(
    ...     batches, num_replicas=2, rank=1, shuffle=False
    ... )
    >>> list(SharedSampler(wrapper, seed=1))
    [[2, 3]]
    """

    def __init__(self, wrapper: DistributedSamplerWrapper, seed: int):
        super().__init__(
            wrapper.sampler,
            wrapper.num_replicas,
            wrapper.rank,
            wrapper.shuffle,
            seed,
            wrapper.drop_last,
        )
        self.sampler = wrapper.sampler

    def __iter__(self) -> Iterator[Any]:
        indices = list(self.sampler)
        return (indices[number] for number in super().__iter__())

    def set_epoch(self, epoch: int) -> None:
        """Begins an epoch, of the sampler within too.

        Arguments
        ---------
        epoch : int
            Number of the epoch.
        """
        super().set_epoch(epoch)
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)


class NumberedSampler(Sampler):
    """Yields each index with its number in the epoch.

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

    def __init__(self, sampler: Iterable[Any]):
        self.sampler = sampler

    def __len__(self) -> int:
        return len(cast(Sized, self.sampler))

    def __iter__(self) -> Iterator[Any]:
        number = 0
        for index in self.sampler:
            if isinstance(index, (list, tuple)):
                yield [(number + n, i) for n, i in enumerate(index)]
                number += len(index)
            else:
                yield number, index
                number += 1


class SeededDataset(Dataset):
    """A dataset whose items have their own random numbers.

    Arguments
    ---------
    dataset : torch.utils.data.Dataset
        Any map-style dataset. Its attributes can be read through this
        object.
    seed : int
        Seed of the run.
    rank : int
        Rank of the process; each rank draws different numbers.
    skip_damaged : bool
        Take the next item in the place of one whose file is damaged (see
        ``sb_memeff.dataio.audio.load_audio``), and log its file.

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

    def __init__(
        self,
        dataset: Dataset[Any],
        seed: int,
        rank: int = 0,
        skip_damaged: bool = False,
    ):
        check_switches(skip_damaged=skip_damaged)
        self.dataset = dataset
        self.seed = seed
        self.rank = rank
        self.skip_damaged = skip_damaged
        # In shared memory, so that persistent workers see the next epoch.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Begins an epoch.

        Arguments
        ---------
        epoch : int
            Number of the epoch.
        """
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(cast(Sized, self.dataset))

    # pyrefly: ignore[bad-override-param-name]
    def __getitem__(self, number_and_index: tuple[int, Any]) -> Any:
        """Returns an item.

        Arguments
        ---------
        number_and_index : tuple of int
            As from NumberedSampler.
        """
        number, index = number_and_index
        size = min(len(self), TRIED) if self.skip_damaged else 1
        for attempt in range(size):
            with seeded(self.seed, int(self._epoch), self.rank, number):
                try:
                    if attempt == 0:
                        return self.dataset[index]
                    return self.dataset[(index + attempt) % len(self)]
                except DamagedFile as error:
                    if attempt == size - 1:
                        raise
                    logger.warning(f"Skipped: {error}")

    def __getattr__(self, name: str) -> Any:
        if name == "dataset" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.dataset, name)
