"""The largest number whose memory is within a limit.

Authors
 * The sb_memeff authors 2026
"""

import math
from collections.abc import Callable

__all__ = ["DoesNotFit", "largest"]


def largest(
    peak: Callable[[int], int], limit: int, first: int = 1, most: int = 2**20
) -> tuple[int, int]:
    """The largest whole number whose peak is within a limit.

    Bisection; where the peak grows in a straight line, as it does with the
    batch, the line through both ends finds the place in a few steps.

    Arguments
    ---------
    peak : callable
        From a whole number to bytes; it must not fall.
    limit : int
        Bytes.
    first : int
        The smallest number in question.
    most : int
        The largest.

    Returns
    -------
    tuple of int
        The number and its peak.

    Raises
    ------
    DoesNotFit
        If the smallest does not.

    Example
    -------
    >>> largest(lambda n: 100 + 7 * n, 1000)
    (128, 996)
    """
    low, low_peak = first, peak(first)
    if low_peak > limit:
        raise DoesNotFit(low_peak)
    high, high_peak, slope = most + 1, math.inf, math.inf
    trial, tried = min(max(2 * first, first + 1), most), 1
    while high - low > 1:
        trial_peak = peak(trial)
        tried += 1
        if trial_peak > limit:
            high, high_peak = trial, trial_peak
        else:
            slope = (trial_peak - low_peak) / (trial - low)
            low, low_peak = trial, trial_peak
        if high_peak < math.inf:
            slope = (high_peak - low_peak) / (high - low)
        if slope > 0 and (tried < 4 or tried % 2):
            trial = low + int((limit - low_peak) / slope)
        else:
            # Not a straight line, so that every other step must halve.
            trial = min(2 * low, (low + high) // 2)
        trial = min(max(trial, low + 1), high - 1)
    return low, low_peak


class DoesNotFit(ValueError):
    """Not even the smallest fits.

    Arguments
    ---------
    peak : int
        Bytes that it takes.
    """

    def __init__(self, peak: int):
        super().__init__(f"It takes {peak} bytes.")
        self.peak = peak
