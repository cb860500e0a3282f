"""Reads and writes the states of all random generators that a call may use.

These are torch's generators of the CPU and of the device, those of Python and
numpy, and generators of the called modules. Reading must be cheap, because each
call of a recomputed block does it twice.

Authors
 * The sb_memeff authors 2026
"""

import contextlib
import ctypes
import random
import sys
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch

__all__ = [
    "Source",
    "equal_states",
    "forked_generators",
    "generators_among",
    "global_sources",
    "own_source",
]


@dataclass
class Source:
    """A random generator.

    Arguments
    ---------
    read : callable
        Returns its state.
    write : callable
        Restores a state returned by ``read``.
    """

    read: Callable[[], Any]
    write: Callable[[Any], object]


def global_sources(device: torch.device, follow_torch: bool) -> list[Source]:
    """Lists the global generators.

    Arguments
    ---------
    device : torch.device
        Device whose torch generator is included, besides the CPU's.
    follow_torch : bool
        False excludes torch's generators.

    Returns
    -------
    list of Source
        The generators, in a fixed order.

    Example
    -------
    >>> sources = global_sources(torch.device("cpu"), follow_torch=True)
    >>> states = [source.read() for source in sources]
    >>> x = random.random()
    >>> for source, state in zip(sources, states):
    ...     source.write(state)
    >>> x == random.random()
    True
    """
    # A Source with a cache.
    numpy_source = cast(Source, _NUMPY)
    sources = [Source(random.getstate, random.setstate), numpy_source]
    if follow_torch:
        sources.append(Source(torch.get_rng_state, torch.set_rng_state))
        if device.type != "cpu":
            module = torch.get_device_module(device)
            sources.append(
                Source(
                    lambda: module.get_rng_state(device),
                    lambda state: module.set_rng_state(state, device),
                )
            )
    return sources


@contextlib.contextmanager
def forked_generators(device: torch.device) -> Generator[None, None, None]:
    """Restores the global generators after the context.

    Arguments
    ---------
    device : torch.device
        Device whose torch generator is included, besides the CPU's.

    Yields
    ------
    None

    Example
    -------
    >>> device = torch.device("cpu")
    >>> with forked_generators(device):
    ...     first = random.random(), torch.rand(1), np.random.rand()
    >>> first == (random.random(), torch.rand(1), np.random.rand())
    True
    """
    sources = global_sources(device, follow_torch=True)
    states = [source.read() for source in sources]
    try:
        yield
    finally:
        for source, state in zip(sources, states):
            source.write(state)


def own_source(value: object, follow_torch: bool) -> Source | None:
    """The source behind an object, if it is a generator.

    Arguments
    ---------
    value : object
        Any objects.
    follow_torch : bool
        False leaves a torch.Generator out.

    Returns
    -------
    Source
        None if the object is no generator whose state can be read.

    Example
    -------
    >>> own_source("text", follow_torch=True) is None
    True
    >>> source = own_source(np.random.default_rng(0), follow_torch=True)
    >>> source.read()["bit_generator"]
    'PCG64'
    """
    if isinstance(value, torch.Generator):
        if follow_torch:
            return Source(value.get_state, value.set_state)
    elif isinstance(value, random.Random):
        # The operating system's generator has no state.
        if not isinstance(value, random.SystemRandom):
            return Source(value.getstate, value.setstate)
    elif isinstance(value, np.random.RandomState):
        return Source(lambda: value.get_state(legacy=False), value.set_state)
    elif isinstance(value, np.random.Generator):
        return own_source(value.bit_generator, follow_torch)
    elif isinstance(value, np.random.BitGenerator):
        return Source(
            lambda: value.state, lambda state: setattr(value, "state", state)
        )
    return None


def generators_among(values: Iterable[object]) -> list[object]:
    """Finds generators among objects and in lists, tuples and dicts of them.

    Arguments
    ---------
    values : iterable
        Any objects.

    Returns
    -------
    list
        The generators, possibly with duplicates.

    Example
    -------
    >>> len(generators_among([1, random.Random(0), {"a": random.Random(1)}]))
    2
    """
    found = []
    for value in values:
        if isinstance(value, dict):
            inside = value.values()
        elif isinstance(value, (list, tuple)):
            inside = value
        else:
            inside = (value,)
        found += [x for x in inside if isinstance(x, _GENERATORS)]
    return found


_GENERATORS = (
    torch.Generator,
    random.Random,
    np.random.RandomState,
    np.random.Generator,
    np.random.BitGenerator,
)


def equal_states(a: Any, b: Any) -> bool:
    """Compares two states of a generator.

    Arguments
    ---------
    a : object
        Result of ``Source.read``.
    b : object
        A later result.

    Returns
    -------
    bool
        True if nothing was drawn in between.

    Example
    -------
    >>> equal_states({"key": np.arange(3)}, {"key": np.arange(3)})
    True
    """
    if a is b:
        return True
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal_states(a[k], b[k]) for k in a)
    return a == b


class _NumpyGlobal:
    """numpy's global generator.

    numpy takes 30 to 50 us to return its state, a hundred times as long as
    reading the 2,500 bytes of the Mersenne twister. If these bytes are unchanged,
    so is the state, unless numpy has cached the second of a pair of normally
    distributed numbers, which it stores elsewhere.
    """

    def __init__(self):
        self._bytes: tuple[int, bytes] | None = None
        self._state: dict[str, Any] | None = None

    def read(self) -> dict[str, Any]:
        """Returns the state; the same object if nothing was drawn since."""
        now = _twister_bytes(np.random.get_bit_generator())
        if (
            now is None
            or now != self._bytes
            or cast("dict[str, Any]", self._state)["has_gauss"]
        ):
            self._state = np.random.get_state(legacy=False)
            self._bytes = now
        return cast("dict[str, Any]", self._state)

    def write(self, state: dict[str, Any]) -> None:
        """Restores a state returned by ``read``."""
        np.random.set_state(state)
        self._bytes = None


def _twister_bytes(
    generator: np.random.BitGenerator,
) -> tuple[int, bytes] | None:
    """Address and bytes of the state; None for other kinds of generators."""
    if not _TWISTER_IS_READABLE or type(generator) is not np.random.MT19937:
        return None
    address = generator.ctypes.state_address
    return address, ctypes.string_at(address, _TWISTER_SIZE)


def _twister_is_readable() -> bool:
    """Whether this numpy stores 624 words of 32 bits and a position."""
    generator = np.random.MT19937(0)
    state = generator.state["state"]
    found = ctypes.string_at(generator.ctypes.state_address, _TWISTER_SIZE)
    position = int.from_bytes(found[-4:], sys.byteorder)
    return found[:-4] == state["key"].astype(np.uint32).tobytes() and (
        position == state["pos"]
    )


_TWISTER_SIZE = 624 * 4 + 4
_TWISTER_IS_READABLE = _twister_is_readable()
_NUMPY = _NumpyGlobal()
