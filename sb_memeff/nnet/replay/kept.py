"""Small results of forward that a replay reuses.

Authors
 * The sb_memeff authors 2026
"""

import contextlib
from collections.abc import Callable, Generator
from contextvars import ContextVar
from typing import Any, TypeVar

__all__ = ["Kept", "keep", "keeping", "replaying"]

T = TypeVar("T")
# Owner to its results, in the order of its calls.
Kept = dict[object, list[Any]]

# Of the innermost call that is recorded or replayed: takes an owner and a
# function, and returns the function's result or that of forward.
_current: ContextVar[Callable[[object, Callable[[], Any]], Any] | None] = (
    ContextVar("kept", default=None)
)


def keep(owner: object, compute: Callable[[], T]) -> T:
    """Computes a result in forward, and reuses it in a replay.

    Use it for results that are small but slow to compute, such as batch
    statistics. Outside of recorded calls, and where forward kept nothing, the
    result is computed.

    Arguments
    ---------
    owner : object
        The module that needs the result. Results are kept by owner, because a
        replay may skip modules, for example those of a nested recomputation,
        which keeps its own results.
    compute : callable
        Takes nothing. Its result must not need gradients.

    Returns
    -------
    object
        The result; in a replay, that of forward.

    Example
    -------
    >>> results = {}
    >>> with keeping(results):
    ...     keep("norm", lambda: 1)
    1
    >>> with replaying(results):
    ...     keep("norm", lambda: 2), keep("another", lambda: 3)
    (1, 3)
    """
    current = _current.get()
    return compute() if current is None else current(owner, compute)


@contextlib.contextmanager
def keeping(results: Kept) -> Generator[None, None, None]:
    """Collects kept results within the context.

    Arguments
    ---------
    results : dict
        Takes the results.

    Yields
    ------
    None
    """

    def first(owner: object, compute: Callable[[], Any]) -> Any:
        result = compute()
        results.setdefault(owner, []).append(result)
        return result

    token = _current.set(first)
    try:
        yield
    finally:
        _current.reset(token)


@contextlib.contextmanager
def replaying(results: Kept) -> Generator[None, None, None]:
    """Reuses kept results within the context, in each owner's order.

    Arguments
    ---------
    results : dict
        As ``keeping`` filled it.

    Yields
    ------
    None
    """
    remaining = {owner: iter(values) for owner, values in results.items()}

    def again(owner: object, compute: Callable[[], Any]) -> Any:
        for result in remaining.get(owner, ()):
            return result
        return compute()

    token = _current.set(again)
    try:
        yield
    finally:
        _current.reset(token)
