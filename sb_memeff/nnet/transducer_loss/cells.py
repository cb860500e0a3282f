"""Packed cells of the lattices of a batch: indices, logits and gradients.

Authors
 * The sb_memeff authors 2026
"""

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Generator, Iterator
from typing import Any, cast

import torch
from torch import nn
from torch.func import functional_call

from sb_memeff.nnet.replay.mismatch import report_mismatches
from sb_memeff.nnet.transducer_loss.half_linear import (
    HALF,
    Float32WeightGradients,
)
from sb_memeff.nnet.transducer_loss.input_gradient import InputGradient
from sb_memeff.ops.dispatch import has_values
from sb_memeff.ops.logit_rows import row_gradient, row_scores, wide_dtype

__all__ = ["CellLogits", "Cells", "Gradients", "cells_inside", "next_targets"]


class CellLogits(nn.Module):
    """Computes logits of cells from rows of encoder and predictor.

    Arguments
    ---------
    joint : torch.nn.Module
        Takes [N, T, 1, H] and [N, 1, U, H], as SpeechBrain's
        Transducer_joint.
    classifier : torch.nn.Module
        Maps [N, H] to [N, V].

    Example
    -------
    >>> from speechbrain.nnet.transducer.transducer_joint import (
    ...     Transducer_joint,
    ... )
    >>> logits = CellLogits(Transducer_joint(), nn.Linear(4, 10))
    >>> logits(torch.rand(7, 4), torch.rand(7, 4)).shape
    torch.Size([7, 10])
    """

    def __init__(self, joint: nn.Module, classifier: nn.Module):
        super().__init__()
        self.joint = joint
        self.classifier = classifier

    def forward(self, enc: torch.Tensor, pred: torch.Tensor) -> torch.Tensor:
        """Computes the logits of cells.

        Arguments
        ---------
        enc : torch.Tensor
            [N, H], the encoder's row of each cell.
        pred : torch.Tensor
            [N, H], the prediction network's row.

        Returns
        -------
        torch.Tensor
            [N, V].
        """
        joined = self.joint(enc[:, None, None], pred[:, None, None])
        return self.classifier(joined.flatten(0, 2))


def cells_inside(
    logit_lengths: torch.Tensor,
    target_lengths: torch.Tensor,
    rows: int,
    columns: int,
    lengths: tuple[list[int], list[int]],
) -> torch.Tensor:
    """Finds the cells inside the lattices of a padded batch.

    Arguments
    ---------
    logit_lengths : torch.Tensor
        [B].
    target_lengths : torch.Tensor
        [B], targets of each sample.
    rows : int
        T.
    columns : int
        U+1.
    lengths : tuple of list of int
        Both lengths on the host.

    Returns
    -------
    torch.Tensor
        [N], int64. The index of cell (b, t, u) is b T (U+1) + t (U+1) + u.

    Example
    -------
    >>> lengths = [1, 2], [1, 0]
    >>> cells_inside(*map(torch.tensor, lengths), 2, 2, lengths)
    tensor([0, 1, 4, 6])
    """
    t = torch.arange(rows, device=logit_lengths.device)[:, None]
    u = torch.arange(columns, device=logit_lengths.device)
    inside = (t < logit_lengths[:, None, None]) & (
        u <= target_lengths[:, None, None]
    )
    # The host knows how many there are, and need not wait for the device.
    size = sum(t * (u + 1) for t, u in zip(*lengths))
    return inside.flatten().nonzero_static(size=size).squeeze(1)


def next_targets(
    targets: torch.Tensor, target_lengths: torch.Tensor
) -> torch.Tensor:
    """Returns the next target in each column of the lattice.

    Arguments
    ---------
    targets : torch.Tensor
        [B, U].
    target_lengths : torch.Tensor
        [B], targets of each sample.

    Returns
    -------
    torch.Tensor
        [B, U+1]; 0 where there is none. Any symbol would do, because its
        posterior is 0.

    Example
    -------
    >>> next_targets(torch.tensor([[3, 9]]), torch.tensor([1]))
    tensor([[3, 0, 0]])
    """
    u = torch.arange(targets.shape[1], device=targets.device)
    real = u < target_lengths[:, None]
    return nn.functional.pad(targets.long().masked_fill(~real, 0), (0, 1))


@dataclasses.dataclass
class Tile:
    """Some cells with their positions.

    Arguments
    ---------
    indices : torch.Tensor
        [N], indices in a flat plane of their group of samples.
    sample : torch.Tensor
        [N], number of the sample in the whole batch.
    enc_row : torch.Tensor
        [N], row of the encoder's output of the group of samples, viewed as
        [B T, H].
    pred_row : torch.Tensor
        [N], row of the prediction network's, viewed as [B (U+1), H].
    target : torch.Tensor
        [N], the next target; any symbol where there is none.
    """

    indices: torch.Tensor
    sample: torch.Tensor
    enc_row: torch.Tensor
    pred_row: torch.Tensor
    target: torch.Tensor

    def split(self, size: int) -> "list[Tile]":
        """Splits the cells into tiles.

        Arguments
        ---------
        size : int
            Number of cells in a tile.

        Returns
        -------
        list of Tile
            Views.
        """
        parts = [
            getattr(self, field.name).split(size)
            for field in dataclasses.fields(self)
        ]
        return [Tile(*of_tile) for of_tile in zip(*parts)]


class Cells:
    """The cells inside the lattices of some samples, with their inputs.

    Arguments
    ---------
    logits : CellLogits
        Joint network and classifier.
    enc : torch.Tensor
        [B, T, H].
    pred : torch.Tensor
        [B, U+1, H].
    targets : torch.Tensor
        [B, U].
    logit_lengths : torch.Tensor
        [B].
    target_lengths : torch.Tensor
        [B], targets of each sample.
    lengths : tuple of list of int
        Both on the host.
    blank_index : int
        The blank.
    clamp : float, optional
        Limit of the elements of the logits' gradient.
    check_vocabulary : callable, optional
        Called with the number of symbols after logits are computed, and
        before they are used.
    max_rows : int, optional
        Number of cells in a tile.
    """

    def __init__(
        self,
        logits: CellLogits,
        enc: torch.Tensor,
        pred: torch.Tensor,
        targets: torch.Tensor,
        logit_lengths: torch.Tensor,
        target_lengths: torch.Tensor,
        lengths: tuple[list[int], list[int]],
        blank_index: int,
        clamp: float | None = None,
        check_vocabulary: Callable[[int], None] | None = None,
        max_rows: int | None = None,
    ):
        self.logits = logits
        # Any strides: rows are gathered without a copy of the whole.
        self.enc, self.pred = enc.detach(), pred.detach()
        self.check_vocabulary = check_vocabulary
        self.blank_index, self.clamp = blank_index, clamp
        # Required by passes over tiles.
        self.max_rows = cast(int, max_rows)
        self.rows, self.columns = enc.shape[1], pred.shape[1]
        self.samples = range(len(enc))
        self.logit_lengths, self.target_lengths = logit_lengths, target_lengths
        self.lengths = lengths
        self.next_targets = next_targets(targets, target_lengths)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of a plane of all cells, including padding."""
        return len(self.samples), self.rows, self.columns

    def indices(self) -> torch.Tensor:
        """Returns the indices of the cells in a flat plane.

        Returns
        -------
        torch.Tensor
            [N], int64.
        """
        return cells_inside(
            self.logit_lengths,
            self.target_lengths,
            self.rows,
            self.columns,
            self.lengths,
        )

    def groups(self, size: int) -> "Iterator[Cells]":
        """Splits the batch into groups of consecutive samples.

        Arguments
        ---------
        size : int
            Number of cells in a group, including padding; a group has at
            least one sample.

        Yields
        ------
        Cells
            The cells of each group.
        """
        step = max(1, size // (self.rows * self.columns))
        for first in range(0, len(self.samples), step):
            group, chosen = copy.copy(self), slice(first, first + step)
            group.samples = self.samples[chosen]
            for name in (
                "enc",
                "pred",
                "logit_lengths",
                "target_lengths",
                "next_targets",
            ):
                setattr(group, name, getattr(self, name)[chosen])
            frames, targets = self.lengths
            group.lengths = frames[chosen], targets[chosen]
            yield group

    def sample_of(self, indices: torch.Tensor) -> torch.Tensor:
        """Returns the number of each cell's sample in the batch.

        Arguments
        ---------
        indices : torch.Tensor
            [N], some of ``indices()``.

        Returns
        -------
        torch.Tensor
            [N].
        """
        return indices // (self.rows * self.columns) + self.samples.start

    def tile(self, indices: torch.Tensor) -> Tile:
        """Locates cells in the batch.

        Arguments
        ---------
        indices : torch.Tensor
            [N], some of ``indices()``.

        Returns
        -------
        Tile
            The cells with their samples, rows and targets.
        """
        frame = indices // self.columns
        sample = frame // self.rows
        # Column (U+1) sample + u, where places are (U+1) (T sample + t) + u.
        pred_row = indices + self.columns * (sample - frame)
        target = self.next_targets.flatten().index_select(0, pred_row)
        if self.samples.start:
            sample = sample + self.samples.start
        return Tile(indices, sample, frame, pred_row, target)

    def inputs(self, tile: Tile) -> tuple[torch.Tensor, torch.Tensor]:
        """Gathers the rows of encoder and predictor of cells.

        Arguments
        ---------
        tile : Tile
            The cells.

        Returns
        -------
        tuple of torch.Tensor
            [N, H] each.
        """
        return _rows(self.enc, tile.enc_row), _rows(self.pred, tile.pred_row)

    def compute_logits(self, tile: Tile) -> torch.Tensor:
        """Computes the logits of cells.

        Arguments
        ---------
        tile : Tile
            The cells.

        Returns
        -------
        torch.Tensor
            [N, V].
        """
        logits = self.logits(*self.inputs(tile))
        cells = len(tile.indices)
        if not isinstance(logits, torch.Tensor) or (
            logits.dim() != 2 or len(logits) != cells
        ):
            found = type(logits).__name__
            if isinstance(logits, torch.Tensor):
                found = list(logits.shape)
            raise ValueError(
                f"joint and classifier must return one row of logits, [N, V], "
                f"for each of N = {cells} cells, not {found}."
            )
        return logits

    def scores(self, tile: Tile, logits: torch.Tensor) -> torch.Tensor:
        """Computes scores of cells; see logit_rows.row_scores."""
        if self.check_vocabulary is not None:
            self.check_vocabulary(logits.shape[1])
        return row_scores(logits, tile.target, self.blank_index)


def _rows(x: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """Gathers rows of [A, B, H], viewed as [A B, H]; any strides."""
    if x.is_contiguous():
        return x.flatten(0, 1).index_select(0, row)
    return x[row // x.shape[1], row % x.shape[1]]


# Logits, the rows of encoder and predictor, and the cells.
ComputedLogits = tuple[torch.Tensor, tuple[torch.Tensor, ...], Cells, Tile]


class Gradients:
    """Accumulates the gradients of encoder, predictor and weights in float32.

    Arguments
    ---------
    enc : torch.Tensor
        [B, T, H].
    pred : torch.Tensor
        [B, U+1, H].
    weights : dict
        Maps names to parameters that need a gradient.

    Attributes
    ----------
    of_inputs : tuple of InputGradient
        Encoder's and predictor's.
    weight_sums : dict
        Maps the same names to the sums of the gradients.
    """

    def __init__(
        self,
        enc: torch.Tensor,
        pred: torch.Tensor,
        weights: dict[str, torch.Tensor],
    ):
        # Detached, so that hooks of the parameters run for the sum only.
        self.weights = {
            name: p.detach().requires_grad_() for name, p in weights.items()
        }
        self.of_inputs = InputGradient(enc), InputGradient(pred)
        self.weight_sums = {
            name: p.new_zeros(p.shape, dtype=wide_dtype(p.dtype))
            for name, p in weights.items()
        }
        self.linear = Float32WeightGradients(
            {
                id(weight): self.weight_sums[name]
                for name, weight in self.weights.items()
            }
        )
        # Largest deviation of replays from forward, in units of the deviation
        # that rounding can explain.
        self.deviation = enc.new_zeros(1, dtype=torch.float32)

    @contextlib.contextmanager
    def group(self, samples: range) -> Generator[None, None, None]:
        """Within the context, ``add`` takes cells of these samples only.

        Arguments
        ---------
        samples : range
            A group of samples. Each sample is in one group.

        Yields
        ------
        None
        """
        enc, pred = self.of_inputs
        with enc.group(samples), pred.group(samples):
            yield

    def compute_logits(
        self, cells: Cells, tile: Tile, selected: torch.Tensor | None = None
    ) -> ComputedLogits:
        """Computes logits of cells for ``add``.

        Arguments
        ---------
        cells : Cells
            Cells of the group of samples.
        tile : Tile
            The cells.
        selected : torch.Tensor, optional
            [N], bool. The rows of other cells are set to 0, so that they
            cannot produce values that are not finite.

        Returns
        -------
        tuple
            The argument of ``add``; the logits come first.
        """
        rows = cells.inputs(tile)
        if selected is not None:
            for x in rows:
                x.masked_fill_(~selected[:, None], 0)
        for x in rows:
            x.requires_grad_()
        with torch.enable_grad(), self._linear_layers(rows[0]):
            logits = functional_call(cells.logits, self.weights, rows)
        return logits, rows, cells, tile

    def _linear_layers(
        self, rows: torch.Tensor
    ) -> contextlib.AbstractContextManager[Any]:
        if rows.dtype in HALF or torch.is_autocast_enabled(rows.device.type):
            return self.linear
        return contextlib.nullcontext()

    def add(
        self,
        computed: ComputedLogits,
        lse: torch.Tensor,
        blank: torch.Tensor,
        emission: torch.Tensor,
        upstream: torch.Tensor | None = None,
    ) -> None:
        """Adds the gradients that flow through the logits of cells.

        Arguments
        ---------
        computed : tuple
            Result of ``compute_logits``.
        lse : torch.Tensor
            [N], log-normalisers.
        blank : torch.Tensor
            [N], posteriors of the blank.
        emission : torch.Tensor
            [N], posteriors of the target, with FastEmit.
        upstream : torch.Tensor, optional
            [B], gradient of each sample's loss; 1 by default.
        """
        logits, rows, cells, tile = computed
        gradient, factor = self.of_logits(
            cells, tile, logits.detach(), lse, blank, emission, upstream
        )
        self.linear.factor = factor
        # autograd does not use weights whose gradients self.linear has added.
        found = torch.autograd.grad(
            logits,
            (*rows, *self.weights.values()),
            gradient,
            allow_unused=True,
        )
        sums = [x.sum for x in self.of_inputs] + [*self.weight_sums.values()]
        indices = tile.enc_row, tile.pred_row, *[None] * len(self.weights)
        for total, value, row in zip(sums, found, indices):
            if value is None:
                continue
            value = value.to(total.dtype)
            if factor is not None:
                value = value * factor
            if row is None:
                total.add_(value)
            else:
                total.flatten(0, 1).index_add_(0, row, value)

    def of_logits(
        self,
        cells: Cells,
        tile: Tile,
        logits: torch.Tensor,
        lse: torch.Tensor,
        blank: torch.Tensor,
        emission: torch.Tensor,
        upstream: torch.Tensor | None,
        overwrite: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Computes the gradient of cells' logits; see logit_rows.row_gradient.

        Arguments
        ---------
        cells : Cells
            Cells of the group of samples.
        tile : Tile
            The cells.
        logits : torch.Tensor
            [N, V].
        lse : torch.Tensor
            [N]; see ``add`` for this and the next three.
        blank : torch.Tensor
            [N].
        emission : torch.Tensor
            [N].
        upstream : torch.Tensor or None
            [B].
        overwrite : bool
            Whether the gradient may overwrite the logits.

        Returns
        -------
        tuple
            [N, V], and the scalar that undoes its scaling, or None.
        """
        return row_gradient(
            logits,
            lse,
            tile.target,
            blank,
            emission,
            cells.blank_index,
            self.deviation,
            cells.clamp,
            None if upstream is None else upstream[tile.sample],
            # Without upstream the scale of the loss is unknown.
            upstream is None and logits.dtype == torch.float16,
            overwrite,
        )

    def compare_losses(self, nll: torch.Tensor, replayed: torch.Tensor) -> None:
        """Compares a replay's losses with those of forward.

        The deviation is checked in ``totals``, like that of the rows.

        Arguments
        ---------
        nll : torch.Tensor
            [B], losses of forward.
        replayed : torch.Tensor
            [B], losses of backward.
        """
        if not has_values(nll):
            return
        relative = (replayed - nll).abs() / (1 + nll.abs())
        largest = relative.nan_to_num_(0, 0, 0).amax()
        self.deviation = self.deviation.maximum((1e3 * largest).float())

    def totals(self, scale: torch.Tensor | None = None) -> list[torch.Tensor]:
        """Returns the sums in the dtypes of the inputs. Call it once.

        Arguments
        ---------
        scale : torch.Tensor, optional
            A scalar factor.

        Returns
        -------
        list of torch.Tensor
            Gradients of encoder, predictor and weights.

        Raises
        ------
        RuntimeError
            If the logits of backward differ from those of forward.
        """
        if has_values(self.deviation):
            report_mismatches(self.deviation > 1, _describe_mismatch)
        if scale is not None:
            for total in self.weight_sums.values():
                total *= scale.to(total.dtype)
        return [x.total(scale) for x in self.of_inputs] + [
            total.to(weight.dtype)
            for total, weight in zip(
                self.weight_sums.values(), self.weights.values()
            )
        ]


def _describe_mismatch(_: int) -> str:
    return (
        "TransducerJointLoss: joint or classifier computed other logits in "
        "backward than in forward, so gradients would be wrong. They use "
        "random numbers or state that cannot be restored. Use "
        'method="batched".'
    )
