"""Report when a stream cannot be, or was not, reconstructed exactly.

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
from sb_memeff.nnet.reversible.walk import Observer

__all__ = ["StreamGuard"]

# Of the largest value: inversion in float64 is off by rounding alone.
FLOAT64_TOLERANCE = 1e-6


class StreamGuard(Observer):
    """Raises an error if a stream left the grid, or was not rebuilt.

    Streams on the grid are compared by a checksum, float64 streams by a
    sample of their values. Streams without a grid (``exact=False``) are not
    compared: their inversion is inexact by choice.

    Arguments
    ---------
    bits : int, optional
        Of the grid; None for a float64 stream.
    compare : bool
        False only looks whether streams leave the grid.
    """

    def __init__(self, bits: int | None, compare: bool = True):
        self.bits = bits
        self.compare = compare
        self._extremes: list[tuple[str, torch.Tensor]] = []
        self._farthest: list[float] | None = None
        self._before: dict[str, Summary | None] = {}
        self._reports: list[tuple[str, torch.Tensor, Summary, Summary]] = []
        next_forward()

    def entered(self, names: list[str], streams: list[torch.Tensor]) -> None:
        """Describes the streams before the first block."""
        self._names = names
        if names:
            self._look(names[0], streams)
            self._before[names[0]] = self._summary(streams)

    def computed(self, name: str, streams: list[torch.Tensor]) -> None:
        """Describes the streams before the next block."""
        self._look(name, streams)
        number = self._names.index(name) + 1
        if number < len(self._names):
            self._before[self._names[number]] = self._summary(streams)

    def backward_begins(self) -> None:
        """Raises if |x| reached 2**(24 - bits), or for an earlier step."""
        read_arrived()
        if not self._extremes:
            return
        bits = cast(int, self.bits)
        limit = 2.0 ** (24 - bits)
        if self._farthest is None:
            extremes = torch.stack([pair for _, pair in self._extremes])
            # The only wait for the device, also where couplings stand in
            # several places of a chain.
            self._farthest = extremes.abs().amax(dim=1).tolist()
        farthest = self._farthest
        # inf and NaN are passed on, as autograd does: what skips or counts
        # non-finite steps (GradScaler, Brain) must see them.
        self._finite = all(map(math.isfinite, farthest))
        for (name, _), value in zip(self._extremes, farthest):
            if limit <= value < math.inf:
                raise RuntimeError(
                    f"ReversibleSequence: at {name} the stream reached "
                    f"{value:.6g}, beyond {limit:.6g}, where float32 cannot "
                    f"hold multiples of 2**-{bits}: the inverse would no "
                    f"longer be exact. Lower the learning rate or the scale of "
                    f"the blocks, or set grid_bits={bits - 3} (a coarser "
                    f"grid that reaches 8 times as far)."
                )

    def rebuilt(self, name: str, streams: list[torch.Tensor]) -> None:
        """Compares; on the CPU a difference is an error at once."""
        if not self.compare:
            return
        before = cast(Summary, self._before[name])
        now = before.summarize(streams)
        if self.bits is None:
            differs = before.relative_error(now) > FLOAT64_TOLERANCE
        elif self._finite:
            differs = before.differs(now)
        else:
            return
        self._reports.append((name, differs, before, now))
        if is_read_at_once(differs.device):
            self.backward_ends()

    def backward_ends(self) -> None:
        """Hands the comparisons to the host, all in one copy."""
        reports, self._reports = self._reports, []
        if not reports:
            return

        def message(number: int) -> str:
            name, _, before, now = reports[number]
            return _message(name, before, now)

        report_mismatches(torch.stack([r[1] for r in reports]), message)

    def _look(self, name: str, streams: list[torch.Tensor]) -> None:
        if self.bits is not None:
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
        return Summary(streams, sampled=True if self.bits is None else None)


def _message(name: str, before: Summary, now: Summary) -> str:
    return (
        f"ReversibleSequence: backward rebuilt another input of {name} than "
        f"forward had: it differs{before.size_of_difference(now)}, and gradients would "
        f"be wrong. The functions in {name} must compute the "
        f"same when called again: no state but buffers, and no random numbers "
        f"but those of torch, Python, numpy and their own generators; if a "
        f"library chose another algorithm, torch.use_deterministic_algorithms "
        f"or more free GPU memory help. Set save_memory=False to store "
        f"activations, or train on with "
        f"sb_memeff.nnet.replay.set_mismatch_action('warn')."
    )
