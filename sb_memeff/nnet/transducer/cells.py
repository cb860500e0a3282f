"""Cells of the lattices of a batch, packed: which there are, and their logits.

Authors
 * The sb_memeff authors 2026
"""

import contextlib
import copy

import torch
from torch import nn
from torch.func import functional_call

from sb_memeff.nnet.transducer.batch import check_targets
from sb_memeff.nnet.transducer.rows import row_gradient, row_scores, wide_dtype
from sb_memeff.nnet.transducer.wide_linear import WideLinear

__all__ = ["CellLogits", "Cells", "Gradients", "cells_inside", "following"]


class CellLogits(nn.Module):
    """Logits of cells, from the rows of encoder and predictor.

    Arguments
    ---------
    joint : torch.nn.Module
        As SpeechBrain's Transducer_joint: takes [N, T, 1, H] and [N, 1, U, H].
    classifier : torch.nn.Module
        [N, H] to [N, V].

    Example
    -------
    >>> from speechbrain.nnet.transducer.transducer_joint import (
    ...     Transducer_joint,
    ... )
    >>> logits = CellLogits(Transducer_joint(), nn.Linear(4, 10))
    >>> logits(torch.rand(7, 4), torch.rand(7, 4)).shape
    torch.Size([7, 10])
    """

    def __init__(self, joint, classifier):
        super().__init__()
        self.joint = joint
        self.classifier = classifier

    def forward(self, enc, pred):
        """Logits of cells.

        Arguments
        ---------
        enc : torch.Tensor
            [N, H], the encoder's row of each cell.
        pred : torch.Tensor
            [N, H], the prediction network's.

        Returns
        -------
        torch.Tensor
            [N, V].
        """
        joined = self.joint(enc[:, None, None], pred[:, None, None])
        return self.classifier(joined.flatten(0, 2))


def cells_inside(frames, counts, rows, columns):
    """The cells inside the lattices of a padded batch.

    Arguments
    ---------
    frames : torch.Tensor
        [B].
    counts : torch.Tensor
        [B], targets of each sample.
    rows : int
        T.
    columns : int
        U+1.

    Returns
    -------
    torch.Tensor
        [N], int64; cell (b, t, u) is b T (U+1) + t (U+1) + u.

    Example
    -------
    >>> cells_inside(torch.tensor([1, 2]), torch.tensor([1, 0]), 2, 2)
    tensor([0, 1, 4, 6])
    """
    t = torch.arange(rows, device=frames.device)[:, None]
    u = torch.arange(columns, device=frames.device)
    inside = (t < frames[:, None, None]) & (u <= counts[:, None, None])
    return inside.flatten().nonzero().squeeze(1)


def following(targets, counts):
    """The target that follows in each column of the lattice.

    Arguments
    ---------
    targets : torch.Tensor
        [B, U].
    counts : torch.Tensor
        [B], targets of each sample.

    Returns
    -------
    torch.Tensor
        [B, U+1]; 0 where none follows: any symbol will do, as its posterior
        is 0.

    Example
    -------
    >>> following(torch.tensor([[3, 9]]), torch.tensor([1]))
    tensor([[3, 0, 0]])
    """
    u = torch.arange(targets.shape[1], device=targets.device)
    real = u < counts[:, None]
    return nn.functional.pad(targets.long().masked_fill(~real, 0), (0, 1))


class Cells:
    """The cells inside the lattices of some samples, and what comes of them.

    Arguments
    ---------
    logits : CellLogits
        The modules.
    enc : torch.Tensor
        [B, T, H].
    pred : torch.Tensor
        [B, U+1, H].
    targets : torch.Tensor
        [B, U].
    frames : torch.Tensor
        [B].
    counts : torch.Tensor
        [B], targets of each sample.
    blank_index : int
        The blank.
    clamp : float, optional
        Limit of the elements of a logit's gradient.
    """

    def __init__(
        self, logits, enc, pred, targets, frames, counts, blank_index, clamp
    ):
        self.logits = logits
        # Rows are picked by number, in whatever layout enc and pred came.
        self.enc = enc.detach().contiguous()
        self.pred = pred.detach().contiguous()
        self.blank_index, self.clamp = blank_index, clamp
        self.rows, self.columns = enc.shape[1], pred.shape[1]
        self.samples = range(len(enc))
        self.frames, self.counts = frames, counts
        self._batch = targets, counts, frames
        # Filled by the first tile of the batch, for all groups.
        self._vocabulary = []
        self.following = following(targets, counts).flatten()

    @property
    def shape(self):
        """Shape of a plane with a place for each cell, padding too."""
        return len(self.samples), self.rows, self.columns

    def places(self):
        """Places of the cells in a flat plane.

        Returns
        -------
        torch.Tensor
            [N], int64.
        """
        return cells_inside(self.frames, self.counts, self.rows, self.columns)

    def groups(self, size):
        """Cuts the batch into runs of samples.

        Arguments
        ---------
        size : int
            Cells of a run, padding too; but a sample at least.

        Yields
        ------
        Cells
            Each run's.
        """
        step = max(1, size // (self.rows * self.columns))
        for first in range(0, len(self.samples), step):
            group, chosen = copy.copy(self), slice(first, first + step)
            group.samples = self.samples[chosen]
            group.frames, group.counts = (
                self.frames[chosen],
                self.counts[chosen],
            )
            yield group

    def locate(self, places):
        """Sample, row of the encoder and row of the predictor of cells.

        Arguments
        ---------
        places : torch.Tensor
            [N], some of ``places()``.

        Returns
        -------
        tuple of torch.Tensor
            [N] each: b, b T + t, b (U+1) + u, in the whole batch.
        """
        frame = places // self.columns + self.samples.start * self.rows
        sample = frame // self.rows
        return sample, frame, sample * self.columns + places % self.columns

    def inputs(self, places):
        """Rows of encoder and predictor of some cells.

        Arguments
        ---------
        places : torch.Tensor
            [N].

        Returns
        -------
        tuple of torch.Tensor
            [N, H] each.
        """
        _, frame, label = self.locate(places)
        return self.enc.flatten(0, 1)[frame], self.pred.flatten(0, 1)[label]

    def run(self, places):
        """Logits of some cells.

        Arguments
        ---------
        places : torch.Tensor
            [N].

        Returns
        -------
        torch.Tensor
            [N, V].
        """
        return self.logits(*self.inputs(places))

    def scores(self, places, logits):
        """Normaliser, blank and target of cells; see rows.row_scores.

        Raises
        ------
        ValueError
            From the first tile, if targets or blank are not in the vocabulary.
        """
        if not self._vocabulary:
            vocabulary = logits.shape[1]
            check_targets(*self._batch, self.blank_index, vocabulary)
            self._vocabulary.append(vocabulary)
        _, _, label = self.locate(places)
        return row_scores(logits, self.following[label], self.blank_index)


class Gradients:
    """Adds up the gradients of encoder, predictor and weights, in float32.

    Arguments
    ---------
    enc : torch.Tensor
        [B, T, H].
    pred : torch.Tensor
        [B, U+1, H].
    weights : dict
        Name to parameter, those that need a gradient.
    """

    def __init__(self, enc, pred, weights):
        # Not the parameters themselves: their hooks are for the sum.
        self.weights = {
            name: p.detach().requires_grad_() for name, p in weights.items()
        }
        self.likes = [enc, pred, *weights.values()]
        # Contiguous, since rows are added by number.
        self.sums = [
            torch.zeros(x.shape, dtype=wide_dtype(x.dtype), device=x.device)
            for x in self.likes
        ]
        leaves = zip(self.weights.values(), self.sums[2:], strict=True)
        self._wide = WideLinear({id(leaf): total for leaf, total in leaves})

    def run(self, cells, places):
        """Logits of some cells, to be given to ``add``.

        Arguments
        ---------
        cells : Cells
            Which.
        places : torch.Tensor
            [N], some of theirs.

        Returns
        -------
        tuple
            What ``add`` takes; the logits first.
        """
        rows = tuple(x.requires_grad_() for x in cells.inputs(places))
        wide = self._wide if _is_half(rows[0]) else contextlib.nullcontext()
        with torch.enable_grad(), wide:
            logits = functional_call(cells.logits, self.weights, rows)
        return logits, rows, cells, places

    def add(self, made, normaliser, blank, emission, upstream=None):
        """Propagates back through the logits of some cells.

        Arguments
        ---------
        made : tuple
            As ``run`` returned it.
        normaliser : torch.Tensor
            [N].
        blank : torch.Tensor
            [N], posteriors of the blank.
        emission : torch.Tensor
            [N], posteriors of the target, with FastEmit.
        upstream : torch.Tensor, optional
            [B], gradient of each sample's loss; by default 1.
        """
        logits, rows, cells, places = made
        sample, frame, label = cells.locate(places)
        gradient = row_gradient(
            logits.detach(),
            normaliser,
            cells.following[label],
            blank,
            emission,
            cells.blank_index,
            cells.clamp,
        )
        if upstream is not None:
            gradient *= upstream.to(gradient.dtype)[sample, None]
        scale = 1
        if logits.dtype == torch.float16:
            scale = _scale_for_half(gradient)
            gradient *= scale
        self._wide.scale = scale
        found = torch.autograd.grad(
            logits,
            (*rows, *self.weights.values()),
            gradient.to(logits.dtype),
            allow_unused=True,
        )
        for total, value, row in zip(
            self.sums, found, (frame, label, *[None] * len(self.weights))
        ):
            if value is None:
                continue
            value = value.to(total.dtype) / scale
            if row is None:
                total.add_(value)
            else:
                total.flatten(0, 1).index_add_(0, row, value)

    def totals(self, scale=None):
        """The sums, in the dtypes of what they belong to. Call it once.

        Arguments
        ---------
        scale : torch.Tensor, optional
            A scalar to multiply them by.

        Returns
        -------
        list of torch.Tensor
            Gradients of encoder, predictor and weights.
        """
        if scale is not None:
            for total in self.sums:
                total *= scale.to(total.dtype)
        return [total.to(x.dtype) for total, x in zip(self.sums, self.likes)]


def _is_half(rows):
    """Whether the products of rows and weights are in half precision."""
    device = rows.device.type
    dtype = rows.dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    return dtype in (torch.float16, torch.bfloat16)


def _scale_for_half(gradient):
    """A power of two that brings the gradient of a tile into float16's range.

    The largest element becomes 1 to 2. Gradients of the joint's output, sums
    of such elements over the vocabulary, are far from overflow, and small
    elements far from what float16 takes for zero. It is computed on the tile's
    device.
    """
    largest = gradient.abs().amax()
    scale = torch.exp2(-torch.floor(torch.log2(largest)))
    # Nothing to scale, or NaN, which must stay where it is.
    return torch.where(scale.isfinite() & (scale > 0), scale, 1.0)
