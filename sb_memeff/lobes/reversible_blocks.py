"""Layers inside the reversible residual networks.

Authors
 * The sb_memeff authors 2026
"""

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import nn

from sb_memeff.lobes.network_input import for_tensor_cores
from sb_memeff.lobes.residual import conv1x1, conv3x3, make_activation
from sb_memeff.nnet.norm_relu_conv import KINDS, norm_relu_conv
from sb_memeff.nnet.padding import mask
from sb_memeff.nnet.statistics_pooling import TemporalStatisticsPooling
from sb_memeff.nnet.weight_casts import cast_weights

__all__ = ["NormActConv", "PooledStatistics", "ResidualBody", "Stem"]


class NormActConv(nn.Module):
    """Batch norm, activation and convolution; padded frames become zero.

    Arguments
    ---------
    in_channels : int
        Channels of the input.
    conv : torch.nn.Module
        The convolution.
    activation : type
        Class of the activation; it must map zero to zero.

    Example
    -------
    >>> import torch
    >>> NormActConv(4, conv3x3(4, 8), nn.ReLU)(torch.rand(1, 4, 6, 6)).shape
    torch.Size([1, 8, 6, 6])
    """

    def __init__(
        self,
        in_channels: int,
        conv: nn.Conv2d,
        activation: Callable[..., nn.Module],
        in_slices: bool = False,
    ):
        super().__init__()
        self.in_slices = in_slices
        self.norm = nn.BatchNorm2d(in_channels)
        self.activation = make_activation(activation)
        self.conv = conv

    @property
    def is_fusible(self) -> bool:
        """Whether its modules are of the kinds that are computed as one.

        Others, such as SyncBatchNorm, are called one by one.
        """
        return (
            tuple(map(type, (self.norm, self.activation, self.conv))) == KINDS
        )

    def forward(
        self,
        x: torch.Tensor,
        padding: torch.Tensor | None = None,
        weight: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Applies the layer.

        Arguments
        ---------
        x : torch.Tensor
            [N, C, T, F].
        padding : torch.Tensor, optional
            Padded frames of x, [N, 1, T, 1].
        weight : torch.Tensor, optional
            The convolution's weight, see ``norm_relu_conv``.

        Returns
        -------
        torch.Tensor
            The output of the convolution.
        """
        return norm_relu_conv(
            x,
            self.norm,
            self.activation,
            self.conv,
            padding,
            weight,
            self.in_slices,
        )


def basic_convolutions(
    in_channels: int,
    channels: int,
    out_channels: int,
    stride: int | tuple[int, int],
) -> list[nn.Conv2d]:
    """Two 3x3 convolutions."""
    return [
        conv3x3(in_channels, channels, stride),
        conv3x3(channels, out_channels),
    ]


def bottleneck_convolutions(
    in_channels: int,
    channels: int,
    out_channels: int,
    stride: int | tuple[int, int],
) -> list[nn.Conv2d]:
    """1x1, 3x3 and 1x1 convolutions."""
    return [
        conv1x1(in_channels, channels),
        conv3x3(channels, channels, stride),
        conv1x1(channels, out_channels),
    ]


def inverted_convolutions(
    in_channels: int,
    channels: int,
    out_channels: int,
    stride: int | tuple[int, int],
) -> list[nn.Conv2d]:
    """1x1, depthwise 3x3 and 1x1 convolutions."""
    return [
        conv1x1(in_channels, channels),
        conv3x3(channels, channels, stride, groups=channels),
        conv1x1(channels, out_channels),
    ]


BODIES = {
    "basic": basic_convolutions,
    "bottleneck": bottleneck_convolutions,
    "inverted_bottleneck": inverted_convolutions,
}


class ResidualBody(nn.Module):
    """A residual function without its shortcut: the f or g of a coupling.

    Pre-activated (He et al., "Identity Mappings", 2016, and Gomez et al.,
    2017): an activation after the sum could not be inverted.

    Arguments
    ---------
    block : str
        "basic" (two 3x3 convolutions), "bottleneck" (1x1, 3x3, 1x1) or
        "inverted_bottleneck" (1x1, depthwise 3x3, 1x1).
    in_channels : int
        Channels of the input stream.
    channels : int
        Channels inside.
    out_channels : int
        Channels of the output stream.
    stride : int or tuple of int
        Stride of the first 3x3 convolution.
    stage : int
        Index of the output's padding mask.
    activation : type
        Class of the activation.

    Example
    -------
    >>> import torch
    >>> body = ResidualBody("bottleneck", 8, 4, 8)
    >>> body(torch.rand(1, 8, 20, 10)).shape
    torch.Size([1, 8, 20, 10])
    """

    def __init__(
        self,
        block: str,
        in_channels: int,
        channels: int,
        out_channels: int,
        stride: int | tuple[int, int] = 1,
        stage: int = 0,
        activation: Callable[..., nn.Module] = nn.ReLU,
    ):
        super().__init__()
        convs = BODIES[block](in_channels, channels, out_channels, stride)
        self.layers = nn.ModuleList(
            # Memory peaks in the last layer's replay.
            NormActConv(
                conv.in_channels, conv, activation, in_slices=conv is convs[-1]
            )
            for conv in convs
        )
        # The layers before a strided one belong to the stage before.
        first = stage if stride in (1, (1, 1)) else stage - 1
        self.stages = [first] * (len(convs) - 1) + [stage]

    def forward(
        self, x: torch.Tensor, masks: Sequence[torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Applies the function.

        Arguments
        ---------
        x : torch.Tensor
            A stream [N, in_channels, T, F].
        masks : list of torch.Tensor, optional
            Padded frames of each stage.

        Returns
        -------
        torch.Tensor
            [N, out_channels, T', F'], zero in padded frames.
        """
        layers = cast("Sequence[NormActConv]", self.layers)
        weights: Sequence[torch.Tensor | None] = [None for _ in layers]
        if all(layer.is_fusible for layer in layers):
            weights = cast_weights([layer.conv for layer in layers])
        for layer, weight, stage in zip(layers, weights, self.stages):
            padding = None if masks is None else masks[stage]
            x = layer(x, padding, weight)
        # There is at least one layer.
        # pyrefly: ignore[unbound-name]
        return mask(x, padding)


class Stem(nn.Module):
    """A 3x3 convolution from features to the two streams.

    The first coupling normalises, so that backward needs the features only.

    Arguments
    ---------
    channels : int
        Channels of both streams together.
    stride : int or tuple of int
        Stride of the convolution.

    Example
    -------
    >>> import torch
    >>> Stem(8)(torch.rand(2, 50, 80)).shape
    torch.Size([2, 8, 50, 80])
    """

    def __init__(self, channels: int, stride: int | tuple[int, int] = 1):
        super().__init__()
        self.conv = conv3x3(1, channels, stride)

    def forward(
        self, x: torch.Tensor, masks: Sequence[torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Applies the stem.

        Arguments
        ---------
        x : torch.Tensor
            Features [N, T, F].
        masks : list of torch.Tensor, optional
            Padded frames of each stage.

        Returns
        -------
        torch.Tensor
            [N, channels, T, F].
        """
        x = x.unsqueeze(1)
        if masks is None:
            return for_tensor_cores(self.conv(x))
        return for_tensor_cores(
            mask(self.conv(x.masked_fill(masks[0], 0.0)), masks[1])
        )


class PooledStatistics(nn.Module):
    """Normalises the streams and pools them over time.

    Arguments
    ---------
    in_channels : int
        Channels of both streams together.
    channels : int, optional
        Reduce them to this number by a 1x1 convolution first.
    activation : type
        Class of the activation.

    Example
    -------
    >>> import torch
    >>> PooledStatistics(8, 4)(torch.rand(2, 8, 20, 10)).shape
    torch.Size([2, 80])
    """

    def __init__(
        self,
        in_channels: int,
        channels: int | None = None,
        activation: Callable[..., nn.Module] = nn.ReLU,
    ):
        super().__init__()
        self.narrow: NormActConv | None = None
        if channels is not None:
            self.narrow = NormActConv(
                in_channels, conv1x1(in_channels, channels), activation
            )
        self.norm = nn.BatchNorm2d(channels or in_channels)
        self.activation = make_activation(activation)
        self.pooling = TemporalStatisticsPooling()

    def forward(
        self, x: torch.Tensor, masks: Sequence[torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Pools the streams.

        Arguments
        ---------
        x : torch.Tensor
            [N, in_channels, T, F].
        masks : list of torch.Tensor, optional
            Padded frames of each stage.

        Returns
        -------
        torch.Tensor
            [N, 2 * channels * F].
        """
        padding = None if masks is None else masks[-1]
        if self.narrow is not None:
            x = self.narrow(x, padding)
        x = self.activation(self.norm(x))
        return self.pooling(x, padding)
