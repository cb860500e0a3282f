"""Report streams that cannot be, or were not, reconstructed exactly.

Authors
 * The sb_memeff authors 2026
"""

import math
from typing import cast

import torch

from sb_memeff.nnet.replay.mismatch import (
    Summary,
    is_read_at_once,
    next_forward,
    read_arrived,
    report_mismatches,
)
from sb_memeff.nnet.reversible.observer import Observer
from sb_memeff.ops.summary import Summaries

__all__ = ["StreamGuard"]

# Relative to the largest value. The inverse in float64 differs by rounding only.
FLOAT64_TOLERANCE = 1e-6


class StreamGuard(Observer):
    """Raises an error if a stream left the grid, or differs in backward.

    Streams on the grid are compared by a checksum, float64 streams by a
    sample of their values. Streams without a grid (``exact=False``) are not
    compared: the user has chosen an inexact inverse.

    Arguments
    ---------
    grid_bits : int, optional
        Bits of the grid; None for a float64 stream.
    compare : bool
        False checks only that streams stay on the grid.
    """

    def __init__(self, grid_bits: int | None, compare: bool = True):
        self.grid_bits = grid_bits
        self.compare = compare
        self.summaries = Summaries()
        # In forward, of both streams before each block and after the last.
        self._reached: list[tuple[str, torch.Tensor]] = []
        self._max_abs: list[float] | None = None
        # Of the streams before each block.
        self._before: dict[str, Summary] = {}
        self._names: list[str] = []
        # (block, summary in forward, in backward).
        self._comparisons: list[tuple[str, Summary, Summary]] = []
        self._all_finite = True
        next_forward()

    def forward_begins(
        self, names: list[str], streams: list[torch.Tensor]
    ) -> None:
        """Summarizes the streams before the first block."""
        self._names = names
        if names:
            self._see(names[0], 0, streams)

    def block_computed(self, name: str, streams: list[torch.Tensor]) -> None:
        """Summarizes the streams before the next block."""
        self._see(name, self._names.index(name) + 1, streams)

    def backward_begins(self) -> None:
        """Raises if |x| reached 2**(24 - grid_bits), or for an earlier step."""
        read_arrived()
        if not self._reached:
            return
        grid_bits = cast(int, self.grid_bits)
        limit = 2.0 ** (24 - grid_bits)
        if self._max_abs is None:
            # The only time that the host waits for the device, however many
            # groups of invertible blocks the chain has.
            self._max_abs = torch.stack([x for _, x in self._reached]).tolist()
        max_abs = self._max_abs
        # inf and NaN pass, as they do in autograd: GradScaler and Brain skip
        # or count non-finite steps.
        self._all_finite = all(map(math.isfinite, max_abs))
        for (name, _), value in zip(self._reached, max_abs):
            if limit <= value < math.inf:
                raise RuntimeError(
                    f"ReversibleSequence: at {name} the stream reached "
                    f"{value:.6g}, beyond {limit:.6g}, where float32 cannot "
                    f"hold multiples of 2**-{grid_bits}: the inverse would no "
                    f"longer be exact. Lower the learning rate or the scale of "
                    f"the blocks, or set grid_bits={grid_bits - 3} (a coarser "
                    f"grid that reaches 8 times as far)."
                )

    def input_reconstructed(
        self, name: str, streams: list[torch.Tensor]
    ) -> None:
        """Compares the streams; on the CPU a difference is an error at once."""
        if not self.compare or not self._all_finite:
            return
        before = self._before[name]
        now = self._summary(streams, before.sampled)
        self._comparisons.append((name, before, now))
        if is_read_at_once(streams[0].device):
            self.backward_ends()

    def backward_ends(self) -> None:
        """Copies all comparisons to the host at once."""
        comparisons, self._comparisons = self._comparisons, []
        if not comparisons:
            return
        pairs = [(before, now) for _, before, now in comparisons]
        if self.grid_bits is None:
            errors = [before.relative_error(now) for before, now in pairs]
            differ = torch.stack(errors) > FLOAT64_TOLERANCE
        else:
            differ = Summary.differ(pairs)

        def message(index: int) -> str:
            return _message(*comparisons[index])

        report_mismatches(differ, message)

    def _see(self, name: str, index: int, streams: list[torch.Tensor]) -> None:
        """Summarizes the streams that a block computed for the next one."""
        if self.grid_bits is not None:
            self._reached += [
                (name, self.summaries.of(x).largest_magnitude) for x in streams
            ]
        if self.compare and index < len(self._names):
            self._before[self._names[index]] = self._summary(streams)

    def _summary(
        self, streams: list[torch.Tensor], sampled: bool | None = None
    ) -> Summary:
        if self.grid_bits is None:
            return Summary(streams, True, [])
        sums = [self.summaries.checksum(x) for x in streams]
        return Summary(streams, sampled, sums)


def _message(name: str, before: Summary, now: Summary) -> str:
    return (
        f"ReversibleSequence: in backward the input of {name} "
        f"differs{before.size_of_difference(now)} from that in forward, so that "
        f"gradients would be wrong. The functions in {name} must compute the "
        f"same when called again: no state but buffers, and no random numbers "
        f"but those of torch, Python, numpy and their own generators. If a "
        f"library chose another algorithm, torch.use_deterministic_algorithms "
        f"or more free GPU memory help. Set save_memory=False to store "
        f"activations, or train on with "
        f"sb_memeff.nnet.replay.set_mismatch_action('warn')."
    )
