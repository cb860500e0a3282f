"""Quantized blocks of 256 values, for many tensors in one launch.

In a table (``table``), a state has two rows of addresses: of its codes and of its
blocks' scales. If the second one is 0, the state is in float32.

Authors
 * The sb_memeff authors 2026
"""

import torch
import triton
import triton.language as tl

from sb_memeff.ops.triton.table import Table, inside, locate, pointer_of

__all__ = ["load_state", "quantize", "store_state"]


@triton.jit
def load_state(
    states_ptr,
    tensors,
    values_ptr,
    block,
    value,
    has_block,
    has_value,
    ALIGNED: tl.constexpr,
):
    """Loads values of a state, in 8 bits or in float32.

    ``states_ptr`` points to the address of the program's tensor in the first of
    the state's two rows.
    """
    address = tl.load(states_ptr)
    scales_address = tl.load(states_ptr + tensors)
    if scales_address != 0:
        codes = pointer_of(address, tl.uint8, ALIGNED)
        code = tl.load(codes + value, mask=has_value, other=0).to(tl.int32)
        scales = pointer_of(scales_address, tl.float32, False)
        scale = tl.load(scales + block, mask=has_block, other=0.0)
        x = tl.load(values_ptr + code) * scale[:, None]
    else:
        pointer = pointer_of(address, tl.float32, ALIGNED)
        x = tl.load(pointer + value, mask=has_value, other=0.0)
    return x


@triton.jit
def store_state(
    x,
    states_ptr,
    tensors,
    values_ptr,
    middles_ptr,
    block,
    value,
    has_block,
    has_value,
    dither,
    SIGNED: tl.constexpr,
    DITHERS: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Stores values where ``load_state`` reads them; returns what rounding took."""
    address = tl.load(states_ptr)
    scales_address = tl.load(states_ptr + tensors)
    if scales_address != 0:
        if not SIGNED:
            # An infinite second moment restarts, or it would stop its block.
            x = tl.where(x == float("inf"), 0.0, x)
        code, scale = _store_quantized(
            x,
            pointer_of(address, tl.uint8, ALIGNED),
            pointer_of(scales_address, tl.float32, False),
            values_ptr if DITHERS else middles_ptr,
            block,
            value,
            has_block,
            has_value,
            dither,
            SIGNED,
            DITHERS,
        )
        residual = x - tl.load(values_ptr + code) * scale[:, None]
    else:
        pointer = pointer_of(address, tl.float32, ALIGNED)
        tl.store(pointer + value, x, mask=has_value)
        residual = tl.zeros(x.shape, x.dtype)
    return residual


@triton.jit
def _store_quantized(
    x,
    codes,
    scales,
    limits_ptr,
    block,
    value,
    has_block,
    has_value,
    dither,
    SIGNED: tl.constexpr,
    DITHERS: tl.constexpr,
):
    """Quantizes values; stores and returns codes and scales.

    The limits are the codebook's values if it dithers, otherwise its middles.
    """
    known = tl.where(has_value, x, 0.0)
    extreme = tl.max(known, 1)
    if SIGNED:
        lowest = tl.min(known, 1)
        extreme = tl.where(extreme >= -lowest, extreme, lowest)
    # tl.max ignores NaN, and no code represents it.
    has_nan = tl.max((known != known).to(tl.int32), 1) > 0
    extreme = tl.where(has_nan, float("nan"), extreme)
    tl.store(scales + block, extreme, mask=has_block)
    # A block of zeros has no scale.
    scale = tl.where(extreme == 0, 1.0, extreme)[:, None]
    # Rounded as on the CPU, so that codes are the same.
    scaled = tl.div_rn(x, tl.broadcast_to(scale, x.shape))
    # Binary search: the number of middles below the value; or of values, without
    # the first, that are not above it.
    code = tl.zeros(x.shape, tl.int32)
    step = 128
    for _ in tl.static_range(8):
        upper = code + step
        if DITHERS:
            is_above = tl.load(limits_ptr + upper) <= scaled
        else:
            is_above = tl.load(limits_ptr + upper - 1) < scaled
        code = tl.where(is_above, upper, code)
        step = step // 2
    if DITHERS:
        below = tl.load(limits_ptr + code)
        gap = tl.load(limits_ptr + tl.minimum(code + 1, 255)) - below
        limit = tl.fma(gap, tl.broadcast_to(dither, x.shape), below)
        code = tl.where(scaled > limit, code + 1, code)
    if not SIGNED:
        # Adam divides by the root of the second moment.
        code = tl.maximum(code, 1)
    tl.store(codes + value, code.to(tl.uint8), mask=has_value)
    return code, extreme


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
    row_ptr = table_ptr + 2 * tensors + tensor
    x = pointer_of(tl.load(row_ptr), tl.float32, ALIGNED)
    _store_quantized(
        tl.load(x + value, mask=has_value, other=0.0),
        pointer_of(tl.load(row_ptr + tensors), tl.uint8, ALIGNED),
        pointer_of(tl.load(row_ptr + 2 * tensors), tl.float32, False),
        middles_ptr,
        block,
        value,
        has_block,
        has_value,
        0.0,
        SIGNED,
        False,
    )


def quantize(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    middles: torch.Tensor,
    signed: bool,
) -> None:
    """Quantizes a tensor; see ``sb_memeff.ops.blocks_8bit.Codebook``.

    Arguments
    ---------
    x : torch.Tensor
        [N], float32, contiguous, not empty.
    codes : torch.Tensor
        [N], uint8, contiguous; is written to.
    scales : torch.Tensor
        [N / 256, rounded up], float32, contiguous; is written to.
    middles : torch.Tensor
        The codebook's middles.
    signed : bool
        Whether the codebook is signed.
    """
    Table([[x], [codes], [scales]]).launch(_quantize, middles, SIGNED=signed)
