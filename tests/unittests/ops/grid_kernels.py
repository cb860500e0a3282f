"""The kernels of the exact stream and its gradient.

Authors
 * The sb_memeff authors 2026
"""

import torch

from sb_memeff.ops.add_and_convert import add_and_convert
from sb_memeff.ops.grid import add_on_grid, round_to_grid, subtract_on_grid
from sb_memeff.ops.summary import Summaries
from sb_memeff.ops.triton import (
    add_and_convert as sum_kernel,
    grid,
)
from sb_memeff.ops.triton.summary import summarize
from tests.unittests.ops.kernel import Kernel, each, fp32


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


def _stream_and_increment(g, dtype, size):
    """Sums that float32 holds; infinities, NaN and -0."""
    (increment,) = _reals(g, dtype, size)
    increment[increment.abs() > 100] = 0.5
    noise = 100 * torch.randn(len(increment), generator=g)
    stream = (noise * 2.0**12).round() * 2.0**-12
    odd = torch.tensor([-0.0, torch.inf, -torch.inf, torch.nan])
    stream[::7] = odd.repeat(size)[: len(stream[::7])]
    return stream, increment


def _rounded(x, bits):
    result = torch.empty_like(x, dtype=torch.float32)
    grid.combine_on_grid(0, None, x, bits, result, None)
    return [result]


def _combined(sign):
    def call(stream, increment):
        result = torch.empty_like(stream)
        row, summary = Summaries().new(stream.device)
        grid.combine_on_grid(sign, stream, increment, 12, result, row)
        return [result, summary.largest_magnitude]

    return call


def _plain(function):
    def call(stream, increment):
        y = function(stream, increment, 12)
        return [y, Summaries().of(y).largest_magnitude]

    return call


def _summarized(x):
    row, summary = Summaries().new(x.device)
    summarize(x, row)
    return [summary.largest_magnitude]


def _gradients(g, dtype, size):
    """Sums with infinities and NaN, and some beyond float16."""
    total, gradient = torch.randn(2, size, generator=g)
    total[::7] = torch.tensor(
        [-0.0, torch.inf, -torch.inf, torch.nan, 1e5, 65519.0, 1e-7]
    ).repeat(size)[: len(total[::7])]
    gradient[::14] = 0
    return total, gradient.to(dtype)


def _added_and_converted(total, gradient, to):
    result, copy = torch.empty_like(total), torch.empty_like(total, dtype=to)
    sum_kernel.add_and_convert(total, gradient, result, copy)
    return [result, copy]


SIZES = [(1,), (2048,), (2049,), (2600,)]
ROUND_TO_GRID = Kernel(
    _rounded,
    lambda x, bits: [round_to_grid(x, bits)],
    _reals,
    SIZES,
    each(0, 0, 0),
    [{"bits": 0}, {"bits": 9}, {"bits": 12}],
)
ADD_ON_GRID = Kernel(
    _combined(1),
    _plain(add_on_grid),
    _stream_and_increment,
    SIZES,
    each(0, 0, 0),
)
SUBTRACT_ON_GRID = Kernel(
    _combined(-1),
    _plain(subtract_on_grid),
    _stream_and_increment,
    SIZES,
    each(0, 0, 0),
)
SUMMARIZE = Kernel(
    _summarized,
    lambda x: [Summaries().of(x).largest_magnitude],
    _reals,
    SIZES,
    fp32(0),
)
ADD_AND_CONVERT = Kernel(
    _added_and_converted,
    lambda total, gradient, to: list(add_and_convert(total, gradient, to)),
    _gradients,
    SIZES,
    # Of the copy.
    each(8e-3, 8e-3, 8e-3),
    [{"to": torch.bfloat16}, {"to": torch.float16}],
)
