"""Kernels of batch norm with ReLU.

Authors
 * The sb_memeff authors 2026
"""

from unittest import mock

import torch

from sb_memeff.ops import norm_relu as plain
from sb_memeff.ops.triton import norm_relu as kernels
from tests.unittests.ops.kernel import Kernel, each

EPS = 1e-5


def _norm(g, dtype, samples, channels, frames, bands, last=False, padded=False):
    """x, weight, bias, mean, variance, and padding."""
    x = 2 + 3 * torch.randn(samples, channels, frames, bands, generator=g)
    if last:
        x = x.to(memory_format=torch.channels_last)
    weight, bias = torch.randn(2, channels, generator=g)
    padding = torch.rand(samples, 1, frames, 1, generator=g) < 0.3 * padded
    mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    return x.to(dtype), weight, bias, mean, variance, padding


def _with_gradient(g, dtype, *shape):
    x, *others = _norm(g, dtype, *shape)
    return torch.randn(x.shape, generator=g).to(dtype), x, *others


def _forward(module):
    def call(*inputs):
        *inputs, padding = inputs
        padding = padding if padding.any() else None
        dtype = inputs[0].dtype
        return [module.norm_relu(*inputs, EPS, padding, dtype)]

    return call


def _programs(count):
    """So few programs share the tiles of an input that each has several."""
    return mock.patch.object(kernels, "SPLITS", count)


def _backward(module):
    def call(gradient, *inputs, of_batch, programs=kernels.SPLITS):
        *inputs, padding = inputs
        padding = padding if padding.any() else None
        # It may be overwritten.
        gradient = gradient.clone()
        with _programs(programs):
            return list(
                module.norm_relu_backward(
                    gradient, *inputs, EPS, padding, of_batch
                )
            )

    return call


def _far_from_zero(g, dtype, samples, channels, frames, bands, last=False):
    """x, where a sum of squares would lose the variance; running statistics."""
    x = torch.randn(samples, channels, frames, bands, generator=g)
    x = 300 * torch.randn(channels, 1, 1, generator=g) + x
    if last:
        x = x.to(memory_format=torch.channels_last)
    return x.to(dtype), *torch.rand(2, channels, generator=g)


def _statistics(module):
    def call(x, mean, variance, tracked, programs=kernels.SPLITS):
        if not tracked:
            with _programs(programs):
                return list(module.batch_statistics(x, None, None, 0.3))
        running = mean.clone(), variance.clone()
        batches = torch.tensor(6, device=x.device)
        found = module.batch_statistics(x, *running, 0.3, batches)
        return [*found, *running, batches]

    return call


SHAPES = [
    (1, 1, 1, 1),
    (2, 3, 5, 7),
    (3, 40, 6, 9, True),
    (2, 5, 31, 20, False, True),
    (2, 33, 13, 20, True, True),
    # More tiles than three programs take in two rounds.
    (7, 2, 3, 4),
    (7, 3, 2, 3, True, True),
]
NORM_RELU = Kernel(
    _forward(kernels), _forward(plain), _norm, SHAPES, each(1e-6, 5e-4, 8e-3)
)
NORM_RELU_BACKWARD = Kernel(
    _backward(kernels),
    _backward(plain),
    _with_gradient,
    SHAPES[1:],
    each(2e-6, 5e-4, 8e-3),
    [
        {"of_batch": False, "programs": 3},
        {"of_batch": True, "programs": 3},
        {"of_batch": True},
    ],
)
BATCH_STATISTICS = Kernel(
    _statistics(kernels),
    _statistics(plain),
    _far_from_zero,
    [
        (1, 1, 1, 2),
        (2, 3, 5, 7),
        (3, 40, 6, 9, True),
        (2, 5, 31, 40),
        (7, 3, 8, 4, True),
        (7, 3, 7, 5),
        # As many programs as there may be are compiled ahead.
        (129, 1, 1, 2),
    ],
    # Of half precision too: sums are float32. Means are 300 deviations.
    each(1e-5, 1e-5, 1e-5),
    [{"tracked": False, "programs": 3}, {"tracked": True}],
)
