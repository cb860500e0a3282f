"""Depth-first residual networks for speaker recognition.

Liu et al., "DF-ResNet: Boosting Speaker Verification Performance with
Depth-First Design" (Interspeech 2022): many narrow blocks instead of few wide
ones. The Gemini presets have the strides of Liu et al., "Golden Gemini is All
You Need" (2023), which halve the bands in each stage and the frames only once.

Authors
 * The sb_memeff authors 2026
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from sb_memeff.lobes.residual import (
    Bottleneck,
    StagedNetwork,
    check_stages,
    conv3x3,
)
from sb_memeff.nnet.padding import mask

__all__ = ["DFResNet", "DownSampling", "InvertedBottleneck"]

# (time, frequency) of each stage: T14c in the paper.
GOLDEN_GEMINI = [[1, 2], [2, 2], [1, 2], [1, 2]]

# Names of the original presets count the layers of stem, blocks and embedding.
# Gemini's count the four down-sampling layers too.
BLOCK_SIZES = {
    56: [3, 3, 9, 3],
    110: [3, 3, 27, 3],
    179: [3, 8, 45, 3],
    233: [3, 8, 63, 3],
}


class InvertedBottleneck(Bottleneck):
    """1x1, depthwise 3x3 and 1x1 convolutions with a shortcut.

    Inside, there are four times as many channels.

    Arguments
    ---------
    channels : int
        Channels of input and output.
    activation : type
        Class of the activation.

    Example
    -------
    >>> import torch
    >>> InvertedBottleneck(8)(torch.rand(1, 8, 20, 10)).shape
    torch.Size([1, 8, 20, 10])
    """

    def __init__(
        self, channels: int, activation: Callable[..., nn.Module] = nn.ReLU
    ):
        inner_channels = self.expansion * channels
        super().__init__(
            channels,
            inner_channels,
            activation=activation,
            out_channels=channels,
            groups=inner_channels,
        )


class DownSampling(nn.Module):
    """A strided 3x3 convolution and batch norm, between two stages.

    Arguments
    ---------
    in_channels : int
        Channels of the input.
    out_channels : int
        Channels of the output.
    stride : int or tuple of int
        Stride.

    Example
    -------
    >>> import torch
    >>> DownSampling(8, 16, (1, 2))(torch.rand(1, 8, 20, 10)).shape
    torch.Size([1, 16, 20, 5])
    """

    def __init__(
        self, in_channels: int, out_channels: int, stride: int | tuple[int, int]
    ):
        super().__init__()
        self.conv = conv3x3(in_channels, out_channels, stride)
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(
        self,
        x: torch.Tensor,
        padding: torch.Tensor | None = None,
        padding_in: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Applies the layer.

        Arguments
        ---------
        x : torch.Tensor
            [N, in_channels, T, F], zero in padded frames.
        padding : torch.Tensor, optional
            Padded frames of the output, [N, 1, T', 1].
        padding_in : torch.Tensor, optional
            Ignored; blocks need it.

        Returns
        -------
        torch.Tensor
            [N, out_channels, T', F'].
        """
        return mask(self.norm(self.conv(x)), padding)


class DFResNet(StagedNetwork):
    """Depth-first residual network with temporal statistics pooling.

    A drop-in replacement for ``speechbrain.lobes.models.ResNet.ResNet``; it
    respects ``lengths`` as our ``ResNet`` does. A stage begins with a down-sampling
    layer if its stride is not 1 or if it changes the number of channels.

    ================= ============= ============== ==========
    preset            block_sizes   strides        parameters
    ================= ============= ============== ==========
    DFResNet56        3, 3, 9, 3    1, 2, 2, 2         4.69 M
    DFResNet110       3, 3, 27, 3   1, 2, 2, 2         7.18 M
    DFResNet179       3, 8, 45, 3   1, 2, 2, 2         9.84 M
    DFResNet233       3, 8, 63, 3   1, 2, 2, 2        12.33 M
    GeminiDFResNet60  3, 3, 9, 3    Golden Gemini      4.05 M
    GeminiDFResNet114 3, 3, 27, 3   Golden Gemini      6.53 M
    GeminiDFResNet183 3, 8, 45, 3   Golden Gemini      9.20 M
    GeminiDFResNet237 3, 8, 63, 3   Golden Gemini     11.68 M
    ================= ============= ============== ==========

    With Golden Gemini, the last stage has half the frames and a sixteenth of
    the bands; otherwise it has an eighth of both.

    Arguments
    ---------
    input_size : int
        Number of features per frame.
    activation : type
        Class of the activations; they must map zero to zero (padding).
    channels : list of int
        Channels of each of the four stages; the stem has as many as the
        first.
    block_sizes : list of int
        Inverted bottlenecks in each stage.
    strides : list
        Stride of each stage: a number, or a pair (time, frequency).
    lin_neurons : int
        Size of the embedding.

    Raises
    ------
    ValueError
        If arguments contradict each other; for an unknown preset.

    Example
    -------
    >>> import torch
    >>> net = DFResNet.from_preset("DFResNet56", base_channels=4)
    >>> net(torch.rand(2, 40, 80), lengths=torch.tensor([1.0, 0.5])).shape
    torch.Size([2, 256])
    """

    PRESETS = {
        **{
            f"DFResNet{depth}": {"block_sizes": sizes}
            for depth, sizes in BLOCK_SIZES.items()
        },
        **{
            f"GeminiDFResNet{depth + 4}": {
                "block_sizes": sizes,
                "strides": GOLDEN_GEMINI,
            }
            for depth, sizes in BLOCK_SIZES.items()
        },
    }

    @classmethod
    def preset_arguments(
        cls, name: str, base_channels: int = 32, **overrides: Any
    ) -> dict[str, Any]:
        """The arguments of a preset.

        Arguments
        ---------
        name : str
            A key of PRESETS.
        base_channels : int
            Channels of the first stage; each further stage has twice as
            many. The published networks have 32.
        **overrides : dict
            Arguments of the class that replace those of the preset.

        Returns
        -------
        dict
            Keyword arguments of the class.
        """
        channels = [base_channels * 2**stage for stage in range(4)]
        return {"channels": channels, **cls.PRESETS[name], **overrides}

    def __init__(
        self,
        input_size: int = 80,
        activation: Callable[..., nn.Module] = nn.ReLU,
        channels: Sequence[int] = (32, 64, 128, 256),
        block_sizes: Sequence[int] = (3, 3, 9, 3),
        strides: Sequence[int | Sequence[int]] = (1, 2, 2, 2),
        lin_neurons: int = 256,
    ):
        check_stages(strides, channels=channels, block_sizes=block_sizes)
        super().__init__(
            input_size,
            activation,
            channels[0],
            channels,
            block_sizes,
            strides,
            lin_neurons,
            depth_first_stage,
        )


def depth_first_stage(
    in_channels: int,
    channels: int,
    size: int,
    stride: tuple[int, int],
    activation: Callable[..., nn.Module],
) -> list[nn.Module]:
    """Creates a stage: down-sampling, if needed, and inverted bottlenecks.

    Arguments
    ---------
    in_channels : int
        Channels before the stage.
    channels : int
        Channels of the stage.
    size : int
        Number of blocks.
    stride : tuple of int
        Stride of the stage.
    activation : type
        Class of the activations.

    Returns
    -------
    list of torch.nn.Module
        The layers.
    """
    layers: list[nn.Module] = []
    if stride != (1, 1) or in_channels != channels:
        layers.append(DownSampling(in_channels, channels, stride))
    layers += (InvertedBottleneck(channels, activation) for _ in range(size))
    return layers
