"""The kernel of the exact stream.

Authors
 * The sb_memeff authors 2026
"""

import torch

from sb_memeff.nnet.reversible.grid import round_to_grid
from sb_memeff.ops.triton import grid
from tests.unittests.ops.kernel import Kernel, each


def _reals(g, dtype, size):
    """Ties, both zeros, what is not finite, the large and the small."""
    ties = torch.arange(-9, 10) / 2 + 0.5
    large = torch.tensor([2.0**22 + 0.5, -(2.0**23) - 1, 2.0**30, -(2.0**40)])
    odd = torch.tensor(
        [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-30, -1e-30]
    )
    x = torch.cat(
        [
            *(torch.cat([ties, large]) * 2.0**-bits for bits in (0, 9, 12)),
            odd,
            3 * torch.randn(2000, generator=g),
            1e-4 * torch.randn(500, generator=g),
        ]
    )
    return (x[-size:].to(dtype),)


ROUND_TO_GRID = Kernel(
    lambda x, bits: [grid.round_to_grid(x, bits)],
    lambda x, bits: [round_to_grid(x, bits)],
    _reals,
    [(1,), (1024,), (1025,), (2600,)],
    each(0, 0, 0),
    [{"bits": 0}, {"bits": 9}, {"bits": 12}],
)
