"""Reversible ResNets for speaker recognition: depth costs no memory.

``sb_memeff.lobes.reversible_network`` explains the two types.

Authors
 * The sb_memeff authors 2026
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
from torch import nn

from sb_memeff.lobes.models.WeSpeakerResNet import BLOCKS
from sb_memeff.lobes.residual import (
    check_block,
    check_stages,
    conv1x1,
    stride_pairs,
)
from sb_memeff.lobes.reversible_blocks import ResidualBody
from sb_memeff.lobes.reversible_network import ReversibleNetwork
from sb_memeff.nnet.padding import mask

__all__ = ["RevResNet", "StridedCoupling"]


class StridedCoupling(nn.Module):
    """y1 = p(x1) + f(x2), y2 = q(x2) + g(y1) with strided p, q and f.

    The transition between two stages of a partially reversible network. It
    cannot be inverted, since p and q are strided 1x1 convolutions. A batch norm
    precedes them. Without it the scales of all stages multiply, and in training
    at a high learning rate the streams leave their grid.

    Arguments
    ---------
    block : str
        Kind of f and g, see ``ResidualBody``.
    in_channels : int
        Channels of each input stream.
    channels : int
        Channels inside f and g.
    out_channels : int
        Channels of each output stream.
    stride : int or tuple of int
        Stride.
    stage : int
        Index of the output's padding mask.
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
    # It replaces one coupling of its stage.
    num_couplings = 1

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
        """Applies the transition.

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
        # To stride before the norm takes a quarter of the memory.
        time, frequency = self.stride
        y = function(x[..., ::time, ::frequency])
        return mask(y, None if masks is None else masks[self.stage])


class RevResNet(ReversibleNetwork):
    """Reversible ResNet; a drop-in for ``speechbrain.lobes.models.ResNet``.

    It has half as many units as the vanilla network, each with two residual
    functions, as in Gomez et al. The streams are wider than the vanilla network
    in stages 3 and 4, which have most parameters, but not in stages 1 and 2,
    which need most memory. ``channels`` counts both streams, ``inner`` is the
    width within f and g.

    ========= ==== ============ ===================== ================= =======
    preset    type block_sizes  channels              inner             params
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

    RevNet34 has basic blocks, the others bottlenecks. Type II reduces the
    channels of the last stage before pooling (``pool_channels``): to 256 in
    RevNet34, to 768 in the others.

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
        Couplings in each stage, each with two residual functions. With
        strided down-sampling the first coupling of stages 2 to 4 is the
        transition.
    strides : list
        Stride of each stage: a number, or a pair (time, frequency).
    lin_neurons : int
        Size of the embedding.
    block : str
        Kind of f and g: "basic" or "bottleneck".
    inner_channels : list of int, optional
        Channels inside f and g. By default as many as a stream has ("basic")
        or a quarter ("bottleneck").
    pool_channels : int, optional
        Reduce the last stage to this number of channels before pooling. The
        embedding layer has 2 * pool_channels * bands inputs.
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
        check_stages(strides, channels=channels)
        if inner_channels is None:
            divisor = 2 if block == "basic" else 8
            inner_channels = [max(c // divisor, 1) for c in channels]
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
