"""Deep residual networks for speaker recognition.

The networks that WeSpeaker publishes and that the memory-efficient ones are
compared with: He et al., "Deep Residual Learning for Image Recognition"
(2016), with a 3x3 stem without pooling and temporal statistics pooling.

Authors
 * The sb_memeff authors 2026
"""

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import nn

from sb_memeff.lobes.features import check_features
from sb_memeff.lobes.presets import Presets
from sb_memeff.nnet.padding import mask, padding_masks
from sb_memeff.nnet.pooling import TemporalStatisticsPooling

__all__ = ["BasicBlock", "Bottleneck", "Embedding", "ResNet", "StagedNetwork"]


def conv3x3(
    in_channels: int,
    out_channels: int,
    stride: int | tuple[int, int] = 1,
    groups: int = 1,
) -> nn.Conv2d:
    """A 3x3 convolution that keeps the size (up to its stride)."""
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
    """Strides as (time, frequency); one number stands for both.

    Arguments
    ---------
    strides : list
        Whole numbers or pairs of them.

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
        list[tuple[int, int]],
        [
            tuple(stride)
            if isinstance(stride, (list, tuple))
            else (stride, stride)
            for stride in strides
        ],
    )


def make_activation(kind: Callable[..., nn.Module]) -> nn.Module:
    """An activation, in place where it can be.

    Batch norm keeps its input and not its output, so that the output may be
    overwritten and one tensor less is stored.
    """
    if "inplace" in inspect.signature(kind).parameters:
        return kind(inplace=True)
    return kind()


class _ResidualBlock(nn.Module):
    """activation(body(x) + shortcut(x)); subclasses set up the body."""

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
        """The sum and its activation, padded frames zero."""
        x = x if self.shortcut is None else self.shortcut(x)
        return self.activation(mask(body + x, padding))


class BasicBlock(_ResidualBlock):
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
        """Runs the block.

        Arguments
        ---------
        x : torch.Tensor
            [N, C, T, F], zero in padded frames.
        padding : torch.Tensor, optional
            Padded frames of the output, [N, 1, T', 1].
        padding_in : torch.Tensor, optional
            Not needed here; Bottleneck needs it.

        Returns
        -------
        torch.Tensor
            [N, channels, T', F'].
        """
        y = self.activation(mask(self.bn1(self.conv1(x)), padding))
        return self.join(x, self.bn2(self.conv2(y)), padding)


class Bottleneck(_ResidualBlock):
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
        """Runs the block.

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


class Embedding(nn.Module):
    """From pooled statistics to the embedding.

    Normalised before and after, as in SpeechBrain's ResNet: an additive
    margin wants centred embeddings. Not affine, so that the network has the
    published number of parameters.

    Arguments
    ---------
    in_neurons : int
        Number of statistics.
    lin_neurons : int
        Size of the embedding.

    Example
    -------
    >>> import torch
    >>> Embedding(20, 8)(torch.rand(4, 20)).shape
    torch.Size([4, 8])
    """

    def __init__(self, in_neurons: int, lin_neurons: int):
        super().__init__()
        self.norm_stats = nn.BatchNorm1d(in_neurons, affine=False)
        self.fc_embed = nn.Linear(in_neurons, lin_neurons)
        self.norm_embed = nn.BatchNorm1d(lin_neurons, affine=False)

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

    What the ResNets here have in common; they differ in their stages.

    Arguments
    ---------
    input_size : int
        Number of features per frame.
    activation : type
        Class of the activations; they must leave zero zero (padding).
    stem_channels : int
        Channels of the stem.
    channels : list of int
        Channels that leave each of the four stages.
    block_sizes : list of int
        Residual blocks in each stage.
    strides : list
        Stride of each stage: a number, or a pair (time, frequency).
    lin_neurons : int
        Size of the embedding.
    make_stage : callable
        (in_channels, channels, size, stride, activation) to a list of
        modules, each called like ``Bottleneck``.
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
    ):
        super().__init__()
        strides = stride_pairs(strides)
        self.input_size = input_size
        self.strides = strides
        self.conv1 = conv3x3(1, stem_channels)
        self.bn1 = nn.BatchNorm2d(stem_channels)
        self.activation = make_activation(activation)
        width = stem_channels
        self.stages = nn.ModuleList()
        for out, size, stride in zip(
            channels, block_sizes, strides, strict=True
        ):
            stage = make_stage(width, out, size, stride, activation)
            self.stages.append(nn.ModuleList(stage))
            width = out
        self.pooling = TemporalStatisticsPooling()
        pooled = 2 * width * bands(input_size, strides)
        self.embedding = Embedding(pooled, lin_neurons)
        initialise(self)
        for block in self.modules():
            if isinstance(block, _ResidualBlock):
                # Each block begins as its shortcut (Goyal et al., 2017).
                nn.init.zeros_(
                    cast(BasicBlock | Bottleneck, block).last_norm.weight
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
        x = self.activation(mask(self.bn1(self.conv1(x)), masks[0]))
        for stage, blocks in enumerate(
            cast(Iterable[nn.ModuleList], self.stages)
        ):
            before = masks[stage]
            for block in blocks:
                x = block(x, masks[stage + 1], before)
                before = masks[stage + 1]
        return self.embedding(self.pooling(x, masks[-1]))


BLOCKS = {"basic": BasicBlock, "bottleneck": Bottleneck}


def residual_stage(
    kind: type[BasicBlock] | type[Bottleneck],
    in_channels: int,
    channels: int,
    size: int,
    stride: int | tuple[int, int],
    activation: Callable[..., nn.Module],
) -> list[nn.Module]:
    """Residual blocks, the first of which has the stride.

    Arguments
    ---------
    kind : type
        BasicBlock or Bottleneck.
    in_channels : int
        Channels before the stage.
    channels : int
        Channels after it.
    size : int
        Number of blocks.
    stride : int or tuple of int
        Stride of the stage.
    activation : type
        Class of the activations.

    Returns
    -------
    list of torch.nn.Module
        The blocks.
    """
    inside = channels // kind.expansion
    first = kind(in_channels, inside, stride, activation)
    others = (kind(channels, inside, 1, activation) for _ in range(size - 1))
    return [first, *others]


class ResNet(StagedNetwork):
    """Residual network with temporal statistics pooling.

    Called like ``speechbrain.lobes.models.ResNet.ResNet``. Unlike that class
    it respects ``lengths``: what padded frames hold, NaN included, reaches
    neither the embeddings nor a gradient, and in eval mode an utterance gives
    the same embedding whatever it is padded to. In training mode padded
    frames count as zeros in the statistics of batch norm.

    ========= =============== ================== ==========
    preset    block           block_sizes        parameters
    ========= =============== ================== ==========
    ResNet34  basic           3, 4, 6, 3             6.63 M
    ResNet101 bottleneck      3, 4, 23, 3            15.9 M
    ResNet152 bottleneck      3, 8, 36, 3            19.8 M
    ResNet221 bottleneck      6, 16, 48, 3           23.8 M
    ResNet293 bottleneck      10, 20, 64, 3          28.6 M
    ========= =============== ================== ==========

    Arguments
    ---------
    input_size : int
        Number of features per frame.
    activation : type
        Class of the activations; they must leave zero zero (padding).
    channels : list of int
        Channels that leave each of the four stages.
    block_sizes : list of int
        Residual blocks in each stage.
    strides : list
        Stride of each stage: a number, or a pair (time, frequency).
    lin_neurons : int
        Size of the embedding.
    block : str
        "basic" or "bottleneck".

    Raises
    ------
    ValueError
        If an argument does not fit the others; for an unknown preset.

    Example
    -------
    >>> import torch
    >>> net = ResNet.from_preset("ResNet34", base_channels=4)
    >>> net(torch.rand(2, 40, 80), lengths=torch.tensor([1.0, 0.5])).shape
    torch.Size([2, 256])
    """

    PRESETS = {
        "ResNet34": {"block": "basic", "block_sizes": [3, 4, 6, 3]},
        "ResNet101": {"block": "bottleneck", "block_sizes": [3, 4, 23, 3]},
        "ResNet152": {"block": "bottleneck", "block_sizes": [3, 8, 36, 3]},
        "ResNet221": {"block": "bottleneck", "block_sizes": [6, 16, 48, 3]},
        "ResNet293": {"block": "bottleneck", "block_sizes": [10, 20, 64, 3]},
    }

    @classmethod
    def preset_arguments(
        cls, name: str, base_channels: int = 32, **overrides: Any
    ) -> dict[str, Any]:
        """The arguments that a preset stands for.

        Arguments
        ---------
        name : str
            A key of PRESETS.
        base_channels : int
            Channels inside the blocks of the first stage; each further stage
            has twice as many. The published networks have 32.
        **overrides : dict
            Arguments of the class that shall differ.

        Returns
        -------
        dict
            Keyword arguments of the class.
        """
        preset = cls.PRESETS[name]
        width = base_channels * BLOCKS[preset["block"]].expansion
        channels = [width * 2**stage for stage in range(4)]
        return {"channels": channels, **preset, **overrides}

    def __init__(
        self,
        input_size: int = 80,
        activation: Callable[..., nn.Module] = nn.ReLU,
        channels: Sequence[int] = (32, 64, 128, 256),
        block_sizes: Sequence[int] = (3, 4, 6, 3),
        strides: Sequence[int | Sequence[int]] = (1, 2, 2, 2),
        lin_neurons: int = 256,
        block: Literal["basic", "bottleneck"] = "basic",
    ):
        check_block(block, BLOCKS)
        check_stages(strides, channels=channels, block_sizes=block_sizes)
        kind = BLOCKS[block]
        if any(c % kind.expansion for c in channels):
            raise ValueError(
                f"{block} blocks need channels that {kind.expansion} divides, "
                f"got {list(channels)}."
            )
        super().__init__(
            input_size,
            activation,
            channels[0] // kind.expansion,
            channels,
            block_sizes,
            strides,
            lin_neurons,
            partial(residual_stage, kind),
        )


def bands(input_size: int, strides: Sequence[tuple[int, int]]) -> int:
    """Bands that the last stage has.

    Arguments
    ---------
    input_size : int
        Number of features per frame.
    strides : list of tuple
        (time, frequency) of each stage.

    Returns
    -------
    int
        Their number; a strided convolution with padding rounds up.
    """
    return math.ceil(input_size / math.prod(f for _, f in strides))


def check_block(block: str, known: Iterable[str]) -> None:
    """A known block.

    Arguments
    ---------
    block : str
        Name of the block.
    known : iterable of str
        The names there are.

    Raises
    ------
    ValueError
        If it is none of them.
    """
    if block not in known:
        raise ValueError(
            f"block must be one of {', '.join(known)}, got {block!r}."
        )


def check_stages(
    strides: Sequence[int | Sequence[int]], **sizes: Sequence[int]
) -> None:
    """Four stages of positive sizes.

    Arguments
    ---------
    strides : list
        Stride of each stage: a number, or a pair (time, frequency).
    **sizes : dict
        Name to a list of int, one for each stage (channels, block_sizes).

    Raises
    ------
    ValueError
        If something does not fit; the message names it.
    """
    for name, values in sizes.items():
        if len(values) != 4 or any(v < 1 for v in values):
            raise ValueError(
                f"{name} must hold four positive numbers, one for each "
                f"stage, got {list(values)}."
            )
    pairs = stride_pairs(strides)
    whole = all(isinstance(s, int) and s > 0 for pair in pairs for s in pair)
    if not whole or [len(pair) for pair in pairs] != [2] * 4:
        raise ValueError(
            f"strides must hold four positive numbers or pairs (time, "
            f"frequency), one for each stage, got {list(strides)}."
        )


def initialise(network: nn.Module) -> None:
    """He initialisation of the convolutions, as in SpeechBrain's ResNet.

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
