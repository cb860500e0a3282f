"""Batch norm with ReLU, from statistics that are there.

    z = (x - mean) / sqrt(variance + eps) * weight + bias
    y = max(z, 0), and 0 in padded frames

Authors
 * The sb_memeff authors 2026
"""

import torch

from sb_memeff.ops.dispatch import runs_fused
from sb_memeff.ops.slices import slices

__all__ = [
    "batch_statistics",
    "normalize",
    "norm_relu",
    "norm_relu_backward",
]


def batch_statistics(
    x: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_variance: torch.Tensor | None,
    momentum: float,
    batches: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance of each channel; updates running ones in place.

    Arguments
    ---------
    x : torch.Tensor
        [N, C, T, F], more than one value for each channel.
    running_mean : torch.Tensor or None
        [C].
    running_variance : torch.Tensor or None
        [C]; it is updated with the unbiased variance, as in BatchNorm2d.
    momentum : float
        The weight of this batch.
    batches : torch.Tensor, optional
        The number of batches; 1 is added in place.

    Returns
    -------
    tuple of torch.Tensor
        [C] each, float32 at least: mean and biased variance.

    Example
    -------
    >>> x = torch.tensor([[[[1.0, 3.0]]]])
    >>> running = torch.zeros(1), torch.ones(1)
    >>> batch_statistics(x, *running, momentum=0.5)
    (tensor([2.]), tensor([1.]))
    >>> running
    (tensor([1.]), tensor([1.5000]))
    """
    running = running_mean, running_variance
    if _is_fused(x, *(r for r in running if r is not None)):
        from sb_memeff.ops.triton import norm_relu as kernels

        return kernels.batch_statistics(x, *running, momentum, batches)
    if batches is not None:
        batches.add_(1)
    # torch returns statistics in the dtype of the running ones, or else of x.
    dtype = torch.promote_types(x.dtype, torch.float32)
    wide_mean, wide_variance = (
        x.new_zeros(x.shape[1], dtype=dtype) if r is None else r.to(dtype)
        for r in running
    )
    mean, variance = torch.batch_norm_update_stats(
        x, wide_mean, wide_variance, momentum
    )
    for before, now in zip(running, (wide_mean, wide_variance)):
        if before is not None and now is not before:
            before.copy_(now)
    return mean, variance


def normalize(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    mean: torch.Tensor,
    variance: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    """Computes z in the dtype and layout of x.

    Arguments
    ---------
    x : torch.Tensor
        [N, C, ...].
    weight : torch.Tensor
        [C], and so are the next three.
    bias : torch.Tensor
        The norm's.
    mean : torch.Tensor
        Of x by channel, or a running one.
    variance : torch.Tensor
        The same; not corrected for its bias.
    eps : float
        The norm's.

    Returns
    -------
    torch.Tensor
        As x.

    Example
    -------
    >>> x = torch.tensor([[[1.0, 3.0]]])
    >>> ones = torch.ones(1)
    >>> normalize(x, ones, 0 * ones, 2 * ones, ones, 0.0)
    tensor([[[-1.,  1.]]])
    """
    # The CPU takes weights in half precision only with such statistics.
    weight, bias = weight.to(mean.dtype), bias.to(mean.dtype)
    return torch.native_batch_norm(
        x, weight, bias, mean, variance, False, 0.0, eps
    )[0]


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
    """Computes y in another dtype.

    Arguments
    ---------
    x : torch.Tensor
        [N, C, T, F]; see ``normalize`` for the next five.
    weight : torch.Tensor
        [C].
    bias : torch.Tensor
        [C].
    mean : torch.Tensor
        [C].
    variance : torch.Tensor
        [C].
    eps : float
        The norm's.
    padding : torch.Tensor or None
        [N, 1, T, 1], True in padded frames.
    dtype : torch.dtype
        Of the result.

    Returns
    -------
    torch.Tensor
        [N, C, T, F], laid out as x.

    Example
    -------
    >>> x = torch.tensor([[[[1.0, 3.0]]]])
    >>> ones = torch.ones(1)
    >>> norm_relu(x, ones, 0 * ones, 2 * ones, ones, 0.0, None, torch.half)
    tensor([[[[0., 1.]]]], dtype=torch.float16)
    """
    if _is_fused(x, weight, bias, mean, variance):
        from sb_memeff.ops.triton import norm_relu as kernels

        return kernels.norm_relu(
            x, weight, bias, mean, variance, eps, padding, dtype
        )
    y = normalize(x, weight, bias, mean, variance, eps).relu_()
    if padding is not None:
        y.masked_fill_(padding, 0.0)
    return y.to(dtype)


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
    """Computes the gradients of x, weight and bias from that of y.

    Arguments
    ---------
    gradient : torch.Tensor
        [N, C, T, F], of y. It may be overwritten.
    x : torch.Tensor
        As for ``norm_relu``, and so are the next six.
    weight : torch.Tensor
        [C].
    bias : torch.Tensor
        [C].
    mean : torch.Tensor
        [C].
    variance : torch.Tensor
        [C].
    eps : float
        The norm's.
    padding : torch.Tensor or None
        [N, 1, T, 1].
    of_batch : bool
        Whether mean and variance are those of x, and depend on it.

    Returns
    -------
    tuple of torch.Tensor
        In the dtypes of x, weight and bias.

    Example
    -------
    >>> x = torch.tensor([[[[1.0, 3.0]]]])
    >>> ones = torch.ones(1)
    >>> norm = ones, 0 * ones, 2 * ones, ones, 0.0, None
    >>> norm_relu_backward(torch.ones(1, 1, 1, 2), x, *norm, of_batch=False)
    (tensor([[[[0., 1.]]]]), tensor([1.]), tensor([1.]))
    """
    if _is_fused(x, weight, bias, mean, variance, gradient):
        from sb_memeff.ops.triton import norm_relu as kernels

        return kernels.norm_relu_backward(
            gradient, x, weight, bias, mean, variance, eps, padding, of_batch
        )
    gradient = gradient.to(x.dtype)
    dx, of_affine = gradient, []
    # Channels do not depend on each other.
    for channels in slices(x.shape[1], x.nbytes):
        some, for_y = x[:, channels], gradient[:, channels]
        w, b, m, v = (
            values[channels] for values in (weight, bias, mean, variance)
        )
        z = normalize(some, w, b, m, v, eps)
        if padding is not None:
            z.masked_fill_(padding, 0.0)
        torch.ops.aten.threshold_backward.grad_input(
            for_y, z, 0, grad_input=for_y
        )
        del z
        part, *found = torch.ops.aten.native_batch_norm_backward(
            for_y,
            some,
            w.to(m.dtype),
            m,
            v,
            m,
            (v + eps).rsqrt(),
            of_batch,
            eps,
            [True, True, True],
        )
        of_affine.append(found)
        if part.shape == x.shape:
            dx = part
        else:
            for_y.copy_(part)
    dweight, dbias = map(torch.cat, zip(*of_affine))
    return dx, dweight.to(weight.dtype), dbias.to(bias.dtype)


def _is_fused(x: torch.Tensor, *others: torch.Tensor) -> bool:
    return runs_fused(x, *others) and (
        x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
    )
