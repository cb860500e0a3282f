"""Joint networks that add and activate: forward, and the sums of backward.

A cell (b, t, u) is its place b T (U+1) + t (U+1) + u in a plane; from that the
kernels find the cell's rows of encoder and predictor, so no index is stored.

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
# Cells that a program of the backward pass adds up at a time, and features.
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
    # Near 0 the difference would lose its digits.
    y = x * x
    near = x * (1 + y * (-1 / 3 + y * (2 / 15 - y * (17 / 315))))
    return tl.where(tl.abs(x) < 0.1, near, far)


@triton.jit
def _activated(x, slope, ACTIVATION: tl.constexpr):
    # Comparisons are made so that NaN comes out.
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
    places_ptr,
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
    place = tl.load(places_ptr + cell, mask=has_cell, other=0)
    frame = place // columns
    sample = frame // rows
    t, u = frame - sample * rows, place - frame * columns
    has = has_cell[:, None] & (feature < features)
    enc_row = (sample * enc_sample + t * enc_frame)[:, None]
    pred_row = (sample * pred_sample + u * pred_column)[:, None]
    enc = tl.load(enc_ptr + enc_row + feature * enc_feature, mask=has, other=0)
    pred = tl.load(
        pred_ptr + pred_row + feature * pred_feature, mask=has, other=0
    )
    # Rounded where torch rounds: the sum, and then the activation.
    x = (enc.to(tl.float32) + pred.to(tl.float32)).to(enc.dtype)
    y = _activated(x.to(tl.float32), slope, ACTIVATION).to(enc.dtype)
    out = joined_ptr + cell.to(tl.int64)[:, None] * features + feature
    tl.store(out, y.to(joined_ptr.dtype.element_ty), mask=has)


@triton.jit(do_not_specialize=["start", "cells", "rows", "columns"])
def _add_rows(
    gradient_ptr,
    positions_ptr,
    places_ptr,
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
    """Adds the gradients of all cells of a row of encoder or predictor.

    own is that row, other the rows that were added to it, cell by cell.
    """
    row = tl.program_id(0).to(tl.int64)
    feature = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)[None, :]
    feature = feature.to(tl.int64)
    has_feature = feature < features
    # Cells of a tile follow one another: others than these frames have none.
    first = tl.load(places_ptr) // columns
    last = tl.load(places_ptr + cells - 1) // columns
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
                place = row * columns + step
            else:
                place = (sample * rows + step) * columns + number
            cell = tl.load(positions_ptr + place, mask=step < end, other=-1)
            cell -= start
            inside = (cell >= 0) & (cell < cells)
            has = inside[:, None] & has_feature
            at = gradient_ptr + cell.to(tl.int64)[:, None] * features + feature
            g = tl.load(at, mask=has, other=0).to(tl.float32)
            other = tl.load(
                other_ptr
                + sample * other_sample
                + (step * other_row)[:, None]
                + feature * other_feature,
                mask=has,
                other=0,
            )
            x = (own.to(tl.float32) + other.to(tl.float32)).to(own.dtype)
            d = _slope_at(x.to(tl.float32), slope, ACTIVATION)
            total += tl.where(has, g * d, 0.0)
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
    """The activated sums of encoder and predictor in some cells.

    Arguments
    ---------
    enc : torch.Tensor
        [B, T, H], any strides.
    pred : torch.Tensor
        [B, U+1, H], of that dtype.
    indices : torch.Tensor
        [N], int64, contiguous: the cells.
    activation : str
        One of ACTIVATIONS.
    slope : float
        That of leaky_relu below 0.
    dtype : torch.dtype
        Of the result.

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
    """Adds the gradients of encoder and predictor from those of the cells.

    The order of addition does not depend on the run.

    Arguments
    ---------
    gradient : torch.Tensor
        [N, H], contiguous, with respect to what ``join`` returned.
    positions : torch.Tensor
        [B T (U+1)], int32: start + n at the place of cell n of the gradient;
        numbers of other tiles or -1 elsewhere.
    start : int
        See there.
    indices : torch.Tensor
        [N], int64, ascending: the cells.
    enc : torch.Tensor
        [B, T, H], any strides.
    pred : torch.Tensor
        [B, U+1, H].
    enc_total : torch.Tensor
        As enc, float32 and contiguous: what is added to.
    pred_total : torch.Tensor
        As pred.
    activation : str
        One of ACTIVATIONS.
    slope : float
        That of leaky_relu below 0.
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
