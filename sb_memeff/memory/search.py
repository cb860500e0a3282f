"""Searches for the largest number whose memory is within a limit.

Authors
 * The sb_memeff authors 2026
"""

import math
from collections.abc import Callable

__all__ = ["DoesNotFit", "largest"]


def largest(
    peak: Callable[[int], int], limit: int, first: int = 1, most: int = 2**20
) -> tuple[int, int]:
    """Finds the largest integer whose peak is within a limit.

    It bisects. If the peak grows linearly, as it does with the batch, linear
    interpolation finds the number in a few steps.

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
            # Not linear: halve the interval in every other step.
            trial = min(2 * low, (low + high) // 2)
        trial = min(max(trial, low + 1), high - 1)
    return low, low_peak


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
