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
        self._extremes: list[tuple[str, torch.Tensor]] = []
        self._max_abs: list[float] | None = None
        # Of the streams before each block.
        self._summaries: dict[str, Summary | None] = {}
        self._names: list[str] = []
        # (block, whether it differs, summary in forward, in backward).
        self._comparisons: list[tuple[str, torch.Tensor, Summary, Summary]] = []
        self._all_finite = True
        next_forward()

    def forward_begins(
        self, names: list[str], streams: list[torch.Tensor]
    ) -> None:
        """Summarises the streams before the first block."""
        self._names = names
        if names:
            self._measure(names[0], streams)
            self._summaries[names[0]] = self._summary(streams)

    def block_computed(self, name: str, streams: list[torch.Tensor]) -> None:
        """Summarises the streams before the next block."""
        self._measure(name, streams)
        index = self._names.index(name) + 1
        if index < len(self._names):
            self._summaries[self._names[index]] = self._summary(streams)

    def backward_begins(self) -> None:
        """Raises if |x| reached 2**(24 - grid_bits), or for an earlier step."""
        read_arrived()
        if not self._extremes:
            return
        grid_bits = cast(int, self.grid_bits)
        limit = 2.0 ** (24 - grid_bits)
        if self._max_abs is None:
            extremes = torch.stack([pair for _, pair in self._extremes])
            # The only time that the host waits for the device, however many
            # groups of invertible blocks the chain has.
            self._max_abs = extremes.abs().amax(dim=1).tolist()
        max_abs = self._max_abs
        # inf and NaN pass, as they do in autograd: GradScaler and Brain skip
        # or count non-finite steps.
        self._all_finite = all(map(math.isfinite, max_abs))
        for (name, _), value in zip(self._extremes, max_abs):
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
        if not self.compare:
            return
        before = cast(Summary, self._summaries[name])
        now = before.summarize(streams)
        if self.grid_bits is None:
            differs = before.relative_error(now) > FLOAT64_TOLERANCE
        elif self._all_finite:
            differs = before.differs(now)
        else:
            return
        self._comparisons.append((name, differs, before, now))
        if is_read_at_once(differs.device):
            self.backward_ends()

    def backward_ends(self) -> None:
        """Copies all comparisons to the host at once."""
        comparisons, self._comparisons = self._comparisons, []
        if not comparisons:
            return

        def message(index: int) -> str:
            name, _, before, now = comparisons[index]
            return _message(name, before, now)

        report_mismatches(torch.stack([c[1] for c in comparisons]), message)

    def _measure(self, name: str, streams: list[torch.Tensor]) -> None:
        """Stores the smallest and the largest value of each stream."""
        if self.grid_bits is not None:
            for stream in streams:
                extremes = (
                    stream.aminmax()
                    if stream.numel()
                    else (stream.new_zeros(2))
                )
                self._extremes.append((name, torch.stack(tuple(extremes))))

    def _summary(self, streams: list[torch.Tensor]) -> Summary | None:
        if not self.compare:
            return None
        return Summary(
            streams, sampled=True if self.grid_bits is None else None
        )


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
