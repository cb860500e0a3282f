"""The transducer loss from encoder and predictor, a few logits at a time.

The method "samplewise" is that of Braun, McDermott and Hsiao, Neural Transducer
Training: Reduced Memory Consumption with Sample-wise Computation (arXiv
2211.16270). The method "tiled" divides the packed cells of the batch into tiles.
It computes each tile for the scores, and recomputes for the gradients the cells
that paths are likely to visit. If all samples have the same weight, both compute
the gradients in forward.

Authors
 * The sb_memeff authors 2026
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
from speechbrain.utils.logger import get_logger
from torch import nn

from sb_memeff.nnet.replay.mismatch import next_forward
from sb_memeff.nnet.replay.recorder import (
    Recorder,
    check_fingerprint,
    fingerprint,
)
from sb_memeff.nnet.transducer_loss.batch import (
    PER_SAMPLE,
    Reduction,
    check_counts,
    check_dense,
    check_settings,
    check_tensors,
    count,
    reduce,
)
from sb_memeff.nnet.transducer_loss.cells import CellLogits, Cells, Gradients
from sb_memeff.nnet.transducer_loss.logits_loss import transducer_loss
from sb_memeff.nnet.transducer_loss.modules import (
    check_modules,
    check_widths,
    declared_vocabulary,
    unchanged,
)
from sb_memeff.nnet.transducer_loss.passes import TiledPass, WholePass
from sb_memeff.nnet.transducer_loss.sum_joint import SumJoint, SumJointPass
from sb_memeff.ops.dispatch import has_values
from sb_memeff.utils.autograd import refuse_double_backward
from sb_memeff.utils.settings import check_integer, check_number
from sb_memeff.utils.sharding import check_gathered

__all__ = ["TransducerJointLoss"]

logger = get_logger(__name__)

METHODS = ("tiled", "samplewise", "batched")
# Maximum number of tiles, and of cells, in a group of samples, whose planes of
# scores are in memory at the same time.
GROUP_TILES = 64
GROUP_CELLS = 1 << 20


class TransducerJointLoss(nn.Module):
    """Joint network, classifier and transducer loss in one module.

    It never stores the [B, T, U+1, V] logits. In Brain's ``modules`` it replaces
    joint and classifier. Decoders use the same joint and classifier as before.

    Arguments
    ---------
    joint : torch.nn.Module
        speechbrain.nnet.transducer.transducer_joint.Transducer_joint, or any
        module of [N, T, 1, H] and [N, 1, U, H] that treats each cell
        independently, as linear layers, LayerNorm, dropout and nonlinearities
        do. Tiles are two tensors [N, 1, 1, H]. "tiled" and "samplewise"
        refuse modules that are known to mix cells (batch norm in training,
        GroupNorm, recurrent layers, attention, wide convolutions). They
        cannot detect mixing by plain operations.
    classifier : torch.nn.Module
        Maps rows [N, H] to logits [N, V], each row independently.
    blank_index : int
        The blank.
    reduction : str
        "mean", "sum" and "none" are SpeechBrain 1.1's, "nll_mean", "nll_sum"
        and "nll" are plain; see sb_memeff.nnet.transducer_loss.transducer_loss.
    method : str
        "tiled" computes at most max_rows rows of logits at a time, for any
        length of a sample; "samplewise" the logits of one sample at a time,
        each once; "batched", the reference, all at once.
    max_rows : int, optional
        Rows of a tile. The default is 2,048 on a CPU. On other devices, where
        launches must not limit the speed, it is 2^26 / V, but at least 8,192
        and at most 32,768; 65,536 can be faster but takes more memory.
    occupancy_floor : float
        In backward "tiled" skips cells that paths visit with a lower
        probability. The gradient of a cell's logits is at most twice this
        probability. 0 skips nothing.
    fastemit_lambda : float
        FastEmit (arXiv 2010.11148), with NeMo's meaning.
    clamp : float, optional
        Limit of the elements of the gradient of a sample's loss with respect
        to the logits, with NeMo's meaning.

    Example
    -------
    >>> from speechbrain.nnet.transducer.transducer_joint import (
    ...     Transducer_joint,
    ... )
    >>> loss = TransducerJointLoss(Transducer_joint(), nn.Linear(8, 10))
    >>> enc = torch.rand(2, 6, 8, requires_grad=True)
    >>> pred = torch.rand(2, 4, 8)
    >>> targets = torch.tensor([[1, 2, 3], [4, 5, 0]])
    >>> value = loss(
    ...     enc,
    ...     pred,
    ...     targets,
    ...     torch.tensor([1.0, 0.5]),
    ...     torch.tensor([1, 2 / 3]),
    ... )
    >>> value.backward()
    >>> enc.grad.shape
    torch.Size([2, 6, 8])
    """

    def __init__(
        self,
        joint: nn.Module,
        classifier: nn.Module,
        blank_index: int = 0,
        reduction: Reduction = "mean",
        method: Literal["tiled", "samplewise", "batched"] = "tiled",
        max_rows: int | None = None,
        occupancy_floor: float = 1e-8,
        fastemit_lambda: float = 0.0,
        clamp: float | None = None,
    ):
        super().__init__()
        check_settings(reduction, fastemit_lambda, clamp)
        if method not in METHODS:
            raise ValueError(
                f"method={method!r} must be one of {', '.join(METHODS)}."
            )
        if max_rows is not None:
            check_integer("max_rows", max_rows, 1)
        check_number("occupancy_floor", occupancy_floor, least=0, below=1)
        check_integer("blank_index", blank_index, 0)
        for name, module in (("joint", joint), ("classifier", classifier)):
            if not isinstance(module, nn.Module):
                raise TypeError(
                    f"{name} must be a torch.nn.Module, not "
                    f"{type(module).__name__}."
                )
        self.joint = joint
        self.classifier = classifier
        self.blank_index = blank_index
        self.reduction = reduction
        self.method = method
        self.max_rows = max_rows
        self.occupancy_floor = occupancy_floor
        self.fastemit_lambda = fastemit_lambda
        self.clamp = clamp

    def forward(
        self,
        enc: torch.Tensor,
        pred: torch.Tensor,
        targets: torch.Tensor,
        enc_lens: torch.Tensor,
        target_lens: torch.Tensor,
    ) -> torch.Tensor:
        """Computes the loss.

        Arguments
        ---------
        enc : torch.Tensor
            [B, T, H], the encoder's output.
        pred : torch.Tensor
            [B, U+1, H], the prediction network's output for a blank and the
            targets.
        targets : torch.Tensor
            [B, U], without blanks.
        enc_lens : torch.Tensor
            [B], relative to T.
        target_lens : torch.Tensor
            [B], relative to U.

        Returns
        -------
        torch.Tensor
            A scalar, or [B] with reduction "none" or "nll"; at least float32.

        Raises
        ------
        TypeError
            If an argument is not a dense tensor.
        ValueError
            If shapes, devices, dtypes, lengths or targets are invalid. The
            message names the sample.
        RuntimeError
            If joint or classifier are sharded one by one by fully_shard.
        """
        _check_inputs(enc, pred, targets, enc_lens, target_lens)
        check_widths(self.joint, self.classifier, enc, pred)
        targets = targets.long()
        logit_lengths = count(enc_lens, enc.shape[1], "frames")
        target_lengths = count(target_lens, targets.shape[1], "targets")
        check = functools.partial(
            check_counts,
            (enc_lens, target_lens),
            logit_lengths,
            target_lengths,
            targets,
            self.blank_index,
        )
        vocabulary = declared_vocabulary(self.classifier)
        lengths = check(vocabulary)
        if self.method == "batched":
            return self._batched(
                enc,
                pred,
                targets,
                enc_lens,
                target_lens,
                logit_lengths,
                target_lengths,
            )
        check_modules(self.joint, self.classifier)
        check_gathered(self, "TransducerJointLoss", "the loss")
        next_forward()
        cell_logits = CellLogits(self.joint, self.classifier)
        cells = Cells(
            cell_logits,
            enc,
            pred,
            targets,
            logit_lengths,
            target_lengths,
            lengths,
            self.blank_index,
            self.clamp,
            _CheckOnce(check, vocabulary),
            self.max_rows or _rows_of_tile(enc, vocabulary),
        )
        weights = {
            name: p
            for name, p in cell_logits.named_parameters()
            if p.requires_grad
        }
        inputs = enc, pred, *weights.values()
        # Inside the autograd function gradients are always disabled.
        needs_gradient = torch.is_grad_enabled() and any(
            x.requires_grad for x in inputs
        )
        nll = _Loss.apply(
            cells,
            *self._make_pass(cells),
            list(weights),
            needs_gradient,
            needs_gradient and self.reduction not in PER_SAMPLE,
            *inputs,
        )
        return reduce(nll, logit_lengths, self.reduction)

    def _make_pass(
        self, cells: Cells
    ) -> tuple[Callable[[Cells, Recorder], TiledPass | WholePass], int]:
        """The pass for groups of samples, and the cells of a group."""
        if self.method == "samplewise":
            return functools.partial(
                WholePass, fastemit_lambda=self.fastemit_lambda
            ), 1
        kind = TiledPass
        joint = SumJoint.of(cells.logits, cells.enc, cells.pred)
        if joint is not None:
            kind = functools.partial(SumJointPass, joint)
        return functools.partial(
            kind,
            occupancy_floor=self.occupancy_floor,
            fastemit_lambda=self.fastemit_lambda,
        ), min(GROUP_TILES * cells.max_rows, GROUP_CELLS)

    def _batched(
        self,
        enc: torch.Tensor,
        pred: torch.Tensor,
        targets: torch.Tensor,
        enc_lens: torch.Tensor,
        target_lens: torch.Tensor,
        logit_lengths: torch.Tensor,
        target_lengths: torch.Tensor,
    ) -> torch.Tensor:
        enc, pred = (
            _finite_padding(enc, logit_lengths),
            _finite_padding(pred, target_lengths + 1),
        )
        logits = self.classifier(
            self.joint(enc.unsqueeze(2), pred.unsqueeze(1))
        )
        return transducer_loss(
            logits,
            targets,
            enc_lens,
            target_lens,
            self.blank_index,
            self.reduction,
            self.fastemit_lambda,
            self.clamp,
        )


class _CheckOnce:
    """Checks targets once the size of the vocabulary is known."""

    def __init__(self, check: Callable[[int], Any], vocabulary: int | None):
        self.check, self.vocabulary = check, vocabulary

    def __call__(self, vocabulary: int) -> None:
        if vocabulary != self.vocabulary:
            self.check(vocabulary)
            self.vocabulary = vocabulary


class _Loss(torch.autograd.Function):
    """Computes the losses of groups of samples, one after the other.

    If all samples have the same weight, their gradients are computed in
    forward, and nothing of a group is kept. If each sample has its own weight,
    they are computed in backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        cells: Cells,
        make_pass: Callable[[Cells, Recorder], TiledPass | WholePass],
        size: int,
        names: list[str],
        needs_gradient: bool,
        at_once: bool,
        enc: torch.Tensor,
        pred: torch.Tensor,
        *weights: torch.Tensor,
    ) -> torch.Tensor:
        recorder = Recorder(enc.device)
        gradients = None
        if at_once:
            gradients = Gradients(enc, pred, dict(zip(names, weights)))
        nll, finite, ctx.passes = [], [], []
        with recorder.autocast(), unchanged(cells.logits, enc.device):
            for group in cells.groups(size):
                lattice_pass = make_pass(group, recorder)
                nll.append(lattice_pass.forward(gradients))
                if gradients is not None:
                    with gradients.group(group.samples):
                        lattice_pass.backward(gradients)
                    finite += lattice_pass.finite
                if needs_gradient:
                    ctx.passes.append(lattice_pass)
        ctx.names, ctx.gradients = names, gradients
        ctx.modules, ctx.fingerprint = cells.logits, fingerprint(cells.logits)
        ctx.save_for_backward(enc, pred, *weights)
        nll = torch.cat(nll)
        if has_values(nll):
            _name_samples(finite or nll.isfinite().tolist())
        return nll

    @staticmethod
    # pyrefly: ignore[bad-override]
    def backward(
        ctx: Any, upstream: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        refuse_double_backward(
            "TransducerJointLoss", "leave out what needs second derivatives"
        )
        enc, pred, *weights = ctx.saved_tensors
        gradients, ctx.gradients = ctx.gradients, None
        scale = None
        if gradients is not None:
            scale = upstream[0]
        else:
            check_fingerprint(
                ctx.fingerprint, ctx.modules, "TransducerJointLoss"
            )
            gradients = Gradients(enc, pred, dict(zip(ctx.names, weights)))
            for lattice_pass in _weighted(ctx.passes, upstream):
                with gradients.group(lattice_pass.cells.samples):
                    lattice_pass.backward(gradients, upstream)
        return *[None] * 6, *gradients.totals(scale)


def _weighted(
    passes: list[TiledPass | WholePass], upstream: torch.Tensor
) -> list[TiledPass | WholePass]:
    """Leaves out samples of weight 0, which may be those that are not finite.

    A TiledPass finds them itself, cell by cell.
    """
    if isinstance(passes[0], TiledPass) or not has_values(upstream):
        return passes
    # All samples at once: the host waits for the device.
    used = (upstream != 0).tolist()
    return [p for p in passes if used[p.cells.samples.start]]


def _rows_of_tile(enc: torch.Tensor, vocabulary: int | None) -> int:
    """The default of ``max_rows``; fake tensors count as on a GPU."""
    if enc.device.type == "cpu" and has_values(enc):
        return 2048
    return min(max(2**26 // (vocabulary or 1024), 8192), 32768)


def _finite_padding(x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Zeroes non-finite padding, because NaN times a gradient of 0 is NaN."""
    padding = torch.arange(x.shape[1], device=x.device) >= lengths[:, None]
    return x.masked_fill(padding[..., None] & ~x.isfinite(), 0)


def _name_samples(finite: list[bool]) -> None:
    bad = [str(n) for n, is_finite in enumerate(finite) if not is_finite]
    if bad:
        logger.warning(
            f"The transducer loss of sample {', '.join(bad)} of the batch is "
            "not finite: encoder, predictor or weights are not finite, or no "
            "path has a positive probability."
        )


def _check_inputs(
    enc: torch.Tensor,
    pred: torch.Tensor,
    targets: torch.Tensor,
    enc_lens: torch.Tensor,
    target_lens: torch.Tensor,
) -> None:
    check_dense(
        enc=enc,
        pred=pred,
        targets=targets,
        enc_lens=enc_lens,
        target_lens=target_lens,
    )
    if enc.dim() != 3 or 0 in enc.shape:
        raise ValueError(
            f"enc must be [B, T, H] and not empty, not {list(enc.shape)}."
        )
    batch = len(enc)
    if targets.dim() != 2 or len(targets) != batch:
        raise ValueError(
            f"targets must be [B, U] with B = {batch}, not "
            f"{list(targets.shape)}."
        )
    if pred.dim() != 3 or pred.shape[:2] != (batch, targets.shape[1] + 1):
        raise ValueError(
            f"pred must be [B, U+1, H] = [{batch}, {targets.shape[1] + 1}, H], "
            f"not {list(pred.shape)}: the prediction network's input is a blank "
            "and then all targets."
        )
    if enc.dtype != pred.dtype or not enc.is_floating_point():
        raise ValueError(
            "enc and pred must be of one floating-point dtype, not "
            f"{enc.dtype} and {pred.dtype}."
        )
    lengths: dict[str, torch.Tensor] = {
        "enc_lens": enc_lens,
        "target_lens": target_lens,
    }
    check_tensors(batch, lengths, targets, {"enc": enc, "pred": pred})
