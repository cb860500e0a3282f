"""Reversible ECAPA-TDNN: depth costs no memory.

Each SE-Res2Net block of ECAPA-TDNN (Desplanques et al., 2020) becomes an
additive coupling (Gomez et al., "The Reversible Residual Network", 2017),
whose f and g are SE-Res2Net bodies on half of the channels. Taps add up the
multi-layer aggregation in forward; backward reconstructs their inputs. Between
forward and backward a network of any depth stores the features, the two streams
and two tensors of the aggregation.

Authors
 * The sb_memeff authors 2026
"""

import math
from collections.abc import Callable, Sequence

import torch
from speechbrain.lobes.models.ECAPA_TDNN import (
    AttentiveStatisticsPooling,
    BatchNorm1d,
    Conv1d,
    Res2NetBlock,
    SEBlock,
    TDNNBlock,
)
from torch import nn

from sb_memeff.lobes.models.RecomputedECAPA_TDNN import (
    AggregationTerm,
    Stem,
    aggregate,
    check_aggregation,
    embed,
    se_res2net_forward,
)
from sb_memeff.nnet.padding import padding_masks
from sb_memeff.nnet.reversible import (
    AdditiveCoupling,
    ReversibleSequence,
    Tap,
)
from sb_memeff.utils.settings import check_integer, check_switches

__all__ = ["RevECAPA_TDNN"]


class SERes2NetBody(nn.Module):
    """An SE-Res2Net block without its shortcut: f or g of a coupling.

    Arguments
    ---------
    channels : int
        Channels of a stream.
    inner_channels : int
        Channels of the Res2Net block.
    res2net_scale : int
        The scale of the Res2Net block.
    se_channels : int
        Channels of the squeeze.
    kernel_size : int
        Kernel of the Res2Net block.
    dilation : int
        Dilation of the Res2Net block.
    activation : type
        Class of the activations of the TDNN blocks.
    groups : int
        Groups of the TDNN blocks.
    dropout : float
        Rate of channel dropout in training.

    Example
    -------
    >>> import torch
    >>> body = SERes2NetBody(32, 48, res2net_scale=4)
    >>> body(torch.rand(8, 32, 120)).shape
    torch.Size([8, 32, 120])
    """

    takes_arguments = ("padding", "save_memory")

    def __init__(
        self,
        channels: int,
        inner_channels: int,
        res2net_scale: int = 8,
        se_channels: int = 128,
        kernel_size: int = 3,
        dilation: int = 1,
        activation: Callable[..., nn.Module] = nn.ReLU,
        groups: int = 1,
        dropout: float = 0.0,
    ):
        super().__init__()
        options = {
            "activation": activation,
            "groups": groups,
            "dropout": dropout,
        }
        self.tdnn1 = TDNNBlock(channels, inner_channels, 1, 1, **options)
        self.res2net_block = Res2NetBlock(
            inner_channels, inner_channels, res2net_scale, kernel_size, dilation
        )
        self.tdnn2 = TDNNBlock(inner_channels, channels, 1, 1, **options)
        self.se_block = SEBlock(channels, se_channels, channels)

    def forward(
        self,
        x: torch.Tensor,
        padding: torch.Tensor | None = None,
        save_memory: bool = True,
    ) -> torch.Tensor:
        """Applies the function.

        Arguments
        ---------
        x : torch.Tensor
            A stream [N, C, T].
        padding : torch.Tensor, optional
            Padded frames [N, 1, T], which become zero and do not affect
            others.
        save_memory : bool
            Recompute the chunks of Res2Net in backward.

        Returns
        -------
        torch.Tensor
            [N, C, T].
        """
        return se_res2net_forward(self, x, None, save_memory, padding)


class RevECAPA_TDNN(nn.Module):
    """ECAPA-TDNN with reversible blocks.

    It has the call signature of
    ``speechbrain.lobes.models.ECAPA_TDNN.ECAPA_TDNN`` and as many parameters,
    but it is another function and cannot load its weights: train it from
    scratch. For pretrained weights use ``sb_memeff.lobes.models.RecomputedECAPA_TDNN``.
    With few blocks or small batches that network also needs less memory under
    bf16 autocast, since the streams here are float32.

    Its convolutions pad an utterance with zeros, where SpeechBrain's reflect
    it. With ``lengths``, therefore, the values of padded frames, NaN included,
    affect neither embeddings nor gradients, and in eval mode the embedding of
    an utterance does not depend on its padding. In training mode padded frames
    count in the statistics of batch norm.

    Arguments
    ---------
    input_size : int
        Number of features per frame.
    device : str
        Ignored, as in SpeechBrain's class.
    lin_neurons : int
        Size of the embedding.
    activation : type
        Class of the activations.
    channels : list of int
        Channels of the first TDNN block, of each reversible block (both
        streams together), and of the aggregation.
    kernel_sizes : list of int
        Kernel of each of them.
    dilations : list of int
        Dilation of each of them.
    attention_channels : int
        Channels of the attention.
    res2net_scale : int
        The scale of the Res2Net blocks.
    se_channels : int
        Channels of the squeeze.
    global_context : bool
        Give the attention the mean and deviation of the utterance.
    groups : list of int
        Groups of each of them.
    dropout : float
        Rate of channel dropout in training.
    inner_channels : int, optional
        Channels of the Res2Net block in each f and g. The default gives a
        reversible block as many parameters as SpeechBrain's block has.
    save_memory : bool
        False stores all activations; function and weights are the same.

    Raises
    ------
    TypeError
        If global_context or save_memory is neither True nor False.
    ValueError
        If arguments contradict each other.

    Example
    -------
    >>> import torch
    >>> net = RevECAPA_TDNN(80, lin_neurons=192)
    >>> net(torch.rand(5, 120, 80), torch.ones(5)).shape
    torch.Size([5, 1, 192])
    """

    def __init__(
        self,
        input_size: int,
        device: str = "cpu",
        lin_neurons: int = 192,
        activation: Callable[..., nn.Module] = nn.ReLU,
        channels: Sequence[int] = (512, 512, 512, 512, 1536),
        kernel_sizes: Sequence[int] = (5, 3, 3, 3, 1),
        dilations: Sequence[int] = (1, 2, 3, 4, 1),
        attention_channels: int = 128,
        res2net_scale: int = 8,
        se_channels: int = 128,
        global_context: bool = True,
        groups: Sequence[int] = (1, 1, 1, 1, 1),
        dropout: float = 0.0,
        inner_channels: int | None = None,
        save_memory: bool = True,
    ):
        super().__init__()
        check_switches(global_context=global_context, save_memory=save_memory)
        if inner_channels is not None:
            check_integer("inner_channels", inner_channels, 1)
        for name, values in (
            ("kernel_sizes", kernel_sizes),
            ("dilations", dilations),
            ("groups", groups),
        ):
            if len(values) != len(channels):
                raise ValueError(
                    f"{name} must hold one number for each of channels="
                    f"{list(channels)}, got {list(values)}."
                )
        check_aggregation(channels, kernel_sizes[-1], groups[-1])
        check_kernels(kernel_sizes, dilations)
        width = channels[1]
        if width % 2:
            raise ValueError(
                f"channels of the reversible blocks are split in two streams "
                f"and must be even, got {width}."
            )
        first = TDNNBlock(
            input_size,
            channels[0],
            kernel_sizes[0],
            dilations[0],
            activation,
            groups[0],
            dropout,
        )
        shortcut = None
        if channels[0] != width:
            shortcut = nn.Conv1d(channels[0], width, 1)
        chain = [Stem(first, shortcut)]
        for i in range(1, len(channels) - 1):
            options = {
                "res2net_scale": res2net_scale,
                "se_channels": se_channels,
                "kernel_size": kernel_sizes[i],
                "groups": groups[i],
            }
            inner = inner_channels or matching_width(width, **options)
            check_inner_channels(inner, res2net_scale, groups[i])
            f, g = (
                SERes2NetBody(
                    width // 2,
                    inner,
                    dilation=dilations[i],
                    activation=activation,
                    dropout=dropout,
                    **options,
                )
                for _ in "fg"
            )
            chain += [AdditiveCoupling(f, g), Tap(AggregationTerm(i - 1))]
        self.trunk = ReversibleSequence(chain, save_memory=save_memory)
        for part in self.trunk.modules():
            if isinstance(part, Conv1d):
                part.padding_mode = "constant"
        # Names and shapes of these are those of SpeechBrain's network.
        self.mfa = TDNNBlock(
            width * (len(channels) - 2),
            channels[-1],
            kernel_sizes[-1],
            dilations[-1],
            activation,
            dropout=dropout,
        )
        self.asp = AttentiveStatisticsPooling(
            channels[-1],
            attention_channels=attention_channels,
            global_context=global_context,
        )
        self.asp_bn = BatchNorm1d(input_size=2 * channels[-1])
        self.fc = Conv1d(
            in_channels=2 * channels[-1],
            out_channels=lin_neurons,
            kernel_size=1,
        )

    @property
    def save_memory(self) -> bool:
        """Whether activations are recomputed instead of stored."""
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
            Embeddings [N, 1, lin_neurons].

        Raises
        ------
        TypeError
            If the dtype of x or of lengths does not fit.
        ValueError
            If the shape of x does not fit, or lengths are not relative.
        """
        masks = padding_masks(lengths, x, [1])
        padding = None if masks is None else masks[0].squeeze(3)
        return embed(
            self,
            aggregate(self, self.trunk, x, padding=padding),
            padding=padding,
        )


def check_kernels(
    kernel_sizes: Sequence[int], dilations: Sequence[int]
) -> None:
    """Checks that each convolution keeps the number of frames.

    Arguments
    ---------
    kernel_sizes : list of int
        Kernel of each block.
    dilations : list of int
        Dilation of each block.

    Raises
    ------
    ValueError
        If one does not.
    """
    for kernel, dilation in zip(kernel_sizes, dilations):
        if (kernel - 1) * dilation % 2:
            raise ValueError(
                f"A kernel of {kernel} with a dilation of {dilation} would "
                f"lose a frame; use odd kernel_sizes, got "
                f"{list(kernel_sizes)}."
            )


def matching_width(
    channels: int,
    res2net_scale: int,
    se_channels: int,
    kernel_size: int,
    groups: int,
) -> int:
    """Inner channels for which a coupling has the parameters of one block.

    Arguments
    ---------
    channels : int
        Channels of SpeechBrain's block, and of both streams together.
    res2net_scale : int
        The scale of the Res2Net block.
    se_channels : int
        Channels of the squeeze.
    kernel_size : int
        Kernel of the Res2Net block.
    groups : int
        Groups of the TDNN blocks.

    Returns
    -------
    int
        A multiple of res2net_scale and groups.
    """

    def num_parameters(outer: int, inner: int) -> int:
        chunk = inner // res2net_scale
        res2net = (res2net_scale - 1) * (kernel_size * chunk + 3) * chunk
        tdnn = (2 * outer // groups + 3) * inner + 3 * outer
        return res2net + tdnn + (2 * se_channels + 1) * outer + se_channels

    target = num_parameters(channels, channels)
    step = _channel_step(res2net_scale, groups)
    return min(
        range(step, 2 * channels + step, step),
        key=lambda inner: abs(
            2 * num_parameters(channels // 2, inner) - target
        ),
    )


def check_inner_channels(
    inner_channels: int, res2net_scale: int, groups: int
) -> None:
    """Checks that Res2Net and groups can split the channels.

    Arguments
    ---------
    inner_channels : int
        Channels of a Res2Net block.
    res2net_scale : int
        Number of chunks.
    groups : int
        Groups of the TDNN blocks around it.

    Raises
    ------
    ValueError
        If they cannot be split evenly.
    """
    step = _channel_step(res2net_scale, groups)
    if inner_channels < 1 or inner_channels % step:
        raise ValueError(
            f"inner_channels={inner_channels} must be a multiple of {step}: "
            f"res2net_scale={res2net_scale}, groups={groups}."
        )


def _channel_step(res2net_scale: int, groups: int) -> int:
    """The least number of channels that Res2Net and groups can both split."""
    # math.lcm needs Python 3.9.
    return res2net_scale * groups // math.gcd(res2net_scale, groups)
