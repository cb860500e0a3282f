"""Parts that the residual networks share.

Authors
 * The sb_memeff authors 2026
"""

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from typing import cast

import torch
from torch import nn

from sb_memeff.lobes.network_input import check_features, for_tensor_cores
from sb_memeff.lobes.presets import Presets
from sb_memeff.nnet.padding import mask, padding_masks
from sb_memeff.nnet.statistics_pooling import TemporalStatisticsPooling
from sb_memeff.utils.settings import check_integer, check_switches

__all__ = [
    "BasicBlock",
    "Bottleneck",
    "EmbeddingHead",
    "ResidualBlock",
    "StagedNetwork",
    "check_block",
    "check_stages",
    "conv1x1",
    "conv3x3",
    "initialise",
    "make_activation",
    "output_bands",
    "stride_pairs",
]


def conv3x3(
    in_channels: int,
    out_channels: int,
    stride: int | tuple[int, int] = 1,
    groups: int = 1,
) -> nn.Conv2d:
    """A 3x3 convolution that keeps the size, but for its stride."""
    return nn.Conv2d(
        in_channels,
        out_channels,
        3,
        stride=stride,
        padding=1,
        groups=groups,
        bias=False,
    )


def conv1x1(
    in_channels: int, out_channels: int, stride: int | tuple[int, int] = 1
) -> nn.Conv2d:
    """A pointwise convolution."""
    return nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)


def stride_pairs(
    strides: Sequence[int | Sequence[int]],
) -> list[tuple[int, int]]:
    """Converts strides to pairs (time, frequency).

    Arguments
    ---------
    strides : list
        Integers, each for both axes, or pairs.

    Returns
    -------
    list of tuple
        One pair for each stage.

    Example
    -------
    >>> stride_pairs([1, (1, 2)])
    [(1, 1), (1, 2)]
    """
    return cast(
        "list[tuple[int, int]]",
        [
            tuple(stride)
            if isinstance(stride, (list, tuple))
            else (stride, stride)
            for stride in strides
        ],
    )


def make_activation(kind: Callable[..., nn.Module]) -> nn.Module:
    """Creates an activation, in place if it has that option.

    Batch norm stores its input and not its output. The output may therefore be
    overwritten, which saves one tensor.
    """
    if "inplace" in inspect.signature(kind).parameters:
        return kind(inplace=True)
    return kind()


class ResidualBlock(nn.Module):
    """activation(body(x) + shortcut(x)); subclasses define the body."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int | tuple[int, int],
        activation: Callable[..., nn.Module],
    ):
        super().__init__()
        self.activation = make_activation(activation)
        self.shortcut: nn.Module | None = None
        if stride not in (1, (1, 1)) or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                conv1x1(in_channels, out_channels, stride),
                nn.BatchNorm2d(out_channels),
            )

    def join(
        self, x: torch.Tensor, body: torch.Tensor, padding: torch.Tensor | None
    ) -> torch.Tensor:
        """The activation of the sum, with zeros in padded frames."""
        x = x if self.shortcut is None else self.shortcut(x)
        return self.activation(mask(body + x, padding))


class BasicBlock(ResidualBlock):
    """Two 3x3 convolutions and a shortcut.

    Arguments
    ---------
    in_channels : int
        Channels of the input.
    channels : int
        Channels inside.
    stride : int or tuple of int
        Stride of the first convolution and of the shortcut.
    activation : type
        Class of the activation.

    Example
    -------
    >>> import torch
    >>> BasicBlock(8, 16, stride=2)(torch.rand(1, 8, 20, 10)).shape
    torch.Size([1, 16, 10, 5])
    """

    expansion = 1

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int | tuple[int, int] = 1,
        activation: Callable[..., nn.Module] = nn.ReLU,
    ):
        super().__init__(in_channels, channels, stride, activation)
        self.conv1 = conv3x3(in_channels, channels, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv3x3(channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        """The normalisation just before the sum."""
        return self.bn2

    def forward(
        self,
        x: torch.Tensor,
        padding: torch.Tensor | None = None,
        padding_in: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Applies the block.

        Arguments
        ---------
        x : torch.Tensor
            [N, C, T, F], zero in padded frames.
        padding : torch.Tensor, optional
            Padded frames of the output, [N, 1, T', 1].
        padding_in : torch.Tensor, optional
            Ignored; Bottleneck needs it.

        Returns
        -------
        torch.Tensor
            [N, channels, T', F'].
        """
        y = self.activation(mask(self.bn1(self.conv1(x)), padding))
        return self.join(x, self.bn2(self.conv2(y)), padding)


class Bottleneck(ResidualBlock):
    """1x1, 3x3 and 1x1 convolutions and a shortcut.

    Arguments
    ---------
    in_channels : int
        Channels of the input.
    channels : int
        Channels of the 3x3 convolution.
    stride : int or tuple of int
        Stride of the 3x3 convolution and of the shortcut.
    activation : type
        Class of the activation.
    out_channels : int, optional
        Channels of the output; by default four times ``channels``.
    groups : int
        Groups of the 3x3 convolution.

    Example
    -------
    >>> import torch
    >>> Bottleneck(8, 16, stride=2)(torch.rand(1, 8, 20, 10)).shape
    torch.Size([1, 64, 10, 5])
    """

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int | tuple[int, int] = 1,
        activation: Callable[..., nn.Module] = nn.ReLU,
        out_channels: int | None = None,
        groups: int = 1,
    ):
        out_channels = out_channels or channels * self.expansion
        super().__init__(in_channels, out_channels, stride, activation)
        self.conv1 = conv1x1(in_channels, channels)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv3x3(channels, channels, stride, groups)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = conv1x1(channels, out_channels)
        self.bn3 = nn.BatchNorm2d(out_channels)

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        """The normalisation just before the sum."""
        return self.bn3

    def forward(
        self,
        x: torch.Tensor,
        padding: torch.Tensor | None = None,
        padding_in: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Applies the block.

        Arguments
        ---------
        x : torch.Tensor
            [N, C, T, F].
        padding : torch.Tensor, optional
            Padded frames of the output, [N, 1, T', 1].
        padding_in : torch.Tensor, optional
            Padded frames of the input, where the stride makes them differ.

        Returns
        -------
        torch.Tensor
            [N, out_channels, T', F'].
        """
        if padding_in is None:
            padding_in = padding
        y = self.activation(mask(self.bn1(self.conv1(x)), padding_in))
        y = self.activation(self.bn2(self.conv2(y)))
        return self.join(x, self.bn3(self.conv3(y)), padding)


class EmbeddingHead(nn.Module):
    """Maps pooled statistics to the embedding.

    Batch norms before and after, as in SpeechBrain's ResNet: an additive
    margin needs centred embeddings. They are not affine, so that the network
    has the published number of parameters.

    Arguments
    ---------
    in_neurons : int
        Number of statistics.
    lin_neurons : int
        Size of the embedding.
    norms : bool
        If False, without the batch norms.

    Example
    -------
    >>> import torch
    >>> EmbeddingHead(20, 8)(torch.rand(4, 20)).shape
    torch.Size([4, 8])
    """

    def __init__(self, in_neurons: int, lin_neurons: int, norms: bool = True):
        super().__init__()
        norm = nn.BatchNorm1d if norms else nn.Identity
        self.norm_stats = norm(in_neurons, affine=False)
        check_integer("lin_neurons", lin_neurons, 1)
        self.fc_embed = nn.Linear(in_neurons, lin_neurons)
        self.norm_embed = norm(lin_neurons, affine=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Computes the embedding.

        Arguments
        ---------
        x : torch.Tensor
            Statistics [N, in_neurons].

        Returns
        -------
        torch.Tensor
            Embeddings [N, lin_neurons].
        """
        # Statistics are float32 at least; a network in half precision is not.
        x = self.norm_stats(x.to(self.fc_embed.weight.dtype))
        return self.norm_embed(self.fc_embed(x))


class StagedNetwork(Presets, nn.Module):
    """Stem, four stages, temporal statistics pooling, embedding.

    The base of the ResNets here, which differ in their stages.

    Arguments
    ---------
    input_size : int
        Number of features per frame.
    activation : type
        Class of the activations; they must map zero to zero (padding).
    stem_channels : int
        Channels of the stem.
    channels : list of int
        Output channels of each of the four stages.
    block_sizes : list of int
        Residual blocks in each stage.
    strides : list
        Stride of each stage: a number, or a pair (time, frequency).
    lin_neurons : int
        Size of the embedding.
    make_stage : callable
        (in_channels, channels, size, stride, activation) to a list of
        modules, each called like ``Bottleneck``.
    published_head : bool
        Pooling and embedding as in WeSpeaker: unbiased standard deviation, no
        batch norm around the embedding.
    """

    def __init__(
        self,
        input_size: int,
        activation: Callable[..., nn.Module],
        stem_channels: int,
        channels: Sequence[int],
        block_sizes: Sequence[int],
        strides: Sequence[int | Sequence[int]],
        lin_neurons: int,
        make_stage: Callable[..., list[nn.Module]],
        published_head: bool = False,
    ):
        super().__init__()
        check_switches(published_head=published_head)
        check_integer("input_size", input_size, 1)
        strides = stride_pairs(strides)
        self.input_size = input_size
        self.strides = strides
        self.conv1 = conv3x3(1, stem_channels)
        self.bn1 = nn.BatchNorm2d(stem_channels)
        self.activation = make_activation(activation)
        width = stem_channels
        self.stages = nn.ModuleList()
        for out, size, stride in zip(channels, block_sizes, strides):
            stage = make_stage(width, out, size, stride, activation)
            self.stages.append(nn.ModuleList(stage))
            width = out
        self.pooling = TemporalStatisticsPooling(correction=int(published_head))
        pooled = 2 * width * output_bands(input_size, strides)
        self.embedding = EmbeddingHead(
            pooled, lin_neurons, norms=not published_head
        )
        initialise(self)
        for block in self.modules():
            if isinstance(block, ResidualBlock):
                # Each block begins as its shortcut (Goyal et al., 2017).
                nn.init.zeros_(
                    cast("BasicBlock | Bottleneck", block).last_norm.weight
                )

    def forward(
        self, x: torch.Tensor, lengths: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Computes embeddings.

        Arguments
        ---------
        x : torch.Tensor
            Features [N, T, input_size].
        lengths : torch.Tensor, optional
            Relative lengths [N].

        Returns
        -------
        torch.Tensor
            Embeddings [N, lin_neurons].

        Raises
        ------
        TypeError
            If the dtype of x or of lengths does not fit.
        ValueError
            If the shape of x does not fit, or lengths are not relative.
        """
        check_features(x, self.input_size, self.conv1.weight.dtype)
        masks = padding_masks(lengths, x, [1, *(t for t, _ in self.strides)])
        masks = masks or [None] * 5
        x = x.unsqueeze(1)
        if masks[0] is not None:
            x = x.masked_fill(masks[0], 0.0)
        x = for_tensor_cores(self.conv1(x))
        x = self.activation(mask(self.bn1(x), masks[0]))
        for stage, blocks in enumerate(
            cast("Iterable[nn.ModuleList]", self.stages)
        ):
            padding_in, padding = masks[stage], masks[stage + 1]
            for block in blocks:
                x = block(x, padding, padding_in)
                padding_in = padding
        return self.embedding(self.pooling(x, masks[-1]))


def output_bands(input_size: int, strides: Sequence[tuple[int, int]]) -> int:
    """Number of frequency bands after the last stage.

    Arguments
    ---------
    input_size : int
        Number of features per frame.
    strides : list of tuple
        (time, frequency) of each stage.

    Returns
    -------
    int
        The number; a strided convolution with padding rounds up.
    """
    return math.ceil(input_size / math.prod(f for _, f in strides))


def check_block(block: str, known: Iterable[str]) -> None:
    """Checks the name of a block.

    Arguments
    ---------
    block : str
        Name of the block.
    known : iterable of str
        The valid names.

    Raises
    ------
    ValueError
        If it is not valid.
    """
    if block not in known:
        raise ValueError(
            f"block must be one of {', '.join(known)}, got {block!r}."
        )


def _are_counts(values: object, number: int) -> bool:
    return (
        isinstance(values, (list, tuple))
        and len(values) == number
        and all(
            isinstance(v, int) and not isinstance(v, bool) and v > 0
            for v in values
        )
    )


def check_stages(
    strides: Sequence[int | Sequence[int]], **sizes: Sequence[int]
) -> None:
    """Checks that there are four stages of positive sizes.

    Arguments
    ---------
    strides : list
        Stride of each stage: a number, or a pair (time, frequency).
    **sizes : dict
        Lists of int, one for each stage, by name (channels, block_sizes).

    Raises
    ------
    ValueError
        If a size is not valid; the message names it.
    """
    for name, values in sizes.items():
        if not _are_counts(values, 4):
            raise ValueError(
                f"{name} must hold four positive numbers, one for each "
                f"stage, got {values!r}."
            )
    if (
        not isinstance(strides, (list, tuple))
        or not all(_are_counts(pair, 2) for pair in stride_pairs(strides))
        or len(strides) != 4
    ):
        raise ValueError(
            f"strides must hold four positive numbers or pairs (time, "
            f"frequency), one for each stage, got {strides!r}."
        )


def initialise(network: nn.Module) -> None:
    """Initialises convolutions (He et al.), as SpeechBrain's ResNet does.

    Arguments
    ---------
    network : torch.nn.Module
        Its 2-D convolutions are initialised in place.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(
                module.weight, mode="fan_out", nonlinearity="relu"
            )
