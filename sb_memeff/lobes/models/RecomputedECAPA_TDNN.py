"""SpeechBrain's ECAPA-TDNN, the same weights in a fraction of the memory.

Desplanques et al., "ECAPA-TDNN: Emphasized Channel Attention, Propagation and
Aggregation in TDNN Based Speaker Verification" (2020).

The outputs of its blocks are the smaller part of its activations. Most memory
goes to the concatenation of all block outputs for the multi-layer aggregation,
to the pooling, whose tensors have three times as many channels, and to the
chunks of Res2Net. Here the aggregation, a convolution over the concatenation, is
added up block by block; the pooling processes a few channels at a time; and
everything inside a block is recomputed in backward. The functions of this file
do that for the modules of SpeechBrain's network, in any chain of blocks.

Authors
 * The sb_memeff authors 2026
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from speechbrain.lobes.models.ECAPA_TDNN import (
    ECAPA_TDNN as SpeechBrainECAPA_TDNN,
    Res2NetBlock,
    SEBlock,
    SERes2NetBlock,
    TDNNBlock,
)
from torch import nn

from sb_memeff.lobes.network_input import check_features
from sb_memeff.nnet.attentive_pooling import attentive_statistics_pooling
from sb_memeff.nnet.padding import check_lengths, mask
from sb_memeff.nnet.recompute.segment import Segment
from sb_memeff.nnet.reversible import ReversibleSequence, Tap
from sb_memeff.utils.settings import check_switches
from sb_memeff.utils.sharding import check_gathered

if TYPE_CHECKING:
    from sb_memeff.lobes.models.RevECAPA_TDNN import (
        RevECAPA_TDNN,
        SERes2NetBody,
    )

__all__ = ["ECAPA_TDNN"]


class ECAPA_TDNN(SpeechBrainECAPA_TDNN):
    """Drop-in for ``speechbrain.lobes.models.ECAPA_TDNN.ECAPA_TDNN``.

    Function, arguments and state_dict are the same, so that pretrained weights
    load in either. Only the input of each block and two tensors of the
    aggregation are stored for backward; all else is recomputed.

    Padding affects embeddings as in SpeechBrain's network, for which the weights
    were trained: the convolutions read padded frames after the end of an
    utterance (without padding, the utterance is reflected there), and the masks
    of its statistics may count one padded frame. An embedding therefore
    depends a little on the padding, and NaN in a padded frame makes it NaN.
    Neither is so in ``RevECAPA_TDNN``.

    Arguments
    ---------
    *args : tuple
        Arguments of SpeechBrain's class.
    save_memory : bool
        False stores all activations.
    **kwargs : dict
        Arguments of SpeechBrain's class by name.

    Raises
    ------
    TypeError
        If save_memory or global_context is neither True nor False.
    ValueError
        If arguments contradict each other.

    Example
    -------
    >>> net = ECAPA_TDNN(80, lin_neurons=192)
    >>> net(torch.rand([5, 120, 80])).shape
    torch.Size([5, 1, 192])
    """

    def __init__(self, *args: Any, save_memory: bool = True, **kwargs: Any):
        super().__init__(*args, **kwargs)
        check_switches(
            global_context=self.asp.global_context, save_memory=save_memory
        )
        conv = self.mfa.conv.conv
        check_aggregation(self.channels, *conv.kernel_size, groups=conv.groups)
        self.save_memory = save_memory

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
        chain = [Stem(self.blocks[0])]
        for index, block in enumerate(self.blocks[1:]):
            chain += [SERes2NetResidual(block), Tap(AggregationTerm(index))]
        # Built at each call: as a submodule it would change the state_dict.
        trunk = ReversibleSequence(chain, save_memory=self.save_memory)
        check_lengths(lengths, x)
        return embed(self, aggregate(self, trunk, x, lengths=lengths), lengths)


def tdnn_forward(
    block: TDNNBlock, x: torch.Tensor, padding: torch.Tensor | None = None
) -> torch.Tensor:
    """Applies a TDNNBlock, without SpeechBrain's copy to pad by zero frames.

    Arguments
    ---------
    block : speechbrain.lobes.models.ECAPA_TDNN.TDNNBlock
        The block.
    x : torch.Tensor
        [N, C, T].
    padding : torch.Tensor, optional
        Frames [N, 1, T] that become zero in the result.

    Returns
    -------
    torch.Tensor
        [N, C', T].
    """
    conv = block.conv.conv if block.conv.kernel_size == 1 else block.conv
    x = block.dropout(block.norm(block.activation(conv(x))))
    return mask(x, padding)


def res2net_forward(
    block: Res2NetBlock,
    x: torch.Tensor,
    save_memory: bool = True,
    padding: torch.Tensor | None = None,
) -> torch.Tensor:
    """Applies a Res2NetBlock with the activations of one chunk at a time.

    Arguments
    ---------
    block : speechbrain.lobes.models.ECAPA_TDNN.Res2NetBlock
        The block.
    x : torch.Tensor
        [N, C, T].
    save_memory : bool
        False stores the activations of all chunks.
    padding : torch.Tensor, optional
        Frames [N, 1, T] that are zero in x, and become zero in the result.

    Returns
    -------
    torch.Tensor
        [N, C, T].
    """
    first, *chunks = x.chunk(block.scale, dim=1)
    results = [first]
    for chunk, layer in zip(chunks, block.blocks):
        # Stored as a view, the first chunk would keep all of x.
        chunk = chunk.clone() if len(results) == 1 else chunk + results[-1]
        arguments = layer, chunk, padding
        if save_memory and torch.is_grad_enabled():
            name = f"{type(block).__name__}.blocks.{len(results) - 1}"
            result = Segment().call(name, layer, tdnn_forward, arguments, {})
        else:
            result = tdnn_forward(*arguments)
        results.append(result)
    return torch.cat(results, dim=1)


def se_res2net_forward(
    block: "SERes2NetBlock | SERes2NetBody",
    x: torch.Tensor,
    lengths: torch.Tensor | None = None,
    save_memory: bool = True,
    padding: torch.Tensor | None = None,
) -> torch.Tensor:
    """Applies an SERes2NetBlock without its shortcut.

    Arguments
    ---------
    block : speechbrain.lobes.models.ECAPA_TDNN.SERes2NetBlock
        The block, or a module with the same submodules.
    x : torch.Tensor
        [N, C, T].
    lengths : torch.Tensor, optional
        Relative lengths [N], to count frames as SpeechBrain does.
    save_memory : bool
        See ``res2net_forward``.
    padding : torch.Tensor, optional
        Instead of lengths: frames [N, 1, T] that do not count, and become zero
        in the result.

    Returns
    -------
    torch.Tensor
        [N, C', T].
    """
    x = tdnn_forward(block.tdnn1, x, padding)
    x = res2net_forward(block.res2net_block, x, save_memory, padding)
    x = tdnn_forward(block.tdnn2, x, padding)
    if padding is None:
        return block.se_block(x, lengths)
    return squeeze_excite_forward(block.se_block, x, padding)


def squeeze_excite_forward(
    block: SEBlock, x: torch.Tensor, padding: torch.Tensor
) -> torch.Tensor:
    """Applies an SEBlock that counts the frames of each utterance exactly.

    Arguments
    ---------
    block : speechbrain.lobes.models.ECAPA_TDNN.SEBlock
        The block.
    x : torch.Tensor
        [N, C, T], zero in padded frames.
    padding : torch.Tensor
        Padded frames, [N, 1, T].

    Returns
    -------
    torch.Tensor
        [N, C, T], zero in padded frames.
    """
    # In float16 the sum of hundreds of frames may overflow.
    total = x.sum(
        2, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32)
    )
    mean = (total / (~padding).sum(2, keepdim=True)).to(x.dtype)
    scale = block.sigmoid(block.conv2(block.relu(block.conv1(mean))))
    return scale * x


def aggregate(
    net: "ECAPA_TDNN | RevECAPA_TDNN",
    trunk: ReversibleSequence,
    x: torch.Tensor,
    **arguments: torch.Tensor | None,
) -> torch.Tensor:
    """Computes the multi-layer feature aggregation of an ECAPA-TDNN.

    Arguments
    ---------
    net : torch.nn.Module
        Has the submodule ``mfa`` of SpeechBrain's network.
    trunk : ReversibleSequence
        The blocks, each followed by a tap (``AggregationTerm``).
    x : torch.Tensor
        Features [N, T, input_size].
    **arguments : dict
        Further arguments of the trunk.

    Returns
    -------
    torch.Tensor
        [N, C, T].

    Raises
    ------
    TypeError
        If the dtype of x does not fit.
    ValueError
        If the shape of x does not fit.
    RuntimeError
        If parts of the network are sharded by fully_shard.
    """
    # The blocks' parts are called here, and weights of mfa and asp are read.
    check_gathered(net, type(net).__name__, "the network")
    first = cast(Stem, trunk.blocks[0]).block.conv.conv
    check_features(x, first.in_channels, first.weight.dtype)
    conv = net.mfa.conv.conv
    num_taps = sum(isinstance(block, Tap) for block in trunk.blocks)
    # The sum has no name, so that it is freed after the activation.
    x = net.mfa.activation(
        trunk(
            x,
            weights=conv.weight.chunk(num_taps, dim=1),
            bias=conv.bias,
            save_memory=trunk.save_memory,
            **arguments,
        )[1]
    )
    return net.mfa.dropout(net.mfa.norm(x))


def embed(
    net: "ECAPA_TDNN | RevECAPA_TDNN",
    x: torch.Tensor,
    lengths: torch.Tensor | None = None,
    padding: torch.Tensor | None = None,
) -> torch.Tensor:
    """Pools the aggregated features of an ECAPA-TDNN to embeddings.

    Arguments
    ---------
    net : torch.nn.Module
        Has the submodules ``asp``, ``asp_bn`` and ``fc`` of SpeechBrain's
        network.
    x : torch.Tensor
        Aggregated features [N, C, T].
    lengths : torch.Tensor, optional
        Relative lengths [N], to count frames as SpeechBrain does.
    padding : torch.Tensor, optional
        Instead of lengths: frames [N, 1, T] that do not count.

    Returns
    -------
    torch.Tensor
        Embeddings [N, 1, lin_neurons].
    """
    x = attentive_statistics_pooling(
        net.asp, x, lengths, net.save_memory, padding
    )
    # Statistics are float32 at least; a network in half precision is not.
    x = net.asp_bn(x.to(net.fc.conv.weight.dtype))
    return net.fc(x).transpose(1, 2)


class Stem(nn.Module):
    """The first TDNN block, from features [N, T, F] to [N, C, T].

    Arguments
    ---------
    block : speechbrain.lobes.models.ECAPA_TDNN.TDNNBlock
        The block.
    shortcut : torch.nn.Module, optional
        Follows the block if the channels change.
    """

    takes_arguments = ("padding",)

    def __init__(self, block: TDNNBlock, shortcut: nn.Module | None = None):
        super().__init__()
        self.block = block
        self.shortcut = shortcut

    def forward(
        self, x: torch.Tensor, padding: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Applies the block.

        Arguments
        ---------
        x : torch.Tensor
            Features [N, T, F].
        padding : torch.Tensor, optional
            Frames [N, 1, T] that count as zero, and become zero in the
            result.

        Returns
        -------
        torch.Tensor
            [N, C, T].
        """
        x = x.transpose(1, 2)
        if padding is not None:
            x = x.masked_fill(padding, 0.0)
        x = tdnn_forward(self.block, x, padding)
        return x if self.shortcut is None else mask(self.shortcut(x), padding)


class SERes2NetResidual(nn.Module):
    """An SERes2NetBlock that recomputes the chunks of Res2Net.

    Arguments
    ---------
    block : speechbrain.lobes.models.ECAPA_TDNN.SERes2NetBlock
        The block.
    """

    takes_arguments = ("lengths", "save_memory")

    def __init__(self, block: SERes2NetBlock):
        super().__init__()
        self.block = block

    def forward(
        self,
        x: torch.Tensor,
        lengths: torch.Tensor | None,
        save_memory: bool,
    ) -> torch.Tensor:
        """Applies the block.

        Arguments
        ---------
        x : torch.Tensor
            [N, C, T].
        lengths : torch.Tensor
            Relative lengths [N], or None.
        save_memory : bool
            See ``res2net_forward``.

        Returns
        -------
        torch.Tensor
            [N, C', T].
        """
        shortcut = self.block.shortcut
        residual = x if shortcut is None else shortcut(x)
        return residual + se_res2net_forward(
            self.block, x, lengths, save_memory
        )


class AggregationTerm(nn.Module):
    """The term of one tap in the multi-layer feature aggregation.

    A 1x1 convolution over the concatenated states is a sum over taps, each with
    its columns of the weight.

    Arguments
    ---------
    index : int
        Index of the tap.
    """

    takes_arguments = ("weights", "bias")

    def __init__(self, index: int):
        super().__init__()
        self.index = index

    def forward(
        self,
        x: torch.Tensor,
        weights: Sequence[torch.Tensor],
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """Computes the term from the state of the chain.

        Arguments
        ---------
        x : torch.Tensor
            [N, C, T].
        weights : tuple of torch.Tensor
            Columns [C', C, 1] of the weight for each tap.
        bias : torch.Tensor
            [C'], added by the first tap.

        Returns
        -------
        torch.Tensor
            [N, C', T].
        """
        bias = bias if self.index == 0 else None
        return F.conv1d(x, weights[self.index], bias)


def check_aggregation(
    channels: Sequence[int], kernel_size: int, groups: int
) -> None:
    """Checks that the aggregation is a sum over blocks.

    Arguments
    ---------
    channels : list of int
        Argument of the network.
    kernel_size : int
        Kernel of the aggregation.
    groups : int
        Groups of the aggregation.

    Raises
    ------
    ValueError
        If it is not.
    """
    if len(channels) < 3 or len(set(channels[1:-1])) != 1:
        raise ValueError(
            f"channels must hold that of the first TDNN block, that of each "
            f"SE-Res2Net block (all the same: they are aggregated) and that "
            f"of the aggregation, got {list(channels)}."
        )
    if kernel_size != 1 or groups != 1:
        raise ValueError(
            f"The aggregation (the last of kernel_sizes and groups) must be "
            f"a 1x1 convolution in one group, which is a sum over blocks; "
            f"got a kernel of {kernel_size} in {groups} groups."
        )
