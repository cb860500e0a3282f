"""Reversible ResNets for speaker recognition: depth costs no memory.

Each residual function of the vanilla network becomes f or g of an additive
coupling (``sb_memeff.nnet.reversible``), so a coupling replaces two residual
blocks. Two kinds, after Liu and Qian, "Memory-Efficient Training for Deep
Speaker Embedding Learning in Speaker Verification" (2024):

* Type I, ``downsampling="strided"``, partially reversible: strided
  transitions between the stages. They cannot be undone, so each stage's last
  output is stored.
* Type II, ``downsampling="invertible"``, fully reversible: space-to-depth
  between the stages. Only the last output is stored.

Stem, transitions and pooling stand in the same memory-saving chain and are
recomputed.

Authors
 * The sb_memeff authors 2026
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import nn

from sb_memeff.lobes.features import check_features
from sb_memeff.lobes.models.ResNet import (
    BLOCKS,
    Embedding,
    bands,
    check_block,
    check_stages,
    conv1x1,
    conv3x3,
    initialise,
    make_activation,
    stride_pairs,
)
from sb_memeff.lobes.presets import Presets
from sb_memeff.nnet.padding import mask, padding_masks
from sb_memeff.nnet.pooling import TemporalStatisticsPooling
from sb_memeff.nnet.reversible import (
    AdditiveCoupling,
    ReversibleSequence,
    SpaceToDepth,
)

if TYPE_CHECKING:
    from sb_memeff.lobes.models.RevDFResNet import StridedConvolution

__all__ = ["ReversibleNetwork", "RevResNet"]


class NormActConv(nn.Module):
    """Batch norm, activation, convolution; padded frames count as zero.

    Arguments
    ---------
    in_channels : int
        Channels of the input.
    conv : torch.nn.Module
        The convolution.
    activation : type
        Class of the activation; it must leave zero zero.

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
    ):
        super().__init__()
        self.norm = nn.BatchNorm2d(in_channels)
        self.activation = make_activation(activation)
        self.conv = conv

    def forward(
        self, x: torch.Tensor, padding: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Runs the layer.

        Arguments
        ---------
        x : torch.Tensor
            [N, C, T, F].
        padding : torch.Tensor, optional
            Padded frames of x, [N, 1, T, 1].

        Returns
        -------
        torch.Tensor
            What the convolution returns.
        """
        return self.conv(self.activation(mask(self.norm(x), padding)))


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
    2017), so that nothing follows the sum, which could not be undone.

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
        Which of the padding masks belongs to the output.
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
            NormActConv(conv.in_channels, conv, activation) for conv in convs
        )
        # Up to its strided convolution the body is still in the stage before.
        before = stage if stride in (1, (1, 1)) else stage - 1
        self.stages = [before] * (len(convs) - 1) + [stage]

    def forward(
        self, x: torch.Tensor, masks: Sequence[torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Runs the function.

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
        for layer, stage in zip(self.layers, self.stages, strict=True):
            padding = None if masks is None else masks[stage]
            x = layer(x, padding)
        # There is a layer at least.
        # pyrefly: ignore[unbound-name]
        return mask(x, padding)


class Stem(nn.Module):
    """A 3x3 convolution from features to the two streams.

    The first coupling normalises; so backward needs nothing but the features.

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
        """Runs the stem.

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
            return self.conv(x)
        return mask(self.conv(x.masked_fill(masks[0], 0.0)), masks[1])


class StridedCoupling(nn.Module):
    """y1 = p(x1) + f(x2), y2 = q(x2) + g(y1) with strided p, q and f.

    The transition between two stages of a partially reversible network.
    p and q are strided 1x1 convolutions, so it cannot be undone. They
    normalise first: else the scales of all stages multiply, and in training
    at a high rate the streams grow beyond what their grid can hold.

    Arguments
    ---------
    block : str
        What f and g are; see ResidualBody.
    in_channels : int
        Channels of each stream before.
    channels : int
        Channels inside f and g.
    out_channels : int
        Channels of each stream after.
    stride : int or tuple of int
        Stride.
    stage : int
        Which of the padding masks belongs to the output.
    activation : type
        Class of the activation.

    Example
    -------
    >>> import torch
    >>> transition = StridedCoupling("basic", 4, 8, 8, stride=2)
    >>> y1, y2 = transition((torch.rand(1, 4, 20, 10),) * 2)
    >>> y1.shape
    torch.Size([1, 8, 10, 5])
    """

    takes_streams = True
    # It stands for one coupling of its stage.
    couplings = 1

    def __init__(
        self,
        block: str,
        in_channels: int,
        channels: int,
        out_channels: int,
        stride: int | tuple[int, int],
        stage: int = 0,
        activation: Callable[..., nn.Module] = nn.ReLU,
    ):
        super().__init__()
        (self.stride,) = stride_pairs([stride])
        self.stage = stage
        self.p, self.q = (
            nn.Sequential(
                nn.BatchNorm2d(in_channels),
                conv1x1(in_channels, out_channels),
            )
            for _ in range(2)
        )
        self.f = ResidualBody(
            block,
            in_channels,
            channels,
            out_channels,
            stride,
            stage,
            activation,
        )
        self.g = ResidualBody(
            block,
            out_channels,
            channels,
            out_channels,
            1,
            stage,
            activation,
        )

    def forward(
        self,
        streams: tuple[torch.Tensor, torch.Tensor],
        masks: Sequence[torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Runs the transition.

        Arguments
        ---------
        streams : tuple of torch.Tensor
            Two streams [N, in_channels, T, F].
        masks : list of torch.Tensor, optional
            Padded frames of each stage.

        Returns
        -------
        tuple of torch.Tensor
            Two streams [N, out_channels, T', F'].
        """
        x1, x2 = streams
        y1 = self._shortcut(self.p, x1, masks) + self.f(x2, masks)
        y2 = self._shortcut(self.q, x2, masks) + self.g(y1, masks)
        return y1, y2

    def _shortcut(
        self,
        function: nn.Module,
        x: torch.Tensor,
        masks: Sequence[torch.Tensor] | None,
    ) -> torch.Tensor:
        # Strided before it is normalised: a quarter of the memory.
        time, frequency = self.stride
        y = function(x[..., ::time, ::frequency])
        return mask(y, None if masks is None else masks[self.stage])


class PooledStatistics(nn.Module):
    """Normalises the streams, narrows them if asked, and pools over time.

    Arguments
    ---------
    in_channels : int
        Channels of both streams together.
    channels : int, optional
        Narrow them to this many with a 1x1 convolution first.
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
        """Pools.

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


class ReversibleNetwork(Presets, nn.Module):
    """Stem, four stages of couplings, pooling and embedding.

    What the reversible ResNets have in common: all but the embedding stands
    in one memory-saving chain.

    Arguments
    ---------
    input_size : int
        Number of features per frame.
    activation : type
        Class of the activations; they must leave zero zero (padding).
    channels : list of int
        Channels of both streams together in each of the four stages.
    inner_channels : list of int
        Channels inside f and g.
    block_sizes : list of int
        Couplings in each stage.
    strides : list
        Stride of each stage: a number, or a pair (time, frequency).
    lin_neurons : int
        Size of the embedding.
    pool_channels : int or None
        Narrow the last stage to this many channels before pooling.
    downsampling : str
        "strided" (Type I) or "invertible" (Type II).
    save_memory : bool
        False stores all activations.
    make_residual : callable
        (in_channels, channels, out_channels, stage=, activation=) to the f
        or g of a coupling, for streams of that width.
    make_transition : callable
        (in_channels, channels, out_channels, stride, stage, activation) to
        the module between two stages of Type I, for streams of that width.
        Its attribute ``couplings`` says for how many couplings it stands.
    """

    @classmethod
    def preset_arguments(
        cls,
        name: str,
        downsampling: Literal["strided", "invertible"] = "strided",
        base_channels: int = 32,
        **overrides: Any,
    ) -> dict[str, Any]:
        """The arguments that a preset stands for.

        Arguments
        ---------
        name : str
            A key of PRESETS.
        downsampling : str
            "strided" (Type I) or "invertible" (Type II).
        base_channels : int
            Scales all widths; the presets have 32.
        **overrides : dict
            Arguments of the class that shall differ.

        Returns
        -------
        dict
            Keyword arguments of the class.

        Raises
        ------
        ValueError
            For an unknown kind of down-sampling, or a base_channels that
            does not scale every width to an even whole number.
        """
        preset = dict(cls.PRESETS[name])
        check_downsampling(downsampling)
        kinds = {k: preset.pop(k) for k in ("strided", "invertible")}
        for key, value in kinds[downsampling].items():
            if key.endswith("channels"):
                value = scale_widths(value, base_channels)
            preset[key] = value
        return {**preset, "downsampling": downsampling, **overrides}

    def __init__(
        self,
        input_size: int,
        activation: Callable[..., nn.Module],
        channels: Sequence[int],
        inner_channels: Sequence[int],
        block_sizes: Sequence[int],
        strides: Sequence[int | Sequence[int]],
        lin_neurons: int,
        pool_channels: int | None,
        downsampling: Literal["strided", "invertible"],
        save_memory: bool,
        make_residual: Callable[..., nn.Module],
        make_transition: "Callable[..., StridedCoupling | StridedConvolution]",
    ):
        super().__init__()
        check_downsampling(downsampling)
        check_stages(
            strides,
            channels=channels,
            block_sizes=block_sizes,
            inner_channels=inner_channels,
        )
        if any(c % 2 for c in channels):
            raise ValueError(
                f"channels are split in two streams and must be even, got "
                f"{list(channels)}."
            )
        strides = stride_pairs(strides)
        invertible = downsampling == "invertible"
        if invertible:
            check_volume(channels, strides)
        self.input_size = input_size
        self.strides = strides
        blocks: list[nn.Module] = [Stem(channels[0], strides[0])]
        width = channels[0] // 2
        for stage in range(4):
            out = channels[stage] // 2
            inner = inner_channels[stage]
            size = block_sizes[stage]
            if stage > 0 and invertible:
                blocks.append(SpaceToDepth(strides[stage]))
            elif stage > 0:
                transition = make_transition(
                    width, inner, out, strides[stage], stage + 1, activation
                )
                blocks.append(transition)
                size -= transition.couplings
            for _ in range(size):
                f, g = (
                    make_residual(
                        out, inner, out, stage=stage + 1, activation=activation
                    )
                    for _ in "fg"
                )
                blocks.append(AdditiveCoupling(f, g))
            width = out
        blocks.append(PooledStatistics(channels[-1], pool_channels, activation))
        self.trunk = ReversibleSequence(blocks, save_memory=save_memory)
        width = pool_channels or channels[-1]
        pooled = 2 * width * bands(input_size, strides)
        self.embedding = Embedding(pooled, lin_neurons)
        initialise(self)
        for body in self.modules():
            if isinstance(body, ResidualBody):
                # Each coupling begins as the identity, as the vanilla blocks
                # begin as their shortcuts. Else each adds a variance of its
                # own to a stream, and Type I hardly begins to learn.
                last = cast(NormActConv, body.layers[-1])
                nn.init.zeros_(last.conv.weight)

    @property
    def save_memory(self) -> bool:
        """Whether activations are computed again instead of stored."""
        return self.trunk.save_memory

    @save_memory.setter
    def save_memory(self, value: bool) -> None:
        self.trunk.save_memory = value

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
        stem = cast(Stem, self.trunk.blocks[0])
        check_features(x, self.input_size, stem.conv.weight.dtype)
        masks = padding_masks(lengths, x, [1, *(t for t, _ in self.strides)])
        return self.embedding(self.trunk(x, masks))


class RevResNet(ReversibleNetwork):
    """Reversible ResNet; a drop-in for ``speechbrain.lobes.models.ResNet``.

    Half the units, each with two residual functions, as Gomez et al. chose
    them. Where the parameters are (stages 3 and 4) the streams are wider than
    the vanilla network, where the memory is (stages 1 and 2) they are not.
    ``channels`` counts both streams, ``inside`` is the width within f and g.

    ========= ==== ============ ===================== ================= =======
    preset    type block_sizes  channels              inside            params
    ========= ==== ============ ===================== ================= =======
    RevNet34  I    2, 2, 3, 2   64, 128, 256, 384     32, 64, 128, 192   6.64 M
    RevNet34  II   2, 2, 3, 2   32, 128, 512, 2048    32, 64, 80, 32     6.76 M
    RevNet101 I    2, 2, 11, 2  128, 256, 1024, 1024  32, 64, 128, 256  15.71 M
    RevNet101 II   2, 2, 11, 2  64, 256, 1024, 4096   32, 64, 128, 128  16.22 M
    RevNet152 I    2, 4, 18, 2  as RevNet101 I        as RevNet101 I    19.85 M
    RevNet152 II   2, 4, 18, 2  as RevNet101 II       as RevNet101 II   20.35 M
    RevNet221 I    3, 8, 24, 2  as RevNet101 I        as RevNet101 I    23.67 M
    RevNet221 II   3, 8, 24, 2  as RevNet101 II       as RevNet101 II   24.17 M
    RevNet293 I    5, 10, 32, 2 as RevNet101 I        as RevNet101 I    28.42 M
    RevNet293 II   5, 10, 32, 2 as RevNet101 II       as RevNet101 II   28.91 M
    ========= ==== ============ ===================== ================= =======

    RevNet34 has basic blocks, the others bottlenecks. Type II narrows the
    last stage before pooling (``pool_channels``): to 256 in RevNet34, to 768
    in the others.

    Arguments
    ---------
    input_size : int
        Number of features per frame.
    activation : type
        Class of the activations; they must leave zero zero (padding).
    channels : list of int
        Channels of both streams together in each of the four stages. With
        invertible down-sampling nothing is lost: each stage has as many times
        the channels of the stage before as it has fewer positions (4 times
        for a stride of 2).
    block_sizes : list of int
        Couplings in each stage, each with two residual functions. With
        strided down-sampling the first one of the stages 2 to 4 is the
        transition.
    strides : list
        Stride of each stage: a number, or a pair (time, frequency).
    lin_neurons : int
        Size of the embedding.
    block : str
        What f and g are: "basic" or "bottleneck".
    inner_channels : list of int, optional
        Channels inside f and g. By default those of a stream ("basic") or a
        quarter ("bottleneck").
    pool_channels : int, optional
        Narrow the last stage to this many channels before pooling. The
        embedding layer has 2 * pool_channels * bands inputs.
    downsampling : str
        "strided" (Type I) or "invertible" (Type II).
    save_memory : bool
        False stores all activations, as other networks do: same function,
        same weights.

    Raises
    ------
    ValueError
        If an argument does not fit the others; for an unknown preset.

    Example
    -------
    >>> import torch
    >>> net = RevResNet.from_preset("RevNet34", base_channels=4)
    >>> net(torch.rand(2, 40, 80), lengths=torch.tensor([1.0, 0.5])).shape
    torch.Size([2, 256])
    """

    PRESETS = {
        "RevNet34": {
            "block": "basic",
            "block_sizes": [2, 2, 3, 2],
            "strided": {
                "channels": [64, 128, 256, 384],
                "inner_channels": [32, 64, 128, 192],
            },
            "invertible": {
                "channels": [32, 128, 512, 2048],
                "inner_channels": [32, 64, 80, 32],
                "pool_channels": 256,
            },
        },
        **{
            name: {
                "block": "bottleneck",
                "block_sizes": block_sizes,
                "strided": {
                    "channels": [128, 256, 1024, 1024],
                    "inner_channels": [32, 64, 128, 256],
                },
                "invertible": {
                    "channels": [64, 256, 1024, 4096],
                    "inner_channels": [32, 64, 128, 128],
                    "pool_channels": 768,
                },
            }
            for name, block_sizes in (
                ("RevNet101", [2, 2, 11, 2]),
                ("RevNet152", [2, 4, 18, 2]),
                ("RevNet221", [3, 8, 24, 2]),
                ("RevNet293", [5, 10, 32, 2]),
            )
        },
    }

    def __init__(
        self,
        input_size: int = 80,
        activation: Callable[..., nn.Module] = nn.ReLU,
        channels: Sequence[int] = (64, 128, 256, 512),
        block_sizes: Sequence[int] = (2, 2, 3, 2),
        strides: Sequence[int | Sequence[int]] = (1, 2, 2, 2),
        lin_neurons: int = 256,
        block: Literal["basic", "bottleneck"] = "basic",
        inner_channels: Sequence[int] | None = None,
        pool_channels: int | None = None,
        downsampling: Literal["strided", "invertible"] = "strided",
        save_memory: bool = True,
    ):
        check_block(block, BLOCKS)
        if inner_channels is None:
            share = 2 if block == "basic" else 8
            inner_channels = [max(c // share, 1) for c in channels]
        super().__init__(
            input_size,
            activation,
            channels,
            inner_channels,
            block_sizes,
            strides,
            lin_neurons,
            pool_channels,
            downsampling,
            save_memory,
            make_residual=partial(ResidualBody, block),
            make_transition=partial(StridedCoupling, block),
        )


def scale_widths(
    widths: int | list[int], base_channels: int
) -> int | list[int]:
    """The widths of a preset for another width of its first stage.

    Arguments
    ---------
    widths : int or list of int
        Widths for base_channels=32.
    base_channels : int
        The width wanted.

    Returns
    -------
    int or list of int
        The widths, scaled.

    Raises
    ------
    ValueError
        If one of them would not be whole.
    """
    if isinstance(widths, list):
        return [
            cast(int, scale_widths(width, base_channels)) for width in widths
        ]
    if base_channels < 1 or widths * base_channels % 32:
        raise ValueError(
            f"base_channels={base_channels} does not scale a width of "
            f"{widths} to a whole number; use a multiple of 2, best of 8 "
            f"(the presets have 32)."
        )
    return widths * base_channels // 32


def check_downsampling(downsampling: str) -> None:
    """Names the two kinds if it is neither.

    Arguments
    ---------
    downsampling : str
        What the user asked for.

    Raises
    ------
    ValueError
        If it is not known.
    """
    if downsampling not in ("strided", "invertible"):
        raise ValueError(
            f"downsampling must be 'strided' (Type I) or 'invertible' (Type "
            f"II), got {downsampling!r}."
        )


def check_volume(
    channels: Sequence[int], strides: Sequence[tuple[int, int]]
) -> None:
    """Invertible down-sampling keeps the number of values.

    Arguments
    ---------
    channels : list of int
        Channels of each stage.
    strides : list of tuple
        (time, frequency) of each stage.

    Raises
    ------
    ValueError
        If the channels do not grow by time * frequency; the message says how.
    """
    needed = [channels[0]]
    for stride in strides[1:]:
        needed.append(needed[-1] * math.prod(stride))
    if list(channels) != needed:
        raise ValueError(
            f"With downsampling='invertible' channels take in what strides "
            f"take away: for strides (time, frequency) {list(strides)} use "
            f"channels={needed} (got {list(channels)}) and choose the size of "
            f"f and g with inner_channels."
        )
