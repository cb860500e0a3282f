"""Searches for the largest number whose memory is within a limit.

Authors
 * The sb_memeff authors 2026
"""

import math
from collections.abc import Callable, Mapping

__all__ = ["DoesNotFit", "largest"]


def largest(
    peak: Callable[[int], int],
    limit: int,
    first: int = 1,
    most: int = 2**20,
    known: Mapping[int, int] | None = None,
) -> tuple[int, int]:
    """Finds the largest integer whose peak is within a limit.

    Memory is nearly linear in a batch above some size. A line through the two
    known peaks closest to the limit predicts the answer. It is the answer if its
    peak is within the limit and that of the next integer is not. Where
    prediction fails, the search bisects.

    Arguments
    ---------
    peak : callable
        Returns the bytes of an integer; must not decrease.
    limit : int
        Limit in bytes.
    first : int
        The smallest number to try.
    most : int
        The largest number to try.
    known : dict, optional
        Peaks that are known already.

    Returns
    -------
    tuple of int
        The number and its peak.

    Raises
    ------
    DoesNotFit
        If the smallest number does not fit.

    Example
    -------
    >>> largest(lambda n: 100 + 7 * n, 1000)
    (128, 996)
    """
    known = dict(known or {})
    low = max((n for n in known if known[n] <= limit), default=first - 1)
    high = min((n for n in known if known[n] > limit), default=most + 1)
    trial, failures = _predicted(known, low, high, limit) or first, 0
    while high - low > 1:
        trial = min(max(trial, low + 1), high - 1)
        wide = (low + high) / 2 if high <= most else 2 * low
        known[trial] = peak(trial)
        if known[trial] <= limit:
            low = trial
        elif trial == first:
            raise DoesNotFit(known[trial])
        else:
            high = trial
        # Half of what is left, or twice as far.
        done = low >= wide or high <= min(wide, most)
        failures = 0 if done else failures + 1
        trial = _predicted(known, low, high, limit)
        if failures > 1 or trial is None:
            middle = (low + high) // 2
            trial = middle if high <= most else min(2 * low, middle)
            failures = 0
    return low, known[low]


def _predicted(
    known: dict[int, int], low: int, high: int, limit: int
) -> int | None:
    """The answer if memory is linear; None if that is unknown."""
    near = sorted(known, key=lambda n: abs(known[n] - limit))
    if len(known) == 1:
        # In proportion; a part of the memory does not depend on the number.
        return near[0] * limit // max(known[near[0]], 1)
    for one, other in (near[:2], (low, high)) if known else ():
        if one in known and other in known and known[one] != known[other]:
            slope = (known[one] - known[other]) / (one - other)
            found = one + math.floor((limit - known[one]) / slope)
            if low <= found <= high:
                return found
    return None


class DoesNotFit(ValueError):
    """Raised if not even the smallest number fits.

    Arguments
    ---------
    peak : int
        Bytes of the smallest number.
    """

    def __init__(self, peak: int):
        super().__init__(f"It takes {peak} bytes.")
        self.peak = peak
