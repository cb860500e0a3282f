"""Invertible down-sampling of two streams.

Authors
 * The sb_memeff authors 2026
"""

import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F

from sb_memeff.nnet.reversible.coupling import (
    Invertible,
    Pair,
    ValueEvaluator,
    VjpEvaluator,
)
from sb_memeff.nnet.reversible.layout import is_channels_last
from sb_memeff.utils.settings import check_integer

__all__ = ["SpaceToDepth"]


class SpaceToDepth(Invertible):
    """Invertible down-sampling: moves blocks of space into channels.

    Each stream [N, C, T, F] becomes [N, C * t * f, T/t, F/f] for a factor of
    (t, f). Nothing is computed and no value is lost (Jacobsen et al.,
    "i-RevNet", 2018, sec. 3.1). The channels that come from one channel are
    adjacent, as in ``torch.nn.PixelUnshuffle``, which this module equals for
    2-D streams.

    Sizes that the factor does not divide are padded with zeros at the end
    (T becomes ceil(T/t), as in a strided convolution with padding), and the
    inverse removes the padding. A stream in channels_last stays so.

    Arguments
    ---------
    factor : int or tuple of int
        Divisor of the size of each axis after the channels.

    Raises
    ------
    ValueError
        If a factor is below 1 or not whole, or their number is not that of
        the axes.

    Example
    -------
    >>> down = SpaceToDepth(2)
    >>> down(torch.rand(1, 4, 5, 8)).shape
    torch.Size([1, 16, 3, 4])
    """

    def __init__(self, factor: int | Sequence[int] = 2):
        super().__init__()
        factors = cast(
            "Sequence[int]",
            factor if isinstance(factor, (tuple, list)) else (factor,),
        )
        for one in factors:
            check_integer("factor", one, 1)
        self.factor = factor

    def extra_repr(self) -> str:
        """Text that print(module) shows."""
        return f"factor={self.factor}"

    def _factors(self, shape: Sequence[int]) -> tuple[int, ...]:
        axes = len(shape) - 2
        if not isinstance(self.factor, (tuple, list)):
            return (cast(int, self.factor),) * axes
        if len(self.factor) != axes:
            raise ValueError(
                f"SpaceToDepth: factor {tuple(self.factor)} is for "
                f"{len(self.factor)} axes, the stream {tuple(shape)} has "
                f"{axes} after the channels."
            )
        return tuple(self.factor)

    def forward_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """See ``Invertible.forward_shape``."""
        factors = self._factors(shape)
        sizes = (math.ceil(s / f) for s, f in zip(shape[2:], factors))
        return (shape[0], shape[1] * math.prod(factors), *sizes)

    def inverse_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """See ``Invertible.inverse_shape``."""
        factors = self._factors(shape)
        sizes = (s * f for s, f in zip(shape[2:], factors))
        return (shape[0], shape[1] // math.prod(factors), *sizes)

    def downsample(self, x: torch.Tensor) -> torch.Tensor:
        """Maps a stream [N, C, T, F] to [N, C*t*f, T/t, F/f].

        Arguments
        ---------
        x : torch.Tensor
            The stream.

        Returns
        -------
        torch.Tensor
            The down-sampled stream.
        """
        factors = self._factors(x.shape)
        channels_last = is_channels_last(x)
        padding = []
        for size, f in zip(reversed(x.shape[2:]), reversed(factors)):
            # Not -size % f: in ONNX the remainder of a negative number differs.
            padding += [0, (size + f - 1) // f * f - size]
        # An exported graph must not depend on the size of the example.
        if _is_exported() or any(padding):
            x = F.pad(x, padding)
        channels = x.shape[1] * math.prod(factors)
        split = [*x.shape[:2]]
        for size, f in zip(x.shape[2:], factors):
            split += [size // f, f]
        x = x.reshape(split)
        axes = range(2, x.dim(), 2)
        inner = [a + 1 for a in axes]
        sizes = x.shape[2::2]
        if channels_last:
            x = x.permute(0, *axes, 1, *inner)
            return x.reshape(x.shape[0], *sizes, channels).movedim(-1, 1)
        x = x.permute(0, 1, *inner, *axes)
        return x.reshape(x.shape[0], channels, *sizes)

    def upsample(self, y: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """Inverts ``downsample``; also its gradient, since it is orthogonal.

        Arguments
        ---------
        y : torch.Tensor
            An output of ``downsample``.
        shape : torch.Size
            Shape of its input.

        Returns
        -------
        torch.Tensor
            The stream of that shape.
        """
        factors = self._factors(y.shape)
        n = len(factors)
        channels_last = is_channels_last(y)
        sizes = [size * f for size, f in zip(y.shape[2:], factors)]
        y = y.reshape(
            y.shape[0], y.shape[1] // math.prod(factors), *factors, *y.shape[2:]
        )
        order = [axis for i in range(n) for axis in (2 + n + i, 2 + i)]
        channels = y.shape[1]
        if channels_last:
            y = y.permute(0, *order, 1)
            y = y.reshape(y.shape[0], *sizes, channels).movedim(-1, 1)
        else:
            y = y.permute(0, 1, *order)
            y = y.reshape(y.shape[0], channels, *sizes)
        for axis, size in enumerate(shape[2:], start=2):
            y = y.narrow(axis, 0, size)
        if channels_last:
            return y.movedim(1, -1).contiguous().movedim(-1, 1)
        return y.contiguous()

    def forward_streams(
        self, x1: torch.Tensor, x2: torch.Tensor, evaluator: ValueEvaluator
    ) -> Pair:
        """Down-samples each stream."""
        return self.downsample(x1), self.downsample(x2)

    def inverse_streams(
        self,
        y1: torch.Tensor,
        y2: torch.Tensor,
        evaluator: ValueEvaluator,
        shape: tuple[int, ...],
    ) -> Pair:
        """Up-samples each stream."""
        return self.upsample(y1, shape), self.upsample(y2, shape)

    def backward_streams(
        self,
        y: list[torch.Tensor],
        dy: list[torch.Tensor],
        evaluator: VjpEvaluator,
        shape: tuple[int, ...],
    ) -> tuple[Pair, Pair]:
        """Up-samples the streams and their gradients."""
        # Each is freed before the next one is made. A view would keep its base,
        # and the block before would not overwrite it.
        x1 = self.upsample(y.pop(0), shape).detach()
        x2 = self.upsample(y.pop(0), shape).detach()
        d1 = self.upsample(dy.pop(0), shape).detach()
        d2 = self.upsample(dy.pop(0), shape).detach()
        return (x1, x2), (d1, d2)


def _is_exported() -> bool:
    return torch.compiler.is_exporting() or torch.jit.is_tracing()
