"""Depth-first residual networks for speaker recognition.

Liu et al., "DF-ResNet: Boosting Speaker Verification Performance with
Depth-First Design" (Interspeech 2022): many cheap blocks instead of few wide
ones. And the same with the strides of Liu et al., "Golden Gemini is All You
Need" (2023), which halve the bands in each stage and the frames only once.

Authors
 * The sb_memeff authors 2026
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from sb_memeff.lobes.models.ResNet import (
    Bottleneck,
    StagedNetwork,
    check_stages,
    conv3x3,
)
from sb_memeff.nnet.padding import mask

__all__ = ["DFResNet", "DownSampling", "InvertedBottleneck"]

# (time, frequency): T14c in the paper's trellis of strides.
GOLDEN_GEMINI = [[1, 2], [2, 2], [1, 2], [1, 2]]

# The names of the original count the layers of stem, blocks and embedding;
# those of the other paper count the four down-sampling layers too.
BLOCK_SIZES = {
    56: [3, 3, 9, 3],
    110: [3, 3, 27, 3],
    179: [3, 8, 45, 3],
    233: [3, 8, 63, 3],
}


class InvertedBottleneck(Bottleneck):
    """1x1 to four times the channels, depthwise 3x3, 1x1 back; a shortcut.

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
        inside = self.expansion * channels
        super().__init__(
            channels,
            inside,
            activation=activation,
            out_channels=channels,
            groups=inside,
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
        """Runs the layer.

        Arguments
        ---------
        x : torch.Tensor
            [N, in_channels, T, F], zero in padded frames.
        padding : torch.Tensor, optional
            Padded frames of the output, [N, 1, T', 1].
        padding_in : torch.Tensor, optional
            Not needed here; blocks need it.

        Returns
        -------
        torch.Tensor
            [N, out_channels, T', F'].
        """
        return mask(self.norm(self.conv(x)), padding)


class DFResNet(StagedNetwork):
    """Depth-first residual network with temporal statistics pooling.

    Called like ``speechbrain.lobes.models.ResNet.ResNet``; respects
    ``lengths`` as our ``ResNet`` does. A stage begins with a down-sampling
    layer if it has a stride or other channels than the stage before.

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

    Golden Gemini ends with half the frames and a sixteenth of the bands, the
    others with an eighth of both.

    Arguments
    ---------
    input_size : int
        Number of features per frame.
    activation : type
        Class of the activations; they must leave zero zero (padding).
    channels : list of int
        Channels of each of the four stages; the stem has those of the first.
    block_sizes : list of int
        Inverted bottlenecks in each stage.
    strides : list
        Stride of each stage: a number, or a pair (time, frequency).
    lin_neurons : int
        Size of the embedding.

    Raises
    ------
    ValueError
        If an argument does not fit the others; for an unknown preset.

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
        """The arguments that a preset stands for.

        Arguments
        ---------
        name : str
            A key of PRESETS.
        base_channels : int
            Channels of the first stage; each further stage has twice as
            many. The published networks have 32.
        **overrides : dict
            Arguments of the class that shall differ.

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
    """A down-sampling layer, where one is needed, and inverted bottlenecks.

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
