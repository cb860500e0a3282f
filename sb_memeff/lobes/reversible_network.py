"""The base of the reversible residual networks.

Each residual function of the vanilla network becomes f or g of an additive
coupling (``sb_memeff.nnet.reversible``), so that a coupling replaces two
residual blocks. There are two types, after Liu and Qian, "Memory-Efficient
Training for Deep Speaker Embedding Learning in Speaker Verification" (2024):

* Type I, ``downsampling="strided"``, partially reversible: the transitions
  between the stages are strided and cannot be inverted, so the last output of
  each stage is stored.
* Type II, ``downsampling="invertible"``, fully reversible: space-to-depth
  between the stages. Only the last output is stored.

Stem, transitions and pooling are part of the same memory-saving chain and are
recomputed.

Authors
 * The sb_memeff authors 2026
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import nn

from sb_memeff.lobes.network_input import check_features
from sb_memeff.lobes.presets import Presets
from sb_memeff.lobes.residual import (
    EmbeddingHead,
    check_stages,
    initialise,
    output_bands,
    stride_pairs,
)
from sb_memeff.lobes.reversible_blocks import (
    NormActConv,
    PooledStatistics,
    ResidualBody,
    Stem,
)
from sb_memeff.nnet.padding import padding_masks
from sb_memeff.nnet.reversible import (
    AdditiveCoupling,
    ReversibleSequence,
    SpaceToDepth,
)
from sb_memeff.utils.settings import check_integer

if TYPE_CHECKING:
    from sb_memeff.lobes.models.RevDFResNet import StridedConvolution
    from sb_memeff.lobes.models.RevResNet import StridedCoupling

__all__ = ["ReversibleNetwork"]


class ReversibleNetwork(Presets, nn.Module):
    """Stem, four stages of couplings, pooling and embedding.

    The base of the reversible ResNets. All but the embedding is one
    memory-saving chain.

    Arguments
    ---------
    input_size : int
        Number of features per frame.
    activation : type
        Class of the activations; they must map zero to zero (padding).
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
        Reduce the last stage to this number of channels before pooling.
    downsampling : str
        "strided" (Type I) or "invertible" (Type II).
    save_memory : bool
        False stores all activations.
    make_residual : callable
        (in_channels, channels, out_channels, stage=, activation=) to the f
        or g of a coupling.
    make_transition : callable
        (in_channels, channels, out_channels, stride, stage, activation) to
        the module between two stages of Type I; channels are those of one
        stream. Its attribute ``num_couplings`` is the number of couplings of
        its stage that it replaces.
    """

    @classmethod
    def preset_arguments(
        cls,
        name: str,
        downsampling: Literal["strided", "invertible"] = "strided",
        base_channels: int = 32,
        **overrides: Any,
    ) -> dict[str, Any]:
        """The arguments of a preset.

        Arguments
        ---------
        name : str
            A key of PRESETS.
        downsampling : str
            "strided" (Type I) or "invertible" (Type II).
        base_channels : int
            Scales all widths; the presets have 32.
        **overrides : dict
            Arguments of the class that replace those of the preset.

        Returns
        -------
        dict
            Keyword arguments of the class.

        Raises
        ------
        ValueError
            For an unknown kind of down-sampling, or if base_channels scales
            a width to a number that is not whole.
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
        check_integer("input_size", input_size, 1)
        if pool_channels is not None:
            check_integer("pool_channels", pool_channels, 1)
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
                size -= transition.num_couplings
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
        pooled = 2 * width * output_bands(input_size, strides)
        self.embedding = EmbeddingHead(pooled, lin_neurons)
        initialise(self)
        for body in self.modules():
            if isinstance(body, ResidualBody):
                # Each coupling is initialised as the identity, as the vanilla
                # blocks are as their shortcuts. Otherwise each adds variance to
                # a stream, and Type I hardly learns.
                last = cast(NormActConv, body.layers[-1])
                nn.init.zeros_(last.conv.weight)

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


def scale_widths(
    widths: int | list[int], base_channels: int
) -> int | list[int]:
    """Scales the widths of a preset.

    Arguments
    ---------
    widths : int or list of int
        Widths for base_channels=32.
    base_channels : int
        The base_channels of the result.

    Returns
    -------
    int or list of int
        The scaled widths.

    Raises
    ------
    ValueError
        If one of them is not whole.
    """
    if isinstance(widths, list):
        return [
            cast(int, scale_widths(width, base_channels)) for width in widths
        ]
    check_integer("base_channels", base_channels, 1)
    if widths * base_channels % 32:
        raise ValueError(
            f"base_channels={base_channels} does not scale a width of "
            f"{widths} to a whole number; use a multiple of 2, best of 8 "
            f"(the presets have 32)."
        )
    return widths * base_channels // 32


def check_downsampling(downsampling: str) -> None:
    """Checks the kind of down-sampling.

    Arguments
    ---------
    downsampling : str
        Its name.

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
    """Checks that invertible down-sampling keeps the number of values.

    Arguments
    ---------
    channels : list of int
        Channels of each stage.
    strides : list of tuple
        (time, frequency) of each stage.

    Raises
    ------
    ValueError
        If the channels do not grow by time * frequency; the message lists
        those that do.
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
