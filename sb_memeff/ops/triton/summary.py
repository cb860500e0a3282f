"""Largest magnitude and checksum of a tensor, in one pass.

Authors
 * The sb_memeff authors 2026
"""

import torch
import triton
import triton.language as tl

from sb_memeff.ops.triton.launch import launch

__all__ = ["add_to_summary", "summarize"]

BLOCK = 2048


@triton.jit
def add_to_summary(x, inside, summary_ptr):
    """Adds the values of one program to a summary."""
    bits = tl.where(inside, x.to(tl.int32, bitcast=True), 0)
    # Without the sign, bits are in the order of magnitudes, and NaN is last.
    largest = tl.max(bits & 0x7FFFFFFF, 0)
    tl.atomic_max(summary_ptr, largest, sem="relaxed")
    # In int64, because the interpreter raises an error where int32 overflows.
    total = tl.sum(bits.to(tl.int64), 0).to(tl.int32)
    tl.atomic_add(summary_ptr + 1, total, sem="relaxed")


@triton.jit
def _summarize(x_ptr, summary_ptr, size, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    x = tl.load(x_ptr + index, mask=inside, other=0.0)
    add_to_summary(x, inside, summary_ptr)


def summarize(x: torch.Tensor, summary: torch.Tensor) -> None:
    """Adds the values of a tensor to a summary.

    Arguments
    ---------
    x : torch.Tensor
        float32; its values are adjacent in memory.
    summary : torch.Tensor
        int32: the bits of the largest magnitude, the checksum.
    """
    if x.numel():
        grid = (triton.cdiv(x.numel(), BLOCK),)
        launch(_summarize, grid, x, summary, x.numel(), BLOCK=BLOCK)
