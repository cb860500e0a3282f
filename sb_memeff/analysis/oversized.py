"""Which batches of a data set exceed a memory budget.

Authors
 * The sb_memeff authors 2026
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from sb_memeff.analysis.durations import LoaderBatch
from sb_memeff.memory.units import format_bytes

__all__ = ["Oversized", "find_oversized"]

# Batches to list.
LISTED = 3


@dataclass
class Oversized:
    """Result of ``find_oversized``.

    Arguments
    ---------
    batches : int
        Number of all batches.
    oversized : list of LoaderBatch
        Those that exceed the limit, the largest first.
    listed : list of tuple
        The largest of them, or the largest of all if none exceeds the limit,
        each with the bytes of its step.
    limit : int
        The limit in bytes.
    """

    batches: int
    oversized: list[LoaderBatch]
    listed: list[tuple[LoaderBatch, int]]
    limit: int

    def __str__(self) -> str:
        limit = format_bytes(self.limit)
        if not self.oversized:
            head = f"All {self.batches} batches fit into {limit}. The largest:"
        else:
            least = min(batch.seconds for batch in self.oversized)
            head = (
                f"Too large for {limit}: {len(self.oversized)} of "
                f"{self.batches} batches, with utterances of {least:g} s or "
                f"more. The largest:"
            )
        rows = [("utterances", "seconds", "peak", "longest utterance")]
        rows += [
            (
                str(batch.utterances),
                f"{batch.seconds:g}",
                format_bytes(peak),
                batch.longest,
            )
            for batch, peak in self.listed
        ]
        table = [
            f"{count:>10s} {seconds:>8s} {peak:>8s}  {name}"
            for count, seconds, peak, name in rows
        ]
        return "\n".join([head, *table])


def find_oversized(
    batches: Sequence[LoaderBatch],
    measure: Callable[[int, float], int],
    limit: int,
) -> Oversized:
    """Finds the batches whose training step exceeds a limit.

    A few batches are measured. The peak of the others is predicted: it is linear
    in the number of utterances and at most quadratic in their length. The batches
    next to the limit and those that are listed are measured too.

    Arguments
    ---------
    batches : list of LoaderBatch
        The batches.
    measure : callable
        Returns the bytes of a step of so many utterances of so many seconds.
    limit : int
        The limit in bytes.

    Returns
    -------
    Oversized
        What exceeds the limit.

    Example
    -------
    >>> batches = [LoaderBatch(1, 60.0, "a"), LoaderBatch(5, 12.0, "b")]
    >>> print(find_oversized(batches, lambda n, s: int(n * s**2), 3000))
    Too large for 3.00 kB: 1 of 2 batches, with utterances of 60 s or more. \
The largest:
    utterances  seconds     peak  longest utterance
             1       60  3.60 kB  a
    """
    peaks = _Peaks(measure)
    # Extremes of each of the terms, so that prediction does not extrapolate.
    for key in (_seconds, _utterances, _total, lambda x: -_total(x)):
        peaks.measured(max(batches, key=key))
    ordered = []
    settled = False
    while not settled:
        ordered = sorted(batches, key=peaks.predicted, reverse=True)
        border = sum(peaks.predicted(batch) > limit for batch in ordered)
        close = ordered[max(border - 1, 0) : border + 1]
        listed = ordered[: min(max(border, 1), LISTED)]
        # Measuring may move the border.
        settled = not any(peaks.add(batch) for batch in (*close, *listed))
    oversized = [x for x in ordered if peaks.predicted(x) > limit]
    listed = (oversized or ordered[:1])[:LISTED]
    return Oversized(
        len(batches),
        oversized,
        [(batch, peaks.measured(batch)) for batch in listed],
        limit,
    )


class _Peaks:
    """Measured peaks, and predictions from them."""

    def __init__(self, measure: Callable[[int, float], int]):
        self.measure = measure
        self.known: dict[tuple[int, float], int] = {}
        self.weights: np.ndarray | None = None

    def add(self, batch: LoaderBatch) -> bool:
        """Measures a batch; False if it was known."""
        key = batch.utterances, batch.seconds
        if key in self.known:
            return False
        self.known[key] = self.measure(*key)
        self.weights = None
        return True

    def measured(self, batch: LoaderBatch) -> int:
        """The measured peak of a batch."""
        self.add(batch)
        return self.known[batch.utterances, batch.seconds]

    def predicted(self, batch: LoaderBatch) -> float:
        """The measured peak of a batch, or a predicted one."""
        key = batch.utterances, batch.seconds
        if key in self.known:
            return self.known[key]
        if self.weights is None:
            # The command imports this module whatever it does.
            # pyrefly: ignore[untyped-import]
            from scipy.optimize import nnls

            sizes = np.array(list(self.known.values()), dtype=float)
            terms = np.array([_terms(*known) for known in self.known])
            # Errors are relative to the peak, and no term shrinks.
            scale = sizes.max()
            weights, _ = nnls(
                terms / (sizes[:, None] / scale), np.ones(len(sizes))
            )
            self.weights = scale * weights
        return float(self.weights @ _terms(*key))


def _terms(utterances: int, seconds: float) -> np.ndarray:
    return np.array(
        [1, utterances, utterances * seconds, utterances * seconds**2]
    )


def _seconds(batch: LoaderBatch) -> float:
    return batch.seconds


def _utterances(batch: LoaderBatch) -> int:
    return batch.utterances


def _total(batch: LoaderBatch) -> float:
    return batch.utterances * batch.seconds
