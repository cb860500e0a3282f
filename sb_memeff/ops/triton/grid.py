"""Rounding onto the grid of the exact stream and sums on it, in one pass.

Authors
 * The sb_memeff authors 2026
"""

import torch
import triton
import triton.language as tl

from sb_memeff.ops.triton.launch import launch
from sb_memeff.ops.triton.summary import BLOCK, add_to_summary

__all__ = ["combine_on_grid"]


@triton.jit
def _grid(
    increment_ptr,
    # None if SIGN is 0.
    stream_ptr,
    result_ptr,
    # None if it is not wanted.
    summary_ptr,
    size,
    SIGN: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    scale: tl.constexpr = 2.0**BITS
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    x = tl.load(increment_ptr + index, mask=inside, other=0.0)
    x = x.to(tl.float32) * scale
    # Round half to even, as torch does. If the difference is not exact, it is
    # far from a half.
    y = tl.floor(x)
    rest = x - y
    odd = y * 0.5 != tl.floor(y * 0.5)
    y = tl.where((rest > 0.5) | ((rest == 0.5) & odd), y + 1, y)
    # Avoid -0, which subtraction could not restore.
    y = tl.where(y == 0, 0.0, y) * (1 / scale)
    if SIGN == 1:
        y = tl.load(stream_ptr + index, mask=inside, other=0.0) + y
    if SIGN == -1:
        y = tl.load(stream_ptr + index, mask=inside, other=0.0) - y
    tl.store(result_ptr + index, y, mask=inside)
    if summary_ptr is not None:
        add_to_summary(y, inside, summary_ptr)


def combine_on_grid(
    sign: int,
    stream: torch.Tensor | None,
    increment: torch.Tensor,
    bits: int,
    result: torch.Tensor,
    summary: torch.Tensor | None,
) -> None:
    """stream + sign * round(increment), or round(increment) alone.

    Arguments
    ---------
    sign : int
        1 or -1; 0 for the increment alone.
    stream : torch.Tensor or None
        float32. All values are adjacent in memory, in the same order of the
        axes in all tensors.
    increment : torch.Tensor
        float32 or half precision.
    bits : int
        Round to multiples of 2**-bits.
    result : torch.Tensor
        Takes the result, float32; may be the stream.
    summary : torch.Tensor or None
        Takes the summary of the result, see ``triton.summary.summarize``.
    """
    size = increment.numel()
    if size:
        launch(
            _grid,
            (triton.cdiv(size, BLOCK),),
            increment,
            stream,
            result,
            summary,
            size,
            SIGN=sign,
            BITS=bits,
            BLOCK=BLOCK,
        )
