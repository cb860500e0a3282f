"""Cells of the lattices of a batch, packed: which there are, and their logits.

Authors
 * The sb_memeff authors 2026
"""

import torch
from torch import nn
from torch.func import functional_call

from sb_memeff.nnet.transducer.rows import row_gradient, row_scores, wide_dtype

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
    """The cells inside the lattices of a batch, and what is computed of them.

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
        self.enc, self.pred = enc.detach(), pred.detach()
        self.frames, self.counts = frames, counts
        self.blank_index, self.clamp = blank_index, clamp
        self.batch, self.rows, self.columns = (
            len(enc),
            enc.shape[1],
            pred.shape[1],
        )
        self.numbers = cells_inside(frames, counts, self.rows, self.columns)
        self.following = following(targets, counts).flatten()

    def places(self, cells):
        """Sample, row of the encoder and row of the predictor of cells.

        Arguments
        ---------
        cells : torch.Tensor
            [N], some of ``numbers``.

        Returns
        -------
        tuple of torch.Tensor
            [N] each: b, b T + t, b (U+1) + u.
        """
        frame = cells // self.columns
        sample = frame // self.rows
        return sample, frame, sample * self.columns + cells % self.columns

    def inputs(self, cells):
        """Rows of encoder and predictor of some cells.

        Arguments
        ---------
        cells : torch.Tensor
            [N].

        Returns
        -------
        tuple of torch.Tensor
            [N, H] each.
        """
        _, frame, label = self.places(cells)
        return self.enc.flatten(0, 1)[frame], self.pred.flatten(0, 1)[label]

    def run(self, cells):
        """Logits of some cells.

        Arguments
        ---------
        cells : torch.Tensor
            [N].

        Returns
        -------
        torch.Tensor
            [N, V].
        """
        return self.logits(*self.inputs(cells))

    def scores(self, cells, logits):
        """Normaliser, blank and target of cells; see rows.row_scores."""
        _, _, label = self.places(cells)
        return row_scores(logits, self.following[label], self.blank_index)


class Gradients:
    """Adds up the gradients of encoder, predictor and weights, in float32.

    Arguments
    ---------
    cells : Cells
        The cells.
    weights : dict
        Name to parameter, those that need a gradient.
    """

    def __init__(self, cells, weights):
        self.cells = cells
        # Not the parameters themselves: their hooks are for the sum.
        self.weights = {
            name: p.detach().requires_grad_() for name, p in weights.items()
        }
        self.enc, self.pred = (
            torch.zeros_like(x, dtype=wide_dtype(x.dtype)).flatten(0, 1)
            for x in (cells.enc, cells.pred)
        )
        self.sums = {
            name: torch.zeros_like(p, dtype=wide_dtype(p.dtype))
            for name, p in weights.items()
        }

    def run(self, numbers):
        """Logits of some cells, to be given to ``add``.

        Arguments
        ---------
        numbers : torch.Tensor
            [N], the cells.

        Returns
        -------
        tuple
            What ``add`` takes.
        """
        cells = self.cells
        rows = tuple(x.requires_grad_() for x in cells.inputs(numbers))
        with torch.enable_grad():
            logits = functional_call(cells.logits, self.weights, rows)
        return logits, *rows, cells.places(numbers)

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
        logits, enc, pred, (sample, frame, label) = made
        gradient = row_gradient(
            logits.detach(),
            normaliser,
            self.cells.following[label],
            blank,
            emission,
            self.cells.blank_index,
            self.cells.clamp,
        )
        if upstream is not None:
            gradient *= upstream.to(gradient.dtype)[sample, None]
        found = torch.autograd.grad(
            logits,
            (enc, pred, *self.weights.values()),
            gradient.to(logits.dtype),
            allow_unused=True,
        )
        for total, rows, values in (
            (self.enc, frame, found[0]),
            (self.pred, label, found[1]),
        ):
            if values is not None:
                total.index_add_(0, rows, values.to(total.dtype))
        for total, value in zip(self.sums.values(), found[2:]):
            if value is not None:
                total += value

    def totals(self, scale=None):
        """The sums, in the dtypes of what they belong to.

        Arguments
        ---------
        scale : torch.Tensor, optional
            A scalar to multiply them by.

        Returns
        -------
        tuple
            Gradients of encoder and predictor, and a list of the weights'.
        """
        totals = [self.enc, self.pred, *self.sums.values()]
        likes = [self.cells.enc, self.cells.pred, *self.weights.values()]
        if scale is not None:
            totals = [total * scale.to(total.dtype) for total in totals]
        enc, pred, *weights = (
            total.view(like.shape).to(like.dtype)
            for total, like in zip(totals, likes)
        )
        return enc, pred, weights
