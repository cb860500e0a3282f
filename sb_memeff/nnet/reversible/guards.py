"""Report when a stream cannot be, or was not, reconstructed exactly.

Authors
 * The sb_memeff authors 2026
"""

import math

import torch

from sb_memeff.nnet.mismatch import (
    checksum,
    mismatch_action,
    next_forward,
    read_arrived,
    report_mismatches,
)
from sb_memeff.nnet.reversible.walk import Observer

__all__ = ["StreamGuard"]

# Values of a stream that are kept to tell how large a difference is.
SAMPLE = 1024
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

    def __init__(self, bits, compare=True):
        self.bits = bits
        self.compare = compare
        self.sampled = bits is None or mismatch_action() == "warn"
        self._extremes = []
        self._before = {}
        self._reports = []
        next_forward()

    def entered(self, names, streams):
        """Describes the streams before the first block."""
        self._names = names
        if names:
            self._look(names[0], streams)
            self._before[names[0]] = self._describe(streams)

    def computed(self, name, streams):
        """Describes the streams before the next block."""
        self._look(name, streams)
        number = self._names.index(name) + 1
        if number < len(self._names):
            self._before[self._names[number]] = self._describe(streams)

    def backward_begins(self):
        """Raises if |x| reached 2**(24 - bits), or for an earlier step."""
        read_arrived()
        if not self._extremes:
            return
        limit = 2.0 ** (24 - self.bits)
        extremes = torch.stack([pair for _, pair in self._extremes])
        # The only wait for the device.
        farthest = extremes.abs().amax(dim=1).tolist()
        # inf and NaN are passed on, as autograd does: what skips or counts
        # non-finite steps (GradScaler, Brain) must see them.
        self._finite = all(map(math.isfinite, farthest))
        for (name, _), value in zip(self._extremes, farthest):
            if limit <= value < math.inf:
                raise RuntimeError(
                    f"ReversibleSequence: at {name} the stream reached "
                    f"{value:.6g}, beyond {limit:.6g}, where float32 cannot "
                    f"hold multiples of 2**-{self.bits}: the inverse would no "
                    f"longer be exact. Lower the learning rate or the scale of "
                    f"the blocks, or set grid_bits={self.bits - 3} (a coarser "
                    f"grid that reaches 8 times as far)."
                )

    def rebuilt(self, name, streams):
        """Compares; on the CPU a difference is an error at once."""
        if not self.compare:
            return
        sums, samples = self._before[name]
        sums_now, samples_now = self._describe(streams)
        if self.bits is not None:
            if not self._finite:
                return
            differs = (sums != sums_now).any()
        else:
            error = (samples - samples_now).abs().amax()
            differs = error > FLOAT64_TOLERANCE * samples.abs().amax()
        self._reports.append((name, differs, samples, samples_now))
        if differs.device.type == "cpu":
            self.backward_ends()

    def backward_ends(self):
        """Hands the comparisons to the host, all in one copy."""
        reports, self._reports = self._reports, []
        if not reports:
            return

        def message(number):
            name, _, before, now = reports[number]
            return _message(name, before, now)

        report_mismatches(torch.stack([r[1] for r in reports]), message)

    def _look(self, name, streams):
        if self.bits is not None:
            for stream in streams:
                extremes = (
                    stream.aminmax()
                    if stream.numel()
                    else (stream.new_zeros(2))
                )
                self._extremes.append((name, torch.stack(tuple(extremes))))

    def _describe(self, streams):
        sums = samples = None
        if not self.compare:
            return sums, samples
        if self.bits is not None:
            sums = torch.stack([checksum(s) for s in streams])
        if self.sampled:
            samples = torch.cat([_sample(s) for s in streams])
        return sums, samples


def _sample(stream):
    """Some values, whatever the strides, without a copy of the rest."""
    room = SAMPLE
    for axis in range(stream.dim()):
        most = max(1, round(room ** (1 / (stream.dim() - axis))))
        step = -(-stream.shape[axis] // most) if stream.shape[axis] else 1
        stream = stream[(slice(None),) * axis + (slice(None, None, step),)]
        room //= max(1, stream.shape[axis])
    return stream.flatten()


def _message(name, before, now):
    size = ""
    if before is not None:
        error = (before - now).abs().max() / before.abs().max()
        size = f" by {error.item():.2g} of the largest value (in a sample)"
    return (
        f"ReversibleSequence: backward did not reconstruct the input of {name}: "
        f"it differs{size} from that of forward, and gradients would be "
        f"wrong. A function in {name} or after it computed something else the "
        f"second time: it must be deterministic, with no state but buffers and "
        f"no other random numbers than those of torch, Python and numpy; or a "
        f"library chose another algorithm (torch.use_deterministic_algorithms, "
        f"more free GPU memory). check_invertible(net, x) says where. "
        f"save_memory=False stores the activations instead; "
        f"sb_memeff.nnet.mismatch.set_mismatch_action('warn') trains on."
    )
