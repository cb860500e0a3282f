"""Reversible depth-first ResNets for speaker recognition.

DF-ResNet (Liu et al., Interspeech 2022) made reversible as Liu and Qian,
"Memory-Efficient Training for Deep Speaker Embedding Learning in Speaker
Verification" (2024), propose; ``sb_memeff.lobes.reversible_network`` explains Type I
and Type II.

f and g are inverted bottlenecks on half of the channels. DF-ResNet's activation
after the sum could not be inverted, so it precedes the first convolution. Type
I has DF-ResNet's own down-sampling layers between its stages.

**Slices.** In a reversible network the expansions determine the peak: backward
through one inverted bottleneck needs six maps of four times its channels. The
depthwise convolution, however, does not mix channels, so that the function is a
sum over slices k of the inner channels,

    f(x) = sum_k  w3_k * act(norm(w2_k * act(norm(w1_k * act(norm_k(x)))))),

which a coupling evaluates one after another, in forward and in backward. This
takes the memory of one slice for the arithmetic of all. (Each slice has its own
batch norm of x, the only difference from the unsliced function.)

Authors
 * The sb_memeff authors 2026
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
from torch import nn

from sb_memeff.lobes.models.DFResNet import BLOCK_SIZES, GOLDEN_GEMINI
from sb_memeff.lobes.residual import check_stages, conv3x3
from sb_memeff.lobes.reversible_blocks import NormActConv, ResidualBody
from sb_memeff.lobes.reversible_network import ReversibleNetwork
from sb_memeff.nnet.padding import mask

__all__ = ["RevDFResNet", "StridedConvolution"]


class StridedConvolution(nn.Module):
    """Batch norm, activation and a strided 3x3 convolution of both streams.

    Arguments
    ---------
    in_channels : int
        Channels of the input, both streams together.
    out_channels : int
        Channels of the output, both streams together.
    stride : int or tuple of int
        Stride.
    stage : int
        Index of the output's padding mask.
    activation : type
        Class of the activation.

    Example
    -------
    >>> import torch
    >>> StridedConvolution(8, 16, 2)(torch.rand(1, 8, 20, 10)).shape
    torch.Size([1, 16, 10, 5])
    """

    # It replaces no coupling of its stage.
    num_couplings = 0

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int | tuple[int, int],
        stage: int = 0,
        activation: Callable[..., nn.Module] = nn.ReLU,
    ):
        super().__init__()
        conv = conv3x3(in_channels, out_channels, stride)
        self.layer = NormActConv(in_channels, conv, activation)
        self.stage = stage

    def forward(
        self, x: torch.Tensor, masks: Sequence[torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Applies the layer.

        Arguments
        ---------
        x : torch.Tensor
            [N, in_channels, T, F].
        masks : list of torch.Tensor, optional
            Padded frames of each stage.

        Returns
        -------
        torch.Tensor
            [N, out_channels, T', F'], zero in padded frames.
        """
        if masks is None:
            return self.layer(x)
        return mask(self.layer(x, masks[self.stage - 1]), masks[self.stage])


def num_couplings(block_sizes: Sequence[int]) -> list[int]:
    """Couplings that replace the blocks; each has two residual functions."""
    return [(size + 1) // 2 for size in block_sizes]


class RevDFResNet(ReversibleNetwork):
    """Reversible DF-ResNet; a drop-in for ``speechbrain.lobes.models.ResNet``.

    It has half as many units as the vanilla network, each with two residual
    functions. In stages 1 and 2, which need most memory, both streams together
    are as wide as the vanilla network or little wider. In stages 3 and 4, which
    have most parameters, Type I has wider streams or expansions.

    ================== ============= ======= =======
    preset             block_sizes   Type I  Type II
    ================== ============= ======= =======
    DFRevNet56         2, 2, 5, 2     4.60 M  4.67 M
    DFRevNet110        2, 2, 14, 2    7.09 M  7.10 M
    DFRevNet179        2, 4, 23, 2    9.62 M  9.68 M
    DFRevNet233        2, 4, 32, 2   12.11 M 12.10 M
    GeminiDFRevNet60   2, 2, 5, 2     4.00 M  3.92 M
    GeminiDFRevNet114  2, 2, 14, 2    6.48 M  6.35 M
    GeminiDFRevNet183  2, 4, 23, 2    9.01 M  9.05 M
    GeminiDFRevNet237  2, 4, 32, 2   11.50 M 11.48 M
    ================== ============= ======= =======

    ``channels`` counts both streams, ``inner`` is the width within f and g:

    =============== ==== ==================== =================== ==========
    presets         type channels             inner               slices
    =============== ==== ==================== =================== ==========
    DFRevNet        I    32, 64, 256, 256     64, 128, 512, 1024  2, 1, 2, 1
    DFRevNet        II   32, 128, 512, 2048   64, 256, 256, 160   2, 2, 1, 1
    GeminiDFRevNet  I    64, 64, 256, 256     128, 128, 512, 1024 2, 1, 2, 1
    GeminiDFRevNet  II   64, 256, 512, 1024   128, 256, 256, 320  2, 1, 1, 1
    =============== ==== ==================== =================== ==========

    Type II reduces the last stage to 256 channels before pooling
    (``pool_channels``).

    Arguments
    ---------
    input_size : int
        Number of features per frame.
    activation : type
        Class of the activations; they must map zero to zero (padding).
    channels : list of int
        Channels of both streams together in each of the four stages.
        Invertible down-sampling keeps the number of values: the channels grow
        as the positions shrink (4 times for a stride of 2).
    block_sizes : list of int
        Couplings in each stage, each with two residual functions.
    strides : list
        Stride of each stage: a number, or a pair (time, frequency).
    lin_neurons : int
        Size of the embedding.
    inner_channels : list of int, optional
        Channels inside f and g; by default four times those of a stream.
    pool_channels : int, optional
        Reduce the last stage to this number of channels before pooling. The
        embedding layer has 2 * pool_channels * bands inputs.
    slices : list of int
        Number of slices of f and g in each stage. More slices need less
        memory and launch more, smaller kernels.
    downsampling : str
        "strided" (Type I) or "invertible" (Type II).
    save_memory : bool
        False stores all activations; function and weights are the same.

    Raises
    ------
    ValueError
        If arguments contradict each other; for an unknown preset.

    Example
    -------
    >>> import torch
    >>> net = RevDFResNet.from_preset("DFRevNet56", base_channels=4)
    >>> net(torch.rand(2, 40, 80), lengths=torch.tensor([1.0, 0.5])).shape
    torch.Size([2, 256])
    """

    PRESETS = {
        **{
            f"DFRevNet{depth}": {
                "block_sizes": num_couplings(sizes),
                "strided": {
                    "channels": [32, 64, 256, 256],
                    "inner_channels": [64, 128, 512, 1024],
                    "slices": [2, 1, 2, 1],
                },
                "invertible": {
                    "channels": [32, 128, 512, 2048],
                    "inner_channels": [64, 256, 256, 160],
                    "pool_channels": 256,
                    "slices": [2, 2, 1, 1],
                },
            }
            for depth, sizes in BLOCK_SIZES.items()
        },
        **{
            f"GeminiDFRevNet{depth + 4}": {
                "block_sizes": num_couplings(sizes),
                "strides": GOLDEN_GEMINI,
                "strided": {
                    "channels": [64, 64, 256, 256],
                    "inner_channels": [128, 128, 512, 1024],
                    "slices": [2, 1, 2, 1],
                },
                "invertible": {
                    "channels": [64, 256, 512, 1024],
                    "inner_channels": [128, 256, 256, 320],
                    "pool_channels": 256,
                    "slices": [2, 1, 1, 1],
                },
            }
            for depth, sizes in BLOCK_SIZES.items()
        },
    }

    def __init__(
        self,
        input_size: int = 80,
        activation: Callable[..., nn.Module] = nn.ReLU,
        channels: Sequence[int] = (32, 64, 256, 256),
        block_sizes: Sequence[int] = (2, 2, 5, 2),
        strides: Sequence[int | Sequence[int]] = (1, 2, 2, 2),
        lin_neurons: int = 256,
        inner_channels: Sequence[int] | None = None,
        pool_channels: int | None = None,
        slices: Sequence[int] = (1, 1, 1, 1),
        downsampling: Literal["strided", "invertible"] = "strided",
        save_memory: bool = True,
    ):
        check_stages(strides, channels=channels)
        if inner_channels is None:
            inner_channels = [2 * c for c in channels]
        check_stages(strides, slices=slices, inner_channels=inner_channels)
        if any(c % s for c, s in zip(inner_channels, slices)):
            raise ValueError(
                f"slices={list(slices)} must divide "
                f"inner_channels={list(inner_channels)}."
            )
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
            make_residual=partial(sliced_residual, slices),
            make_transition=make_transition,
        )


def sliced_residual(
    slices: Sequence[int],
    in_channels: int,
    channels: int,
    out_channels: int,
    stage: int,
    activation: Callable[..., nn.Module],
) -> nn.ModuleList:
    """Creates an inverted bottleneck as a list of slices.

    Arguments
    ---------
    slices : list of int
        Number of slices in each stage.
    in_channels : int
        Channels of the stream.
    channels : int
        Inner channels of all slices together.
    out_channels : int
        Channels of the output stream.
    stage : int
        The stage, from 1.
    activation : type
        Class of the activations.

    Returns
    -------
    torch.nn.ModuleList
        The slices; the function is their sum.
    """
    num_slices = slices[stage - 1]
    return nn.ModuleList(
        ResidualBody(
            "inverted_bottleneck",
            in_channels,
            channels // num_slices,
            out_channels,
            stage=stage,
            activation=activation,
        )
        for _ in range(num_slices)
    )


def make_transition(
    in_channels: int,
    channels: int,
    out_channels: int,
    stride: tuple[int, int],
    stage: int,
    activation: Callable[..., nn.Module],
) -> StridedConvolution:
    """Creates the transition between two stages of Type I.

    Arguments
    ---------
    in_channels : int
        Channels of each input stream.
    channels : int
        Ignored: channels inside the couplings that follow.
    out_channels : int
        Channels of each output stream.
    stride : tuple of int
        Stride.
    stage : int
        The stage that begins, from 1.
    activation : type
        Class of the activation.

    Returns
    -------
    StridedConvolution
        The layer.
    """
    return StridedConvolution(
        2 * in_channels, 2 * out_channels, stride, stage, activation
    )
