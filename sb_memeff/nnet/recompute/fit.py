"""Recomputation of as few blocks as a memory budget allows.

Authors
 * The sb_memeff authors 2026
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from speechbrain.utils.autocast import AMPConfig
from speechbrain.utils.logger import get_logger
from torch import nn

from sb_memeff.memory.fake import without_data
from sb_memeff.memory.step import training_step_memory
from sb_memeff.memory.units import format_bytes, parse_bytes
from sb_memeff.nnet.recompute.blocks import apply_to_blocks, recompute_blocks
from sb_memeff.nnet.recompute.selection import find_segments, refuse_nested

__all__ = ["fit_recompute"]

logger = get_logger(__name__)


def fit_recompute(
    module: nn.Module,
    blocks: str | Sequence[str],
    budget: int | str,
    example: Sequence[int] | Callable[[Any], torch.Tensor],
    segment_length: int = 1,
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
    | None = None,
    precision: str = "fp32",
) -> float | None:
    """Recomputes as few of the blocks as a memory budget allows.

    The peak of a training step (parameters, gradients, activations,
    temporaries and, optionally, optimizer states) is counted on tensors without
    data, without a GPU or arithmetic. Convolution workspaces, the CUDA context
    and memory outside ``module`` (classifier, augmentation) are not counted:
    leave room for them.

    Arguments
    ---------
    module : torch.nn.Module
        The network.
    blocks : str or list of str
        See ``recompute_blocks``.
    budget : int or str
        Bytes, or a size such as "11GB" or "10.5 GiB".
    example : list of int or callable
        Shape of the largest float32 input of a training batch, or a function
        that calls the module, its argument, and returns a tensor, such as
        ``lambda net: net(torch.zeros(16, 250, 640), torch.ones(16))``.
    segment_length : int
        See ``recompute_blocks``.
    optimizer : callable, optional
        ``!ref <opt_class>``, to count its states too.
    precision : str
        fp32, fp16 or bf16, as in SpeechBrain's run options.

    Returns
    -------
    float
        The chosen ``every``; None if nothing needs to be recomputed.

    Raises
    ------
    ValueError
        If the budget is too small (the message gives the smallest), or as
        ``recompute_blocks``. The module is then unchanged.

    Example
    -------
    >>> def block():
    ...     layers = [torch.nn.Linear(64, 64), torch.nn.Tanh()]
    ...     return torch.nn.Sequential(*layers, *layers)
    >>> net = torch.nn.Sequential(*(block() for _ in range(12)))
    >>> fit_recompute(net, "*", budget="5.5MB", example=[1000, 64])
    1.5
    """
    segments = find_segments(module, blocks, segment_length)
    refuse_nested(segments, "fit_recompute")
    count = len(segments)
    limit = parse_bytes(budget)
    autocast = AMPConfig.from_name(precision).dtype
    if autocast == torch.float32:
        autocast = None
    if not callable(example):
        example = tuple(example)

    @functools.cache
    def peak(recomputed: int) -> int:
        def build() -> nn.Module:
            network = without_data(module)
            if recomputed:
                apply_to_blocks(
                    network, blocks, count / recomputed, segment_length
                )
            return network

        return training_step_memory(
            build, example, optimizer=optimizer, autocast=autocast
        ).peak_bytes

    network_name = type(module).__name__
    if peak(0) <= limit:
        logger.info(
            f"{network_name}: a step takes {format_bytes(peak(0))} with all "
            f"activations stored; nothing is recomputed."
        )
        return None
    if peak(count) > limit:
        raise ValueError(
            f"fit_recompute: {network_name} does not fit into "
            f"{format_bytes(limit)}. "
            f"With all of {blocks} recomputed a step still takes "
            f"{format_bytes(peak(count))} ({format_bytes(peak(0))} with all "
            f"activations stored). Name more or smaller blocks, or use a "
            f"smaller batch."
        )
    # The more blocks are recomputed, the less memory a step takes.
    too_few, enough = 0, count
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        if peak(middle) <= limit:
            enough = middle
        else:
            too_few = middle
    every = count / enough
    logger.info(
        f"{network_name}: with every={every:.4g} a step takes "
        f"{format_bytes(peak(enough))} of {format_bytes(limit)} "
        f"({format_bytes(peak(0))} with all activations stored)."
    )
    recompute_blocks(module, blocks, every, segment_length)
    return every
