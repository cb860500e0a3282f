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
    about: Mapping[float, float] | None = None,
) -> tuple[int, int]:
    """Finds the largest integer whose peak is within a limit.

    Memory is nearly linear in a batch above some size. A line through the two
    peaks closest to the limit predicts the answer. It is the answer if its peak
    is within the limit and that of the next integer is not. Where prediction
    fails, the search bisects.

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
    about : dict, optional
        Estimated peaks of any numbers, such as 0. They predict where to look;
        the answer does not depend on them.

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
    about = about or {}
    known: dict[int, int] = {}
    low, high = first - 1, most + 1
    trial, failures = _predicted(known, about, low, high, limit) or first, 0
    while high - low > 1:
        trial = min(max(trial, low + 1), high - 1)
        middle = _middle(about, low, high, limit, most)
        known[trial] = peak(trial)
        if known[trial] <= limit:
            low = trial
        elif trial == first:
            raise DoesNotFit(known[trial])
        else:
            high = trial
        done = low >= middle or high <= middle
        failures = 0 if done else failures + 1
        trial = _predicted(known, about, low, high, limit)
        if failures > 2 or trial is None:
            trial, failures = _middle(about, low, high, limit, most), 0
    return low, known[low]


def _middle(
    about: Mapping[float, float], low: int, high: int, limit: int, most: int
) -> int:
    """Half of what is left, or twice as far."""
    # The smallest number that is known or estimated not to fit.
    bound = min([high, *(n for n in about if n > low and about[n] > limit)])
    middle = int(low + bound) // 2 if bound <= most else min(2 * low, most)
    # An estimate next to low would let every trial count as progress.
    return max(middle, low + 1)


def _predicted(
    known: dict[int, int],
    about: Mapping[float, float],
    low: int,
    high: int,
    limit: int,
) -> int | None:
    """The answer if memory is linear; None if that is unknown."""
    peaks = {**about, **known}
    near = sorted(peaks, key=lambda n: abs(peaks[n] - limit))
    if len(peaks) == 1:
        # In proportion; a part of the memory does not depend on the number.
        return int(near[0] * limit // max(peaks[near[0]], 1))
    for one, other in (near[:2], (low, high)) if peaks else ():
        if one in peaks and other in peaks and peaks[one] != peaks[other]:
            slope = (peaks[one] - peaks[other]) / (one - other)
            found = math.floor(one + (limit - peaks[one]) / slope)
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
