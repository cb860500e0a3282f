"""The transducer loss of logits, on any device.

Authors
 * The sb_memeff authors 2026
"""

from collections.abc import Sequence
from typing import Any

import torch

from sb_memeff.nnet.transducer_loss.batch import (
    Reduction,
    check_counts,
    check_dense,
    check_settings,
    check_tensors,
    count,
    reduce,
)
from sb_memeff.nnet.transducer_loss.cells import cells_inside, next_targets
from sb_memeff.ops.lattice import loss_and_occupancies
from sb_memeff.ops.logit_rows import row_gradient, row_scores, wide_dtype
from sb_memeff.utils.autograd import refuse_double_backward
from sb_memeff.utils.settings import check_switches

__all__ = ["transducer_loss"]

# Number of logits in float32 at the same time.
CHUNK = 1 << 22


def transducer_loss(
    logits: torch.Tensor,
    targets: torch.Tensor,
    input_lens: torch.Tensor,
    target_lens: torch.Tensor,
    blank_index: int,
    reduction: Reduction = "mean",
    fastemit_lambda: float = 0.0,
    clamp: float | None = None,
    overwrite_logits: bool = False,
) -> torch.Tensor:
    """Transducer loss that replaces speechbrain.nnet.losses.transducer_loss.

    It needs neither numba nor CUDA, and one additional tensor of the size of the
    logits, their gradient. ``TransducerJointLoss`` needs neither of these two
    tensors.

    Arguments
    ---------
    logits : torch.Tensor
        [B, T, U+1, V], before the softmax.
    targets : torch.Tensor
        [B, U], without blanks.
    input_lens : torch.Tensor
        [B], relative to T.
    target_lens : torch.Tensor
        [B], relative to U.
    blank_index : int
        The blank.
    reduction : str
        "mean", "sum" and "none" ([B]) have the values and the gradients of
        SpeechBrain 1.1: the values are of nll / frames, but the gradients are
        those of the sum of nll ("none": of each nll). "nll_mean", "nll_sum"
        and "nll" ([B]) are the plain mean, sum and negative log-likelihoods;
        SpeechBrain 1.0's ``use_torchaudio=True`` returns these.
    fastemit_lambda : float
        FastEmit (arXiv 2010.11148) with NeMo's meaning: the value and the
        gradient through emissions are multiplied by 1 + lambda.
    clamp : float, optional
        Limit of each element of the gradient of a sample's loss with respect
        to the logits, as in NeMo; before reduction and loss scale.
    overwrite_logits : bool
        Whether backward may write the gradient over the logits. They must not
        be used afterwards, nor be needed by the operation that made them.
        Logits that are not contiguous get a separate gradient.

    Returns
    -------
    torch.Tensor
        The loss, at least float32.

    Raises
    ------
    TypeError
        If overwrite_logits is neither True nor False, or an argument is not a
        dense tensor.
    ValueError
        If shapes, lengths, targets, the blank or settings are invalid. The
        message names the sample.

    Example
    -------
    >>> logits = torch.zeros(1, 2, 2, 4, requires_grad=True)
    >>> loss = transducer_loss(
    ...     logits,
    ...     torch.tensor([[3]]),
    ...     torch.tensor([1.0]),
    ...     torch.tensor([1.0]),
    ...     blank_index=0,
    ...     reduction="nll_sum",
    ... )
    >>> bool(torch.isclose(loss, torch.tensor(2 / 4**3).log().neg()))
    True
    """
    check_settings(reduction, fastemit_lambda, clamp)
    check_switches(overwrite_logits=overwrite_logits)
    check_dense(
        logits=logits,
        targets=targets,
        input_lens=input_lens,
        target_lens=target_lens,
    )
    _check_shapes(logits, targets, input_lens, target_lens)
    logit_lengths = count(input_lens, logits.shape[1], "frames")
    targets = targets.long()
    target_lengths = count(target_lens, targets.shape[1], "targets")
    lengths = check_counts(
        (input_lens, target_lens),
        logit_lengths,
        target_lengths,
        targets,
        blank_index,
        logits.shape[3],
    )
    nll = _TransducerLoss.apply(
        logits,
        targets,
        logit_lengths,
        target_lengths,
        lengths,
        blank_index,
        fastemit_lambda,
        clamp,
        overwrite_logits,
    )
    return reduce(nll, logit_lengths, reduction)


def _check_shapes(
    logits: torch.Tensor,
    targets: torch.Tensor,
    input_lens: torch.Tensor,
    target_lens: torch.Tensor,
) -> None:
    if logits.dim() != 4 or 0 in logits.shape or not len(logits):
        raise ValueError(
            "logits must be [B, T, U+1, V] and not empty, not "
            f"{tuple(logits.shape)}."
        )
    if not logits.is_floating_point():
        raise ValueError(
            f"logits must have a floating-point dtype: {logits.dtype}."
        )
    batch, _, columns, _ = logits.shape
    if targets.shape != (batch, columns - 1):
        raise ValueError(
            f"targets must be [B, U] = [{batch}, {columns - 1}] for logits "
            f"{list(logits.shape)}, not {list(targets.shape)}: the prediction "
            "network's input is a blank and then all targets."
        )
    lengths = {"input_lens": input_lens, "target_lens": target_lens}
    check_tensors(batch, lengths, targets, {"logits": logits})


class _TransducerLoss(torch.autograd.Function):
    """Negative log-likelihoods [B] of the logits."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        targets: torch.Tensor,
        logit_lengths: torch.Tensor,
        target_lengths: torch.Tensor,
        lengths: tuple[list[int], list[int]],
        blank_index: int,
        fastemit_lambda: float,
        clamp: float | None,
        overwrite_logits: bool,
    ) -> torch.Tensor:
        batch, rows, columns, vocabulary = logits.shape
        cells = cells_inside(
            logit_lengths, target_lengths, rows, columns, lengths
        )
        symbols = next_targets(targets, target_lengths)
        planes = logits.new_zeros(
            3, batch * rows * columns, dtype=wide_dtype(logits.dtype)
        )
        for chunk in _chunks(cells, vocabulary):
            sample, t, u = _locate(chunk, rows, columns)
            planes[:, chunk] = row_scores(
                logits[sample, t, u], symbols[sample, u], blank_index
            )
        lse, blank, target = planes.view(3, batch, rows, columns)
        nll, blank, emission = loss_and_occupancies(
            blank, target, logit_lengths, target_lengths, fastemit_lambda
        )
        ctx.blank_index, ctx.clamp = blank_index, clamp
        ctx.overwrite_logits = overwrite_logits
        ctx.save_for_backward(
            logits,
            lse.flatten(),
            cells,
            symbols,
            blank,
            emission,
        )
        return nll

    @staticmethod
    # pyrefly: ignore[bad-override]
    def backward(
        ctx: Any, upstream: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        refuse_double_backward(
            "transducer_loss", "leave out what needs second derivatives"
        )
        logits, lse, cells, symbols, blank, emission = ctx.saved_tensors
        logits = logits.detach()
        _, rows, columns, vocabulary = logits.shape
        # With other strides elements may share memory.
        if ctx.overwrite_logits and logits.is_contiguous():
            gradient = logits
            inside = torch.zeros(
                logits.shape[:3], dtype=torch.bool, device=logits.device
            )
            inside.view(-1)[cells] = True
            gradient.masked_fill_(~inside[..., None], 0)
        else:
            gradient = logits.new_zeros(logits.shape)
        for chunk in _chunks(cells, vocabulary):
            sample, t, u = _locate(chunk, rows, columns)
            found, _ = row_gradient(
                logits[sample, t, u],
                lse[chunk],
                symbols[sample, u],
                blank[chunk],
                emission[chunk],
                ctx.blank_index,
                clamp=ctx.clamp,
                weight=upstream[sample],
            )
            gradient[sample, t, u] = found
        return gradient, *[None] * 8


def _locate(
    cells: torch.Tensor, rows: int, columns: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sample, frame and number of targets of flat indices in [B, T, U+1]."""
    frame = cells // columns
    return frame // rows, frame % rows, cells % columns


def _chunks(cells: torch.Tensor, vocabulary: int) -> Sequence[torch.Tensor]:
    return cells.split(max(1, CHUNK // vocabulary))
