"""Reversible networks: train without storing activations.

A reversible block computes its output in such a way that its input can be
reconstructed from it. A chain of such blocks stores its last output only.
Backward walks through the chain from the end, reconstructs the input of each
block and computes the gradients from it. Memory no longer grows with depth, at
the price of one extra forward pass.

An additive coupling (Dinh et al., "NICE", 2014; Gomez et al., "The Reversible
Residual Network", 2017, eq. 6 and 7) splits the channels into two streams:

    forward   y1 = x1 + f(x2)      inverse   x2 = y2 - g(y1)
              y2 = x2 + g(y1)                x1 = y1 - f(x2)

``f`` and ``g`` are any modules that keep the shape.

In floating point, (x + h) - h is not x. The errors grow along the chain, and a
tiny difference changes how a low-precision ``f`` rounds: with bf16 inside f the
gradient of 50 blocks is off by 0.3. Therefore float32 streams live on a fixed
grid. The output of f is rounded to multiples of 2**-12, so that sums below
2**12 fit the 24 bits of a float32, and adding and subtracting are exact. Then
the inverse is bit-exact at any depth and in any precision of f, as long as f
itself is deterministic. Values beyond that range are reported.

============== ==========================================================
module         contents
============== ==========================================================
coupling       the mathematics: invertible maps of two streams
space_to_depth invertible down-sampling
evaluator      evaluate the functions of a block: value, vjp
arguments      extra arguments, and the functions that take them
layout         split a tensor into streams; channels_last
grid           dtypes and grid of the streams
nodes          the memory: autograd nodes that reconstruct their inputs
tap_sum        the sum of the taps' values
observer       an interface to observe the streams
guards         range and exactness of the streams
sequence       ``ReversibleSequence``
check          ``check_invertible`` compares with stored activations
============== ==========================================================

Authors
 * The sb_memeff authors 2026
"""

from sb_memeff.nnet.reversible.check import (
    InvertibilityReport,
    check_invertible,
    inversion_errors,
)
from sb_memeff.nnet.reversible.coupling import (
    AdditiveCoupling,
    Invertible,
    Tap,
)
from sb_memeff.nnet.reversible.sequence import ReversibleSequence
from sb_memeff.nnet.reversible.space_to_depth import SpaceToDepth

__all__ = [
    "AdditiveCoupling",
    "InvertibilityReport",
    "Invertible",
    "ReversibleSequence",
    "SpaceToDepth",
    "Tap",
    "check_invertible",
    "inversion_errors",
]
