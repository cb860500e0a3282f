"""Joint networks that add and activate: forward, and the sums of backward.

A cell (b, t, u) has the index b T (U+1) + t (U+1) + u in a plane. The kernels
compute the cell's rows of encoder and predictor from it, so no row indices are
stored.

Authors
 * The sb_memeff authors 2026
"""

import torch
import triton
import triton.language as tl

from sb_memeff.ops.triton.launch import launch

__all__ = ["ACTIVATIONS", "add_input_gradients", "join"]

ACTIVATIONS = (
    "relu",
    "leaky_relu",
    "tanh",
    "sigmoid",
    "silu",
    "gelu",
    "gelu_tanh",
)
# Cells and features of a program of the forward pass.
CELLS, FEATURES = 8, 128
# Cells that a program of the backward pass sums at a time, and features.
ADDED, WIDTH = 16, 64
# sqrt(1 / 2), sqrt(2 / pi), 1 / sqrt(2 pi).
ROOT_HALF = tl.constexpr(0.7071067811865476)
ROOT_2_PI = tl.constexpr(0.7978845608028654)
DENSITY = tl.constexpr(0.3989422804014327)


@triton.jit
def _tanh(x):
    e = tl.exp(-2 * tl.abs(x))
    far = (1 - e) / (1 + e)
    far = tl.where(x < 0, -far, far)
    # Near 0 the difference would cancel.
    y = x * x
    near = x * (1 + y * (-1 / 3 + y * (2 / 15 - y * (17 / 315))))
    return tl.where(tl.abs(x) < 0.1, near, far)


@triton.jit
def _activated(x, slope, ACTIVATION: tl.constexpr):
    # Comparisons propagate NaN.
    if ACTIVATION == "relu":
        y = tl.where(x <= 0, 0.0, x)
    elif ACTIVATION == "leaky_relu":
        y = tl.where(x > 0, x, slope * x)
    elif ACTIVATION == "tanh":
        y = _tanh(x)
    elif ACTIVATION == "sigmoid":
        y = 1 / (1 + tl.exp(-x))
    elif ACTIVATION == "silu":
        y = x / (1 + tl.exp(-x))
    elif ACTIVATION == "gelu":
        y = 0.5 * x * (1 + tl.erf(x * ROOT_HALF))
    else:
        y = 0.5 * x * (1 + _tanh((x + 0.044715 * x * x * x) * ROOT_2_PI))
    return y


@triton.jit
def _slope_at(x, slope, ACTIVATION: tl.constexpr):
    """The derivative of the activation."""
    if ACTIVATION == "relu":
        d = tl.where(x <= 0, 0.0, 1.0)
    elif ACTIVATION == "leaky_relu":
        d = tl.where(x > 0, 1.0, slope)
    elif ACTIVATION == "tanh":
        y = _tanh(x)
        d = 1 - y * y
    elif ACTIVATION == "sigmoid":
        y = 1 / (1 + tl.exp(-x))
        d = y * (1 - y)
    elif ACTIVATION == "silu":
        y = 1 / (1 + tl.exp(-x))
        d = y * (1 + x * (1 - y))
    elif ACTIVATION == "gelu":
        d = 0.5 * (1 + tl.erf(x * ROOT_HALF))
        d += x * DENSITY * tl.exp(-0.5 * x * x)
    else:
        y = _tanh((x + 0.044715 * x * x * x) * ROOT_2_PI)
        inner = (1 + 3 * 0.044715 * x * x) * ROOT_2_PI
        d = 0.5 * (1 + y) + 0.5 * x * (1 - y * y) * inner
    return d


@triton.jit(do_not_specialize=["cells", "rows", "columns"])
def _join(
    enc_ptr,
    pred_ptr,
    cells_ptr,
    joined_ptr,
    cells,
    features,
    rows,
    columns,
    enc_sample,
    enc_frame,
    enc_feature,
    pred_sample,
    pred_column,
    pred_feature,
    slope,
    ACTIVATION: tl.constexpr,
    CELLS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    cell = tl.program_id(0) * CELLS + tl.arange(0, CELLS)
    feature = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)[None, :]
    feature = feature.to(tl.int64)
    has_cell = cell < cells
    index = tl.load(cells_ptr + cell, mask=has_cell, other=0)
    frame = index // columns
    sample = frame // rows
    t, u = frame - sample * rows, index - frame * columns
    inside = has_cell[:, None] & (feature < features)
    enc_row = (sample * enc_sample + t * enc_frame)[:, None]
    pred_row = (sample * pred_sample + u * pred_column)[:, None]
    enc = tl.load(
        enc_ptr + enc_row + feature * enc_feature, mask=inside, other=0
    )
    pred = tl.load(
        pred_ptr + pred_row + feature * pred_feature, mask=inside, other=0
    )
    # Round where torch does: after the sum and after the activation.
    x = (enc.to(tl.float32) + pred.to(tl.float32)).to(enc.dtype)
    y = _activated(x.to(tl.float32), slope, ACTIVATION).to(enc.dtype)
    out = joined_ptr + cell.to(tl.int64)[:, None] * features + feature
    tl.store(out, y.to(joined_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["start", "cells", "rows", "columns"])
def _add_rows(
    gradient_ptr,
    positions_ptr,
    cells_ptr,
    own_ptr,
    other_ptr,
    total_ptr,
    factor_ptr,
    start,
    cells,
    features,
    rows,
    columns,
    own_sample,
    own_row,
    own_feature,
    other_sample,
    other_row,
    other_feature,
    slope,
    BY_FRAME: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ADDED: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Sums the gradients of all cells in a row of the encoder or predictor.

    "own" is that row; "other" are the rows that the cells add to it.
    """
    row = tl.program_id(0).to(tl.int64)
    feature = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)[None, :]
    feature = feature.to(tl.int64)
    has_feature = feature < features
    # A tile's cells are consecutive: only frames from first to last have any.
    first = tl.load(cells_ptr) // columns
    last = tl.load(cells_ptr + cells - 1) // columns
    if BY_FRAME:
        sample = row // rows
        number = row - sample * rows
        end = columns.to(tl.int64)
        begin = tl.where((row < first) | (row > last), end, 0)
    else:
        sample = row // columns
        number = row - sample * columns
        begin = tl.maximum(first - sample * rows, 0)
        end = tl.minimum(last - sample * rows + 1, rows.to(tl.int64))
    if begin < end:
        own = tl.load(
            own_ptr
            + sample * own_sample
            + number * own_row
            + feature * own_feature,
            mask=has_feature,
            other=0,
        )
        total = tl.zeros((ADDED, WIDTH), tl.float32)
        for from_ in range(begin, end, ADDED):
            step = from_ + tl.arange(0, ADDED)
            if BY_FRAME:
                index = row * columns + step
            else:
                index = (sample * rows + step) * columns + number
            cell = tl.load(positions_ptr + index, mask=step < end, other=-1)
            cell -= start
            inside = (cell >= 0) & (cell < cells)
            used = inside[:, None] & has_feature
            at = gradient_ptr + cell.to(tl.int64)[:, None] * features + feature
            g = tl.load(at, mask=used, other=0).to(tl.float32)
            other = tl.load(
                other_ptr
                + sample * other_sample
                + (step * other_row)[:, None]
                + feature * other_feature,
                mask=used,
                other=0,
            )
            x = (own.to(tl.float32) + other.to(tl.float32)).to(own.dtype)
            d = _slope_at(x.to(tl.float32), slope, ACTIVATION)
            total += tl.where(used, g * d, 0.0)
        added = tl.sum(total, 0)[None, :]
        if HAS_FACTOR:
            added *= tl.load(factor_ptr)
        out = total_ptr + row * features + feature
        before = tl.load(out, mask=has_feature, other=0.0)
        tl.store(out, before + added, mask=has_feature)


def join(
    enc: torch.Tensor,
    pred: torch.Tensor,
    indices: torch.Tensor,
    activation: str,
    slope: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Computes the activated sums of encoder and predictor of cells.

    Arguments
    ---------
    enc : torch.Tensor
        [B, T, H], any strides.
    pred : torch.Tensor
        [B, U+1, H], of the same dtype.
    indices : torch.Tensor
        [N], int64, contiguous: indices of the cells.
    activation : str
        One of ACTIVATIONS.
    slope : float
        Negative slope of leaky_relu.
    dtype : torch.dtype
        Dtype of the result.

    Returns
    -------
    torch.Tensor
        [N, H].
    """
    features = enc.shape[2]
    joined = enc.new_empty(len(indices), features, dtype=dtype)
    grid = triton.cdiv(len(indices), CELLS), triton.cdiv(features, FEATURES)
    launch(
        _join,
        grid,
        enc,
        pred,
        indices,
        joined,
        len(indices),
        features,
        enc.shape[1],
        pred.shape[1],
        *enc.stride(),
        *pred.stride(),
        slope,
        ACTIVATION=activation,
        CELLS=CELLS,
        FEATURES=FEATURES,
    )
    return joined


def add_input_gradients(
    gradient: torch.Tensor,
    positions: torch.Tensor,
    start: int,
    indices: torch.Tensor,
    enc: torch.Tensor,
    pred: torch.Tensor,
    enc_total: torch.Tensor,
    pred_total: torch.Tensor,
    activation: str,
    slope: float,
    factor: torch.Tensor | None = None,
) -> None:
    """Adds the gradients of encoder and predictor, given those of the cells.

    The order of summation is deterministic.

    Arguments
    ---------
    gradient : torch.Tensor
        [N, H], contiguous, with respect to the result of ``join``.
    positions : torch.Tensor
        [B T (U+1)], int32: start + n at the index of the gradient's cell n,
        and numbers of other tiles or -1 elsewhere.
    start : int
        Number of the tile's first cell in ``positions``.
    indices : torch.Tensor
        [N], int64, ascending: indices of the cells.
    enc : torch.Tensor
        [B, T, H], any strides.
    pred : torch.Tensor
        [B, U+1, H].
    enc_total : torch.Tensor
        [B, T, H], float32, contiguous; the gradient is added to it.
    pred_total : torch.Tensor
        [B, U+1, H], likewise.
    activation : str
        One of ACTIVATIONS.
    slope : float
        Negative slope of leaky_relu.
    factor : torch.Tensor, optional
        A scalar to multiply by.
    """
    _, rows, features = enc.shape
    columns = pred.shape[1]
    sides = (
        (True, enc, pred, enc_total),
        (False, pred, enc, pred_total),
    )
    for by_frame, own, other, total in sides:
        launch(
            _add_rows,
            (len(own) * own.shape[1], triton.cdiv(features, WIDTH)),
            gradient,
            positions,
            indices,
            own,
            other,
            total,
            # A pointer that is not read may be any.
            gradient if factor is None else factor,
            start,
            len(indices),
            features,
            rows,
            columns,
            *own.stride(),
            *other.stride(),
            slope,
            BY_FRAME=by_frame,
            HAS_FACTOR=factor is not None,
            ACTIVATION=activation,
            ADDED=ADDED,
            WIDTH=WIDTH,
        )
