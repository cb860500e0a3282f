"""Batch norm with ReLU, and its gradients, in one pass each over memory.

Authors
 * The sb_memeff authors 2026
"""

import torch
import triton
import triton.language as tl

from sb_memeff.ops.triton.launch import launch

__all__ = ["batch_statistics", "norm_relu", "norm_relu_backward"]

# Values of a tile; channels that lie next to one another.
TILE, CHANNELS = 1024, 32
# Programs that add up a gradient of the channels.
SPLITS = 256
# Channels whose statistics a program puts together.
COMBINED = 8


@triton.jit
def _locate(
    tile,
    samples,
    positions,
    channels,
    sample_stride,
    position_stride,
    channel_stride,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Where a tile of positions (t, f) by channels is; a sample has several.

    Returns the sample, where it begins, positions and which of them exist,
    channels, offsets and which of these exist. Tiles beyond the last one, which
    the last round of a program may have, do not.
    """
    tiles = tl.cdiv(positions, ROWS)
    sample = tile // tiles
    start = sample.to(tl.int64) * sample_stride
    position = (tile - sample * tiles) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    offset = position[:, None] * position_stride
    offset += channel[None, :] * channel_stride
    real = (position < positions) & (sample < samples)
    has = real[:, None] & (channel < channels)[None, :]
    return sample, start, position, real, channel, offset, has


@triton.jit
def _collect(
    x_ptr,
    partial_ptr,
    samples,
    positions,
    channels,
    bands,
    sample_stride,
    position_stride,
    channel_stride,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Count, mean and sum of squared deviations, by channel and program.

    Tiles are added with the formula of Chan et al. (1983): no difference of
    large sums.
    """
    count = 0.0
    mean = tl.zeros((CHANNELS,), tl.float32)
    squares = tl.zeros((CHANNELS,), tl.float32)
    splits = tl.num_programs(0)
    for step in range(tl.cdiv(samples * tl.cdiv(positions, ROWS), splits)):
        _, start, _, real, _, offset, has = _locate(
            tl.program_id(0) + step * splits,
            samples,
            positions,
            channels,
            sample_stride,
            position_stride,
            channel_stride,
            ROWS,
            CHANNELS,
        )
        x = tl.load(x_ptr + start + offset, mask=has, other=0.0)
        x = x.to(tl.float32)
        size = tl.sum(real.to(tl.float32), 0)
        mean_here = tl.sum(x, 0) / tl.maximum(size, 1.0)
        distance = tl.where(has, x - mean_here[None, :], 0.0)
        total = count + size
        share = size / tl.maximum(total, 1.0)
        shift = mean_here - mean
        squares += (
            tl.sum(distance * distance, 0) + shift * shift * count * share
        )
        mean += shift * share
        count = total
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    out = partial_ptr + tl.program_id(0) * channels + channel
    tl.store(out, mean, mask=inside)
    tl.store(out + splits * channels, squares, mask=inside)
    tl.store(out + 2 * splits * channels, mean * 0 + count, mask=inside)


@triton.jit
def _combine(
    partial_ptr,
    mean_ptr,
    variance_ptr,
    running_mean_ptr,
    running_variance_ptr,
    batches_ptr,
    splits,
    channels,
    momentum,
    HAS_RUNNING: tl.constexpr,
    HAS_BATCHES: tl.constexpr,
    SPLITS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Statistics of a batch from those of programs, in a fixed order."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    split = tl.arange(0, SPLITS)
    inside = channel < channels
    has = (split < splits)[:, None] & inside[None, :]
    at = partial_ptr + split[:, None] * channels + channel[None, :]
    plane = splits * channels
    means = tl.load(at, mask=has, other=0.0)
    squares = tl.load(at + plane, mask=has, other=0.0)
    counts = tl.load(at + 2 * plane, mask=has, other=0.0)
    count = tl.maximum(tl.sum(counts, 0), 1.0)
    mean = tl.sum(means * counts, 0) / count
    shift = tl.where(has, means - mean[None, :], 0.0)
    squares = tl.sum(squares + counts * shift * shift, 0)
    tl.store(mean_ptr + channel, mean, mask=inside)
    tl.store(variance_ptr + channel, squares / count, mask=inside)
    if HAS_BATCHES:
        if tl.program_id(0) == 0:
            tl.store(batches_ptr, tl.load(batches_ptr) + 1)
    if HAS_RUNNING:
        at = running_mean_ptr + channel
        before = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        now = momentum * mean + (1 - momentum) * before
        tl.store(at, now.to(at.dtype.element_ty), mask=inside)
        at = running_variance_ptr + channel
        before = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        unbiased = squares / (count - 1)
        now = momentum * unbiased + (1 - momentum) * before
        tl.store(at, now.to(at.dtype.element_ty), mask=inside)


@triton.jit
def _normalized(
    x_ptr,
    mean_ptr,
    variance_ptr,
    padding_ptr,
    sample,
    start,
    position,
    real,
    channel,
    offset,
    has,
    positions,
    channels,
    bands,
    eps,
    HAS_PADDING: tl.constexpr,
):
    """(x - mean) / deviation, 1 / deviation, and which frames count."""
    inside = channel < channels
    mean = tl.load(mean_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    variance = tl.load(variance_ptr + channel, mask=inside, other=1.0)
    scale = 1 / tl.sqrt(variance.to(tl.float32) + eps)
    x = tl.load(x_ptr + start + offset, mask=has, other=0.0).to(tl.float32)
    normalized = (x - mean[None, :]) * scale[None, :]
    counts = has
    if HAS_PADDING:
        # [N, 1, T, 1] is contiguous: one value for the bands of a frame.
        padded = tl.load(
            padding_ptr + sample * (positions // bands) + position // bands,
            mask=real,
            other=0,
        )
        counts = has & (padded == 0)[:, None]
    return normalized, scale, counts


@triton.jit
def _affine(normalized, weight_ptr, bias_ptr, channel, channels):
    inside = channel < channels
    weight = tl.load(weight_ptr + channel, mask=inside, other=0.0)
    bias = tl.load(bias_ptr + channel, mask=inside, other=0.0)
    weight = weight.to(tl.float32)[None, :]
    return normalized * weight + bias.to(tl.float32)[None, :], weight


@triton.jit
def _norm_relu(
    x_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    variance_ptr,
    padding_ptr,
    y_ptr,
    samples,
    positions,
    channels,
    bands,
    sample_stride,
    position_stride,
    channel_stride,
    eps,
    HAS_PADDING: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    sample, start, position, real, channel, offset, has = _locate(
        tl.program_id(0),
        samples,
        positions,
        channels,
        sample_stride,
        position_stride,
        channel_stride,
        ROWS,
        CHANNELS,
    )
    normalized, _, counts = _normalized(
        x_ptr,
        mean_ptr,
        variance_ptr,
        padding_ptr,
        sample,
        start,
        position,
        real,
        channel,
        offset,
        has,
        positions,
        channels,
        bands,
        eps,
        HAS_PADDING,
    )
    z, _ = _affine(normalized, weight_ptr, bias_ptr, channel, channels)
    # Not maximum: NaN must come out.
    y = tl.where(counts & ~(z <= 0), z, 0.0)
    tl.store(y_ptr + start + offset, y.to(y_ptr.dtype.element_ty), mask=has)


@triton.jit
def _sum_gradients(
    gradient_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    variance_ptr,
    padding_ptr,
    sums_ptr,
    samples,
    positions,
    channels,
    bands,
    sample_stride,
    position_stride,
    channel_stride,
    eps,
    HAS_PADDING: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Sums of dz and of dz (x - mean) / deviation, by channel and program."""
    total = tl.zeros((ROWS, CHANNELS), tl.float32)
    weighted = tl.zeros((ROWS, CHANNELS), tl.float32)
    splits = tl.num_programs(0)
    for step in range(tl.cdiv(samples * tl.cdiv(positions, ROWS), splits)):
        sample, start, position, real, channel, offset, has = _locate(
            tl.program_id(0) + step * splits,
            samples,
            positions,
            channels,
            sample_stride,
            position_stride,
            channel_stride,
            ROWS,
            CHANNELS,
        )
        normalized, _, counts = _normalized(
            x_ptr,
            mean_ptr,
            variance_ptr,
            padding_ptr,
            sample,
            start,
            position,
            real,
            channel,
            offset,
            has,
            positions,
            channels,
            bands,
            eps,
            HAS_PADDING,
        )
        z, _ = _affine(normalized, weight_ptr, bias_ptr, channel, channels)
        dy = tl.load(gradient_ptr + start + offset, mask=has, other=0.0)
        dz = tl.where(counts & ~(z <= 0), dy.to(tl.float32), 0.0)
        total += dz
        weighted += tl.where(has, dz * normalized, 0.0)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    out = sums_ptr + tl.program_id(0) * channels + channel
    tl.store(out, tl.sum(total, 0), mask=channel < channels)
    out += splits * channels
    tl.store(out, tl.sum(weighted, 0), mask=channel < channels)


@triton.jit
def _norm_relu_backward(
    gradient_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    variance_ptr,
    padding_ptr,
    sums_ptr,
    dx_ptr,
    dweight_ptr,
    dbias_ptr,
    samples,
    positions,
    channels,
    bands,
    sample_stride,
    position_stride,
    channel_stride,
    eps,
    OF_BATCH: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    sample, start, position, real, channel, offset, has = _locate(
        tl.program_id(0),
        samples,
        positions,
        channels,
        sample_stride,
        position_stride,
        channel_stride,
        ROWS,
        CHANNELS,
    )
    normalized, scale, counts = _normalized(
        x_ptr,
        mean_ptr,
        variance_ptr,
        padding_ptr,
        sample,
        start,
        position,
        real,
        channel,
        offset,
        has,
        positions,
        channels,
        bands,
        eps,
        HAS_PADDING,
    )
    z, weight = _affine(normalized, weight_ptr, bias_ptr, channel, channels)
    dy = tl.load(gradient_ptr + start + offset, mask=has, other=0.0)
    dz = tl.where(counts & ~(z <= 0), dy.to(tl.float32), 0.0)
    inside = channel < channels
    total = tl.load(sums_ptr + channel, mask=inside, other=0.0)
    weighted = tl.load(sums_ptr + channels + channel, mask=inside, other=0.0)
    if tl.program_id(0) == 0:
        dweight = weighted.to(dweight_ptr.dtype.element_ty)
        tl.store(dweight_ptr + channel, dweight, mask=inside)
        dbias = total.to(dbias_ptr.dtype.element_ty)
        tl.store(dbias_ptr + channel, dbias, mask=inside)
    if OF_BATCH:
        dz -= (total[None, :] + normalized * weighted[None, :]) / (
            samples * positions
        )
    dx = dz * weight * scale[None, :]
    tl.store(dx_ptr + start + offset, dx.to(dx_ptr.dtype.element_ty), mask=has)


def _tiling(
    x: torch.Tensor,
) -> tuple[tuple[int, int], dict[str, int], tuple[int, ...]]:
    """The grid, positions and channels of a tile, and sizes and strides."""
    samples, channels, frames, bands = x.shape
    positions = frames * bands
    if x.is_contiguous():
        width, strides = 1, (channels * positions, 1, positions)
    else:
        width = min(CHANNELS, triton.next_power_of_2(channels))
        strides = positions * channels, channels, 1
    rows = TILE // width
    return (
        (samples * triton.cdiv(positions, rows), triton.cdiv(channels, width)),
        {"ROWS": rows, "CHANNELS": width},
        (samples, positions, channels, bands, *strides),
    )


def batch_statistics(
    x: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_variance: torch.Tensor | None,
    momentum: float,
    batches: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``sb_memeff.ops.norm_relu.batch_statistics``."""
    (tiles, across), tile, sizes = _tiling(x)
    splits, channels = min(SPLITS, tiles), x.shape[1]
    partial = x.new_empty(3, splits, channels, dtype=torch.float32)
    mean = x.new_empty(channels, dtype=torch.float32)
    variance = torch.empty_like(mean)
    launch(_collect, (splits, across), x, partial, *sizes, **tile)
    launch(
        _combine,
        (triton.cdiv(channels, COMBINED),),
        partial,
        mean,
        variance,
        # Any pointers, since they are not read.
        mean if running_mean is None else running_mean,
        mean if running_variance is None else running_variance,
        mean if batches is None else batches,
        splits,
        channels,
        float(momentum),
        HAS_RUNNING=running_mean is not None,
        HAS_BATCHES=batches is not None,
        SPLITS=triton.next_power_of_2(splits),
        CHANNELS=COMBINED,
    )
    return mean, variance


def norm_relu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    mean: torch.Tensor,
    variance: torch.Tensor,
    eps: float,
    padding: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """See ``sb_memeff.ops.norm_relu.norm_relu``."""
    y = torch.empty_like(x, dtype=dtype)
    grid, tile, sizes = _tiling(x)
    launch(
        _norm_relu,
        grid,
        x,
        weight,
        bias,
        mean,
        variance,
        # Any pointer, since it is not read.
        mean if padding is None else padding.contiguous(),
        y,
        *sizes,
        eps,
        HAS_PADDING=padding is not None,
        **tile,
    )
    return y


def norm_relu_backward(
    gradient: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    mean: torch.Tensor,
    variance: torch.Tensor,
    eps: float,
    padding: torch.Tensor | None,
    of_batch: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See ``sb_memeff.ops.norm_relu.norm_relu_backward``."""
    if gradient.stride() != x.stride():
        gradient = torch.empty_like(x, dtype=gradient.dtype).copy_(gradient)
    (tiles, across), tile, sizes = _tiling(x)
    splits = min(SPLITS, tiles)
    partial = x.new_empty(2, splits, x.shape[1], dtype=torch.float32)
    inputs = (
        gradient,
        x,
        weight,
        bias,
        mean,
        variance,
        mean if padding is None else padding.contiguous(),
    )
    constants = {"HAS_PADDING": padding is not None, **tile}
    launch(
        _sum_gradients,
        (splits, across),
        *inputs,
        partial,
        *sizes,
        eps,
        **constants,
    )
    # In an order that does not depend on the run.
    sums = partial.sum(1)
    dweight, dbias = torch.empty_like(weight), torch.empty_like(bias)
    # A program has read the gradient of a value when it writes there.
    dx = gradient if gradient.dtype == x.dtype else torch.empty_like(x)
    launch(
        _norm_relu_backward,
        (tiles, across),
        *inputs,
        sums,
        dx,
        dweight,
        dbias,
        *sizes,
        eps,
        OF_BATCH=of_batch,
        **constants,
    )
    return dx, dweight, dbias
