"""Random generators: read their states, and set them back for a replay.

A function may draw from the global generators of torch, Python and numpy, and
from generators that its modules own.

Authors
 * The sb_memeff authors 2026
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

__all__ = ["Generator", "RandomStates", "generators_of"]


class Generator(NamedTuple):
    """One random generator.

    Arguments
    ---------
    read : callable
        Returns the state; a later draw does not change what it returned.
    write : callable
        Takes a state that ``read`` returned.
    """

    read: Callable
    write: Callable


class RandomStates:
    """States of generators at one moment.

    Arguments
    ---------
    generators : list of Generator
        The generators.

    Example
    -------
    >>> states = RandomStates(generators_of(None, torch.device("cpu")))
    >>> first = random.random(), torch.rand(1)
    >>> len(states.changed())
    2
    >>> states.restore()
    >>> (random.random(), torch.rand(1)) == first
    True
    """

    def __init__(self, generators: list[Generator]):
        self._states = [(g, g.read()) for g in generators]

    def __len__(self):
        return len(self._states)

    def changed(self) -> RandomStates:
        """The states of those generators that have been drawn from since."""
        states = RandomStates([])
        states._states = [
            (g, state)
            for g, state in self._states
            if not _equal(g.read(), state)
        ]
        return states

    def again(self) -> RandomStates:
        """The states of the same generators now."""
        return RandomStates([g for g, _ in self._states])

    def restore(self) -> None:
        """Sets the generators to these states."""
        for generator, state in self._states:
            generator.write(state)


def generators_of(function, device: torch.device) -> list[Generator]:
    """All generators that a call of a function may draw from.

    Arguments
    ---------
    function : callable
        A torch.nn.Module's own generators are found among the attributes of
        its submodules, also in lists, tuples and dicts there.
    device : torch.device
        Whose default generator counts, beside the CPU's.

    Returns
    -------
    list of Generator
        The generators.
    """
    found = list(_GLOBAL)
    if device.type != "cpu":
        module = torch.get_device_module(device)
        found.append(
            Generator(
                lambda: module.get_rng_state(device),
                lambda state: module.set_rng_state(state, device),
            )
        )
    if isinstance(function, nn.Module):
        own = {id(x): x for x in _objects(function) if _is_generator(x)}
        found += [_adapted(x) for x in own.values()]
    return found


def _set_python(state):
    random.setstate(state)


_GLOBAL = (
    Generator(torch.get_rng_state, torch.set_rng_state),
    Generator(random.getstate, _set_python),
    Generator(np.random.get_state, np.random.set_state),
)
_KINDS = (
    torch.Generator,
    random.Random,
    np.random.Generator,
    np.random.RandomState,
)


def _is_generator(x):
    return isinstance(x, _KINDS)


def _adapted(x):
    if isinstance(x, torch.Generator):
        return Generator(x.get_state, x.set_state)
    if isinstance(x, random.Random):
        return Generator(x.getstate, x.setstate)
    if isinstance(x, np.random.RandomState):
        return Generator(x.get_state, x.set_state)
    bits = x.bit_generator
    return Generator(
        lambda: bits.state, lambda state: setattr(bits, "state", state)
    )


def _objects(module: nn.Module) -> Iterator:
    for part in module.modules():
        for name, value in vars(part).items():
            if name in _TENSORS:
                continue
            if isinstance(value, dict):
                yield from value.values()
            elif isinstance(value, (list, tuple)):
                yield from value
            else:
                yield value


# Attributes of every module that hold no generators.
_TENSORS = frozenset(vars(nn.Module()))


def _equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    if isinstance(a, tuple) and any(isinstance(x, np.ndarray) for x in a):
        # The position in the list of numbers changes first.
        return all(_equal(x, y) for x, y in zip(reversed(a), reversed(b)))
    return a == b
