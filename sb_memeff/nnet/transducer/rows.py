"""Rows of logits: what one cell of the lattice has to do with the vocabulary.

With p the softmax of a row, and b and e the posteriors that the path emits
blank or the next target there, the gradient of the negative log-likelihood is

    d/dlogits[v] = p[v] (b + e) - [v = blank] b - [v = target] e

(softmax and lattice merged, as in warp-transducer and torchaudio). FastEmit
(Yu et al., arXiv 2010.11148) replaces e by (1 + lambda) e.

Authors
 * The sb_memeff authors 2026
"""

import torch

__all__ = ["row_gradient", "row_scores", "wide_dtype"]


def wide_dtype(dtype):
    """The dtype to compute and to add up in: float32, or float64 for itself.

    Arguments
    ---------
    dtype : torch.dtype
        Of the tensors given.

    Returns
    -------
    torch.dtype
        float32 or float64.

    Example
    -------
    >>> wide_dtype(torch.bfloat16)
    torch.float32
    """
    return dtype if dtype == torch.float64 else torch.float32


def row_scores(logits, target, blank_index):
    """Log-probabilities of blank and of the next target in each row.

    Arguments
    ---------
    logits : torch.Tensor
        [N, V]; half precision is computed in float32.
    target : torch.Tensor
        [N], the next target of each row; any symbol where there is none.
    blank_index : int
        The blank.

    Returns
    -------
    tuple of torch.Tensor
        [N] each: log of the sum of exponentials, blank, target.

    Example
    -------
    >>> _, blank, target = row_scores(torch.zeros(1, 4), torch.tensor([2]), 0)
    >>> blank.exp(), target.exp()
    (tensor([0.2500]), tensor([0.2500]))
    """
    logits = logits.to(wide_dtype(logits.dtype))
    normaliser = logits.logsumexp(1)
    blank = logits[:, blank_index] - normaliser
    picked = logits.gather(1, target[:, None]).squeeze(1)
    return normaliser, blank, picked - normaliser


def row_gradient(logits, normaliser, target, blank, emission, blank_index):
    """Gradient of the negative log-likelihood with respect to the logits.

    Arguments
    ---------
    logits : torch.Tensor
        [N, V].
    normaliser : torch.Tensor
        [N], as row_scores returned it.
    target : torch.Tensor
        [N], as for row_scores.
    blank : torch.Tensor
        [N], posterior of the blank.
    emission : torch.Tensor
        [N], posterior of the target, times 1 + lambda with FastEmit; 0 where
        there is no next target.
    blank_index : int
        The blank.

    Returns
    -------
    torch.Tensor
        [N, V], float32 at least. Each row sums to 0 if the normaliser is
        that of these logits.

    Example
    -------
    >>> logits = torch.zeros(1, 4)
    >>> target, half = torch.tensor([2]), torch.tensor([0.5])
    >>> normaliser, *_ = row_scores(logits, target, 0)
    >>> row_gradient(logits, normaliser, target, half, half, 0)
    tensor([[-0.2500,  0.2500, -0.2500,  0.2500]])
    """
    logits = logits.to(wide_dtype(logits.dtype))
    gradient = (logits - normaliser[:, None]).exp_()
    gradient *= (blank + emission)[:, None]
    gradient[:, blank_index] -= blank
    gradient.scatter_add_(1, target[:, None], -emission[:, None])
    return gradient
