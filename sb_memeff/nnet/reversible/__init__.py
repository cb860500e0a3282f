"""Reversible networks: train without storing activations.

A reversible block computes its output in such a way that its input can be
reconstructed from it. A chain of such blocks stores its last output only;
backward walks the chain from the end, reconstructs each block's input, and
forms the gradients from it. Memory no longer grows with depth. The price is
one extra forward pass.

An additive coupling (Dinh et al., "NICE", 2014; Gomez et al., "The Reversible
Residual Network", 2017, eq. 6 and 7) splits the channels into two streams:

    forward   y1 = x1 + f(x2)      inverse   x2 = y2 - g(y1)
              y2 = x2 + g(y1)                x1 = y1 - f(x2)

``f`` and ``g`` are ordinary modules of any kind that keep the shape.

The exact stream: in floating point, (x + h) - h is not x. The errors grow
along the chain, and a tiny difference flips the roundings of a low-precision
``f``: with bf16 inside f the gradient of 50 blocks is off by 0.3. Therefore a
float32 stream lives on a fixed grid. The output of f is rounded to multiples of
2**-12, so that sums below 2**12 fit the 24 bits of a float32, and adding and
subtracting are exact. The inverse is then bit-exact at any depth and in any
precision of f, as long as f itself is deterministic. Values that leave that
range are reported.

========== ===============================================================
module     contents
========== ===============================================================
coupling   the maths: invertible maps of two streams
evaluator  how a block evaluates its functions: value, value with pullback
grid       the exact stream
walk       the memory: autograd nodes that reconstruct their inputs
sequence   ``ReversibleSequence``
check      ``check_invertible`` compares with stored activations
========== ===============================================================

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
    SpaceToDepth,
    Tap,
)
from sb_memeff.nnet.reversible.sequence import ReversibleSequence

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
