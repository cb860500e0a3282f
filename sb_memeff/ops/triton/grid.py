"""Rounding onto the grid of the exact stream, in one pass.

Authors
 * The sb_memeff authors 2026
"""

import torch
import triton
import triton.language as tl

from sb_memeff.ops.triton.launch import launch

__all__ = ["round_to_grid"]

BLOCK = 1024


@triton.jit
def _round(
    x_ptr,
    rounded_ptr,
    size,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    scale: tl.constexpr = 2.0**BITS
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    x = tl.load(x_ptr + index, mask=inside, other=0.0).to(tl.float32) * scale
    # Round half to even, as torch does. If the difference is not exact, it is
    # far from a half.
    y = tl.floor(x)
    rest = x - y
    odd = y * 0.5 != tl.floor(y * 0.5)
    y = tl.where((rest > 0.5) | ((rest == 0.5) & odd), y + 1, y)
    # Avoid -0, which subtraction could not restore.
    y = tl.where(y == 0, 0.0, y)
    tl.store(rounded_ptr + index, y * (1 / scale), mask=inside)


def round_to_grid(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Rounds to multiples of 2**-bits.

    Arguments
    ---------
    x : torch.Tensor
        float32 or half precision, without gaps in memory, with any order of
        the axes.
    bits : int
        Bits after the binary point.

    Returns
    -------
    torch.Tensor
        float32, with the strides of x.
    """
    rounded = torch.empty_like(x, dtype=torch.float32)
    if x.numel():
        launch(
            _round,
            (triton.cdiv(x.numel(), BLOCK),),
            x,
            rounded,
            x.numel(),
            BITS=bits,
            BLOCK=BLOCK,
        )
    return rounded
