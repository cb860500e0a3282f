"""Quantized blocks of 256 values, for many tensors in one launch.

A table in the GPU's memory contains the addresses of all tensors. Each program
reads the address of its tensor and processes a few blocks of it.

Authors
 * The sb_memeff authors 2026
"""

import functools
import itertools

import torch
import triton
import triton.language as tl

from sb_memeff.ops.dispatch import has_values
from sb_memeff.ops.triton.launch import address, launch

__all__ = [
    "inside",
    "launch_on_blocks",
    "load_quantized",
    "locate",
    "pointer_of",
    "quantize",
    "state_of",
    "store_quantized",
]

# Blocks of a program; more would need too many registers.
BLOCKS = 2
# If addresses and sizes are multiples of this, loads and stores are vectorized.
ALIGNMENT = 16


@triton.jit
def locate(table_ptr, tensor_of_ptr, tensors, BLOCKS: tl.constexpr):
    """Tensor, block and value indices of a program, and a mask of blocks."""
    program = tl.program_id(0)
    tensor = tl.load(tensor_of_ptr + program)
    size = tl.load(table_ptr + tensor)
    first = (program - tl.load(table_ptr + tensors + tensor)) * BLOCKS
    block = first + tl.arange(0, BLOCKS)
    value = block[:, None] * 256 + tl.arange(0, 256)[None, :]
    return tensor, block, value, block * 256 < size, size


@triton.jit
def inside(value, size, ALIGNED: tl.constexpr):
    """Mask of the values inside a tensor."""
    if ALIGNED:
        size = tl.multiple_of(size, 16)
    return value < size


@triton.jit
def pointer_of(
    table_ptr,
    tensors,
    tensor,
    ROW: tl.constexpr,
    TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Pointer to a tensor, from a row of addresses."""
    address = tl.load(table_ptr + (2 + ROW) * tensors + tensor)
    pointer = address.to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def state_of(
    table_ptr, tensors, tensor, ROW: tl.constexpr, ALIGNED: tl.constexpr
):
    """Pointers to codes and maxima, from a row of addresses and the next."""
    codes = pointer_of(table_ptr, tensors, tensor, ROW, tl.uint8, ALIGNED)
    maxima = pointer_of(table_ptr, tensors, tensor, ROW + 1, tl.float32, False)
    return codes, maxima


@triton.jit
def load_quantized(
    codes, maxima, values_ptr, block, value, has_block, has_value
):
    """Dequantizes values."""
    code = tl.load(codes + value, mask=has_value, other=0).to(tl.int32)
    largest = tl.load(maxima + block, mask=has_block, other=0.0)
    return tl.load(values_ptr + code) * largest[:, None]


@triton.jit
def store_quantized(
    x,
    codes,
    maxima,
    middles_ptr,
    block,
    value,
    has_block,
    has_value,
    SIGNED: tl.constexpr,
):
    """Quantizes values; stores codes and maxima."""
    size = tl.where(has_value, tl.abs(x), 0.0)
    largest = tl.max(size, 1)
    # tl.max ignores NaN, and no code represents it.
    has_nan = tl.max((size != size).to(tl.int32), 1) > 0
    largest = tl.where(has_nan, float("nan"), largest)
    tl.store(maxima + block, largest, mask=has_block)
    # A block of zeros has no scale.
    scale = tl.where(largest == 0, 1.0, largest)[:, None]
    # Rounded as on the CPU, so that codes are the same.
    scaled = tl.div_rn(x, tl.broadcast_to(scale, x.shape))
    # Binary search: the number of middles below the value.
    code = tl.zeros(x.shape, tl.int32)
    step = 128
    for _ in tl.static_range(8):
        upper = code + step
        code = tl.where(tl.load(middles_ptr + upper - 1) < scaled, upper, code)
        step = step // 2
    if not SIGNED:
        # Adam divides by the root of the second moment.
        code = tl.maximum(code, 1)
    tl.store(codes + value, code.to(tl.uint8), mask=has_value)


@triton.jit
def _quantize(
    table_ptr,
    tensor_of_ptr,
    tensors,
    middles_ptr,
    SIGNED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    tensor, block, value, has_block, size = locate(
        table_ptr, tensor_of_ptr, tensors, BLOCKS
    )
    has_value = inside(value, size, ALIGNED)
    x = pointer_of(table_ptr, tensors, tensor, 0, tl.float32, ALIGNED)
    codes, maxima = state_of(table_ptr, tensors, tensor, 1, ALIGNED)
    store_quantized(
        tl.load(x + value, mask=has_value, other=0.0),
        codes,
        maxima,
        middles_ptr,
        block,
        value,
        has_block,
        has_value,
        SIGNED,
    )


def quantize(
    x: torch.Tensor, middles: torch.Tensor, signed: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantizes a tensor; see ``sb_memeff.ops.blocks_8bit.Codebook``.

    Arguments
    ---------
    x : torch.Tensor
        [N], float32, contiguous, not empty.
    middles : torch.Tensor
        The codebook's middles.
    signed : bool
        Whether the codebook is signed.

    Returns
    -------
    tuple of torch.Tensor
        [N], uint8, and [N / 256, rounded up], float32.
    """
    codes = torch.empty_like(x, dtype=torch.uint8)
    maxima = x.new_empty(triton.cdiv(x.numel(), 256))
    launch_on_blocks(
        _quantize, [[x], [codes], [maxima]], middles, SIGNED=signed
    )
    return codes, maxima


def launch_on_blocks(
    kernel: triton.JITFunction,
    tensors: list[list[torch.Tensor]],
    *arguments: torch.Tensor | float,
    **constants: bool,
) -> None:
    """Runs a kernel on the blocks of many tensors of one device.

    Arguments
    ---------
    kernel : triton.JITFunction
        Takes the table, the tensor index of each program, the number of
        tensors, and the arguments.
    tensors : list of list of torch.Tensor
        The tensors of each row of addresses. The first row determines the
        sizes.
    *arguments : torch.Tensor or float
        Further arguments of the kernel.
    **constants : bool
        Its constexpr arguments.
    """
    first = tensors[0][0]
    sizes = [x.numel() for x in tensors[0]]
    programs = tuple(triton.cdiv(size, BLOCKS * 256) for size in sizes)
    *first_programs, total = itertools.accumulate(programs, initial=0)
    if has_values(first):
        tensor_of = _tensor_of(programs, first.device)
    else:
        # Not to be kept.
        tensor_of = first.new_empty(total, dtype=torch.int32)
    rows = [sizes, first_programs]
    rows += [[address(x) for x in row] for row in tensors]
    aligned = not any(
        number % ALIGNMENT for row in rows[:1] + rows[2:] for number in row
    )
    table = torch.tensor(rows, dtype=torch.int64)
    if first.device.type == "cuda":
        # The host does not wait for a copy from pinned memory.
        table = table.pin_memory()
    table = table.to(first.device, non_blocking=True)
    launch(
        kernel,
        (total,),
        table,
        tensor_of,
        len(sizes),
        *arguments,
        ALIGNED=aligned,
        BLOCKS=BLOCKS,
        **constants,
    )


@functools.lru_cache(maxsize=8)
def _tensor_of(programs: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """The number of each program's tensor, from the programs of each."""
    numbers = torch.arange(len(programs), dtype=torch.int32)
    return numbers.repeat_interleave(torch.tensor(programs)).to(device)
