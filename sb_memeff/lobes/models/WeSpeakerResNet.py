"""Deep residual networks for speaker recognition.

The networks that WeSpeaker publishes, which the memory-efficient ones are
compared with: He et al., "Deep Residual Learning for Image Recognition"
(2016), with a 3x3 stem without pooling and temporal statistics pooling.

Authors
 * The sb_memeff authors 2026
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

from torch import nn

from sb_memeff.lobes.residual import (
    BasicBlock,
    Bottleneck,
    StagedNetwork,
    check_block,
    check_stages,
)

__all__ = ["ResNet"]

BLOCKS = {"basic": BasicBlock, "bottleneck": Bottleneck}


class ResNet(StagedNetwork):
    """Residual network with temporal statistics pooling.

    A drop-in replacement for ``speechbrain.lobes.models.ResNet.ResNet``. Unlike
    that class it respects ``lengths``: the values of padded frames, NaN included, affect
    neither embeddings nor gradients, and in eval mode the embedding of an
    utterance does not depend on its padding. In training mode padded frames
    count as zeros in the statistics of batch norm.

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
        Class of the activations; they must map zero to zero (padding).
    channels : list of int
        Output channels of each of the four stages.
    block_sizes : list of int
        Residual blocks in each stage.
    strides : list
        Stride of each stage: a number, or a pair (time, frequency).
    lin_neurons : int
        Size of the embedding.
    block : str
        "basic" or "bottleneck".
    published_head : bool
        Pooling and embedding exactly as in WeSpeaker, whose published weights
        need them (``sb_memeff.export.wespeaker``): unbiased standard deviation,
        no batch norm around the embedding.

    Raises
    ------
    ValueError
        If arguments contradict each other; for an unknown preset.

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
        """The arguments of a preset.

        Arguments
        ---------
        name : str
            A key of PRESETS.
        base_channels : int
            Channels inside the blocks of the first stage; each further stage
            has twice as many. The published networks have 32.
        **overrides : dict
            Arguments of the class that replace those of the preset.

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
        published_head: bool = False,
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
            published_head,
        )


def residual_stage(
    kind: type[BasicBlock] | type[Bottleneck],
    in_channels: int,
    channels: int,
    size: int,
    stride: int | tuple[int, int],
    activation: Callable[..., nn.Module],
) -> list[nn.Module]:
    """Creates the blocks of a stage, the first of them strided.

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
    inner_channels = channels // kind.expansion
    first = kind(in_channels, inner_channels, stride, activation)
    others = (
        kind(channels, inner_channels, 1, activation) for _ in range(size - 1)
    )
    return [first, *others]
