"""Small results of forward that a replay takes over instead of computing them.

Authors
 * The sb_memeff authors 2026
"""

import contextlib
from collections.abc import Callable, Generator
from contextvars import ContextVar
from typing import Any, TypeVar

__all__ = ["keep", "keeping", "replaying"]

T = TypeVar("T")

# Of the innermost call that is recorded or replayed: takes a function, and
# returns its result or that of forward.
_current: ContextVar[Callable[[Callable[[], Any]], Any] | None] = ContextVar(
    "kept", default=None
)


def keep(compute: Callable[[], T]) -> T:
    """A result that is computed in forward only.

    For what is small and takes long, such as the statistics of a batch: a
    replay computes all else again. Outside of recorded calls it is computed.

    Arguments
    ---------
    compute : callable
        Takes nothing. Its result must not need gradients.

    Returns
    -------
    object
        Its result; in a replay, the one that it had in forward.

    Example
    -------
    >>> results = []
    >>> with keeping(results):
    ...     keep(lambda: 1)
    1
    >>> with replaying(results):
    ...     keep(lambda: 2)
    1
    """
    current = _current.get()
    return compute() if current is None else current(compute)


@contextlib.contextmanager
def keeping(results: list[Any]) -> Generator[None, None, None]:
    """Inside, what is kept is put into a list.

    Arguments
    ---------
    results : list
        Takes the results.

    Yields
    ------
    None
    """

    def first(compute: Callable[[], Any]) -> Any:
        results.append(compute())
        return results[-1]

    token = _current.set(first)
    try:
        yield
    finally:
        _current.reset(token)


@contextlib.contextmanager
def replaying(results: list[Any]) -> Generator[None, None, None]:
    """Inside, what was kept is taken from a list, in order.

    Arguments
    ---------
    results : list
        As ``keeping`` filled it.

    Yields
    ------
    None
    """
    remaining = iter(results)

    def again(compute: Callable[[], Any]) -> Any:
        # A replay that calls more than forward is found out by its results.
        return next(remaining, None) or compute()

    token = _current.set(again)
    try:
        yield
    finally:
        _current.reset(token)
