"""Batch norm, ReLU and convolution as one node, without the activation.

Authors
 * The sb_memeff authors 2026
"""

import contextlib
from collections.abc import Generator, Iterable
from contextvars import ContextVar
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from sb_memeff.nnet.padding import mask
from sb_memeff.nnet.replay.kept import keep
from sb_memeff.ops.dispatch import is_on_gpu
from sb_memeff.ops.norm_relu import (
    batch_statistics,
    norm_relu,
    norm_relu_backward,
)
from sb_memeff.ops.slices import slices
from sb_memeff.utils.autograd import (
    in_plain_autograd,
    refuse_double_backward,
)
from sb_memeff.utils.hooks import are_watched

__all__ = ["norm_relu_conv", "one_by_one"]


KINDS = nn.BatchNorm2d, nn.ReLU, nn.Conv2d
# Saved on import, to detect replaced methods.
FORWARDS = tuple(kind.forward for kind in KINDS)

_one_by_one: ContextVar[bool] = ContextVar("one_by_one", default=False)


@contextlib.contextmanager
def one_by_one() -> Generator[None, None, None]:
    """Calls the modules one by one within the context, by plain autograd.

    Yields
    ------
    None

    Example
    -------
    >>> layers = nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 5, 1)
    >>> x = torch.rand(2, 3, 6, 7, requires_grad=True)
    >>> with one_by_one():
    ...     y = norm_relu_conv(x, *layers).square().sum()
    >>> (dx,) = torch.autograd.grad(y, x, create_graph=True)
    >>> dx.requires_grad
    True
    """
    token = _one_by_one.set(True)
    try:
        yield
    finally:
        _one_by_one.reset(token)


def norm_relu_conv(
    x: torch.Tensor,
    norm: nn.Module,
    activation: nn.Module,
    conv: nn.Module,
    padding: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    in_slices: bool = False,
) -> torch.Tensor:
    """Computes conv(activation(norm(x))), with padded frames set to zero.

    For BatchNorm2d, ReLU and Conv2d, only x and the mean and variance of each
    channel are kept for backward, which recomputes the activation. Under
    autocast the converted weight is kept too. Other modules, and modules with
    hooks, are called one by one.

    Arguments
    ---------
    x : torch.Tensor
        [N, C, T, F].
    norm : torch.nn.Module
        The batch norm.
    activation : torch.nn.Module
        The activation; it must map zero to zero.
    conv : torch.nn.Module
        The convolution.
    padding : torch.Tensor, optional
        True in padded frames of x, [N, 1, T, 1].
    weight : torch.Tensor, optional
        The convolution's weight in the dtype of autocast, if it has been
        converted.
    in_slices : bool
        Make an activation of more than 64 MiB for a few samples at a time. (On
        a CPU, backward always does.) This takes more launches.

    Returns
    -------
    torch.Tensor
        Output of the convolution.

    Example
    -------
    >>> layers = nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 5, 1)
    >>> norm_relu_conv(torch.rand(2, 3, 6, 7), *layers).shape
    torch.Size([2, 5, 6, 7])
    """
    if (
        type(norm) is not nn.BatchNorm2d
        or type(conv) is not nn.Conv2d
        or type(activation) is not nn.ReLU
        # A replay takes the path of forward, even if hooks have changed.
        or not keep(norm, lambda: _is_one_node(x, norm, activation, conv))
    ):
        return conv(activation(mask(norm(x), padding)))
    mean, variance = norm.running_mean, norm.running_var
    of_batch = norm.training or mean is None or variance is None
    if of_batch:
        mean, variance = keep(norm, lambda: _batch_statistics(x.detach(), norm))
    elif torch.is_grad_enabled():
        # Neither torch nor a kernel tells autograd of their updates.
        mean, variance = mean.clone(), variance.clone()
    kind = x.device.type
    dtype = x.dtype
    if torch.is_autocast_enabled(kind) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
    of_conv = conv.stride, conv.padding, conv.dilation, conv.groups
    return _NormReLUConv.apply(
        x,
        norm.weight,
        norm.bias,
        mean,
        variance,
        conv.weight if weight is None else weight,
        conv.bias,
        padding,
        _Settings(norm.eps, of_batch, dtype, of_conv, in_slices),
    )


def _is_one_node(
    x: torch.Tensor, norm: nn.BatchNorm2d, activation: nn.ReLU, conv: nn.Conv2d
) -> bool:
    # Without momentum the host would have to read the number of batches.
    if not norm.affine or norm.momentum is None or _one_by_one.get():
        return False
    dtypes = {x.dtype, norm.weight.dtype, conv.weight.dtype}
    autocast = torch.is_autocast_enabled(x.device.type)
    return (
        (len(dtypes) == 1 or (autocast and torch.float64 not in dtypes))
        and norm.eps > 0
        and (norm.running_mean is None) == (norm.running_var is None)
        and FORWARDS == tuple(kind.forward for kind in KINDS)
        and not are_watched((norm, activation, conv))
        and in_plain_autograd()
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
        # The modules report invalid inputs.
        and x.dim() == 4
        and x.shape[1] == norm.num_features == conv.in_channels
        and x.numel() > x.shape[1]
    )


def _batch_statistics(
    x: torch.Tensor, norm: nn.BatchNorm2d
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance of a batch; updates the running statistics."""
    running = norm.training and norm.track_running_stats
    return batch_statistics(
        x,
        norm.running_mean if running else None,
        norm.running_var if running else None,
        cast(float, norm.momentum),
        norm.num_batches_tracked if running else None,
    )


def _laid_out_like(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Returns a weight in the memory format of the input.

    Without the input's values, cuDNN takes the gradient's format from it.
    """
    if x.is_contiguous():
        return weight
    _, channels, rows, columns = weight.shape
    # Explicit strides, since a 1 x 1 kernel matches both formats.
    strides = channels * rows * columns, 1, columns * channels, channels
    return weight.new_empty_strided(weight.shape, strides).copy_(weight)


def _slices(x: torch.Tensor, dtype: torch.dtype, several: bool) -> list[slice]:
    """Samples whose activations are in memory at the same time."""
    return slices(len(x), x.numel() * dtype.itemsize if several else 0)


def _activation(
    rows: slice,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    mean: torch.Tensor,
    variance: torch.Tensor,
    eps: float,
    padding: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The activation of some samples."""
    if padding is not None:
        padding = padding[rows]
    return norm_relu(x[rows], weight, bias, mean, variance, eps, padding, dtype)


def _joined(
    parts: Iterable[torch.Tensor | None], samples: int
) -> torch.Tensor | None:
    """Concatenates slices of a batch, with one of them in memory at a time.

    None if they are None.
    """
    whole, start = None, 0
    for part in parts:
        if part is None:
            continue
        if len(part) == samples:
            return part
        if whole is None:
            # In the part's memory format.
            whole = torch.empty_like(part[:1].expand(samples, -1, -1, -1))
        whole[start : start + len(part)] = part
        start += len(part)
        # Before the next one is made.
        del part
    return whole


class _Sum:
    """A sum of the gradients of slices, None if there are none.

    It is float32 if there are several in half precision.
    """

    def __init__(self):
        self.value: torch.Tensor | None = None

    def add(self, part: torch.Tensor | None) -> None:
        if part is None:
            return
        if self.value is None:
            self.value = part
            return
        if self.value.dtype in (torch.float16, torch.bfloat16):
            self.value = self.value.float()
        self.value += part


class _Settings(NamedTuple):
    """Settings of a batch norm and a convolution."""

    eps: float
    of_batch: bool
    dtype: torch.dtype
    # Stride, padding, dilation, groups.
    of_conv: tuple[Any, Any, Any, int]
    in_slices: bool


class _NormReLUConv(torch.autograd.Function):
    """Makes the activation again in backward, from the input of the norm."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        norm_weight: torch.Tensor,
        norm_bias: torch.Tensor,
        mean: torch.Tensor,
        variance: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        padding: torch.Tensor | None,
        settings: _Settings,
    ) -> torch.Tensor:
        dtype = settings.dtype
        narrow = weight.to(dtype)
        ctx.save_for_backward(
            x, norm_weight, norm_bias, mean, variance, narrow, padding
        )
        ctx.settings = settings
        ctx.weight_dtype = weight.dtype
        ctx.bias = None if bias is None else (list(bias.shape), bias.dtype)
        if bias is not None:
            bias = bias.to(dtype)

        norm = norm_weight, norm_bias, mean, variance, settings.eps, padding

        def convolved(rows: slice) -> torch.Tensor:
            y = _activation(rows, x, *norm, dtype)
            return nn.functional.conv2d(y, narrow, bias, *settings.of_conv)

        with torch.autocast(x.device.type, enabled=False):
            rows = _slices(x, dtype, settings.in_slices)
            found = _joined(map(convolved, rows), len(x))
        return cast(torch.Tensor, found)

    @staticmethod
    # pyrefly: ignore[bad-override]
    def backward(
        ctx: Any, gradient: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        refuse_double_backward(
            "Batch norm, ReLU and convolution as one node",
            "set save_memory=False and call the network inside "
            "sb_memeff.nnet.norm_relu_conv.one_by_one()",
        )
        x, norm_weight, norm_bias, mean, variance, narrow, padding = (
            ctx.saved_tensors
        )
        eps, of_batch, dtype, of_conv, _ = ctx.settings
        stride, pad, dilation, groups = of_conv
        norm = norm_weight, norm_bias, mean, variance, eps, padding
        needs_norm = any(ctx.needs_input_grad[:3])
        needs_weight, needs_bias = ctx.needs_input_grad[5:7]
        shape, bias_dtype = ctx.bias or (None, None)
        sums = _Sum(), _Sum()

        def conv_backward(
            rows: slice, y: torch.Tensor, weight: torch.Tensor, *wanted: bool
        ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            return torch.ops.aten.convolution_backward(
                gradient[rows],
                y,
                weight,
                shape,
                stride,
                pad,
                dilation,
                False,
                [0, 0],
                groups,
                wanted,
            )

        def gradient_of_activation(rows: slice) -> torch.Tensor | None:
            y = _activation(rows, x, *norm, dtype)
            if is_on_gpu(x):
                # One after the other: the activation is freed before its
                # gradient is there, for which only the shape of the input
                # matters. (The CPU would make an input of that shape.)
                _, *others = conv_backward(
                    rows, y, narrow, False, needs_weight, needs_bias
                )
                y = y.new_empty(()).expand(y.shape)
                for_y, _, _ = conv_backward(
                    rows, y, _laid_out_like(narrow, x), needs_norm, False, False
                )
            else:
                for_y, *others = conv_backward(
                    rows, y, narrow, needs_norm, needs_weight, needs_bias
                )
            for total, part in zip(sums, others):
                total.add(part)
            return for_y

        with torch.autocast(gradient.device.type, enabled=False):
            # On a GPU the activation is freed before the gradient is there.
            rows = _slices(x, dtype, not is_on_gpu(x))
            for_y = _joined(map(gradient_of_activation, rows), len(x))
        for_weight, for_bias = (total.value for total in sums)
        found: tuple[torch.Tensor | None, ...] = None, None, None
        if for_y is not None:
            found = norm_relu_backward(for_y, x, *norm, of_batch)
        return (
            *found,
            None,
            None,
            None if for_weight is None else for_weight.to(ctx.weight_dtype),
            None if for_bias is None else for_bias.to(bias_dtype),
            None,
            None,
        )
