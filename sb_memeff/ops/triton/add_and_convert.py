"""A sum and its copy in another dtype, in one pass over memory.

Authors
 * The sb_memeff authors 2026
"""

import torch
import triton
import triton.language as tl

from sb_memeff.ops.triton.launch import launch

__all__ = ["add_and_convert"]

BLOCK = 1024


@triton.jit
def _add_and_convert(
    x_ptr, y_ptr, sum_ptr, copy_ptr, size, BLOCK: tl.constexpr
):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    x = tl.load(x_ptr + index, mask=inside, other=0.0)
    y = tl.load(y_ptr + index, mask=inside, other=0.0)
    total = x + y.to(tl.float32)
    tl.store(sum_ptr + index, total, mask=inside)
    copy = total.to(copy_ptr.dtype.element_ty)
    tl.store(copy_ptr + index, copy, mask=inside)


def add_and_convert(
    x: torch.Tensor, y: torch.Tensor, total: torch.Tensor, copy: torch.Tensor
) -> None:
    """Computes x + y twice.

    Arguments
    ---------
    x : torch.Tensor
        float32. All values are adjacent in memory, in the same order of the
        axes in all tensors.
    y : torch.Tensor
        float32 or half precision.
    total : torch.Tensor
        Takes the sum, float32; may be x.
    copy : torch.Tensor
        Takes the sum in its own dtype.
    """
    size = x.numel()
    if size:
        grid = (triton.cdiv(size, BLOCK),)
        launch(_add_and_convert, grid, x, y, total, copy, size, BLOCK=BLOCK)
