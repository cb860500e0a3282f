"""Scores and gradients of rows of logits, one row for each cell.

With p the softmax of a row, and b and e the posteriors that the path emits
blank or the next target there, the gradient of the negative log-likelihood is

    d/dlogits[v] = p[v] (b + e) - [v = blank] b - [v = target] e

(softmax and lattice merged, as in warp-transducer and torchaudio). FastEmit
(Yu et al., arXiv 2010.11148) replaces e by (1 + lambda) e.

Authors
 * The sb_memeff authors 2026
"""

import torch

from sb_memeff.ops.dispatch import has_values, runs_fused

__all__ = ["row_gradient", "row_scores", "scale_into_float16", "wide_dtype"]


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of computations and sums: float32, or float64 for float64.

    Arguments
    ---------
    dtype : torch.dtype
        Dtype of the tensors.

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


def row_scores(
    logits: torch.Tensor, target: torch.Tensor, blank_index: int
) -> torch.Tensor:
    """Computes log-probabilities of blank and next target in each row.

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
    torch.Tensor
        [3, N]: log of the sum of exponentials, blank, target.

    Example
    -------
    >>> _, blank, target = row_scores(torch.zeros(1, 4), torch.tensor([2]), 0)
    >>> blank.exp(), target.exp()
    (tensor([0.2500]), tensor([0.2500]))
    """
    if runs_fused(logits):
        from sb_memeff.ops.triton import logit_rows

        return logit_rows.row_scores(logits, target, blank_index)
    logits = logits.to(wide_dtype(logits.dtype))
    lse = logits.logsumexp(1)
    blank = logits[:, blank_index] - lse
    picked = logits.gather(1, target[:, None]).squeeze(1)
    return torch.stack([lse, blank, picked - lse])


def row_gradient(
    logits: torch.Tensor,
    lse: torch.Tensor,
    target: torch.Tensor,
    blank: torch.Tensor,
    emission: torch.Tensor,
    blank_index: int,
    deviation: torch.Tensor | None = None,
    clamp: float | None = None,
    weight: torch.Tensor | None = None,
    fit_into_float16: bool = False,
    overwrite: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Computes the gradient of the negative log-likelihood of the logits.

    Arguments
    ---------
    logits : torch.Tensor
        [N, V].
    lse : torch.Tensor
        [N], from row_scores.
    target : torch.Tensor
        [N], as for row_scores.
    blank : torch.Tensor
        [N], posterior of the blank.
    emission : torch.Tensor
        [N], posterior of the target, times 1 + lambda with FastEmit; 0 where
        there is no next target.
    blank_index : int
        The blank.
    deviation : torch.Tensor, optional
        [1], float32. Set to at least the largest deviation of a row's sum
        from 0, in units of the deviation that rounding can explain. Above 1,
        the normaliser is not that of these logits.
    clamp : float, optional
        Limit of the elements.
    weight : torch.Tensor, optional
        [N], factor of each row, applied last.
    fit_into_float16 : bool
        Whether to scale the gradient by a power of two so that its largest
        magnitude is between 8 and 16. This leaves room for products with
        weights, and values 2^18 times smaller keep all their bits.
    overwrite : bool
        Whether a kernel may overwrite the logits.

    Returns
    -------
    tuple
        The gradient [N, V] in the dtype of the logits, and a scalar that
        undoes the scaling, or None.

    Example
    -------
    >>> logits = torch.zeros(1, 4)
    >>> target, half = torch.tensor([2]), torch.tensor([0.5])
    >>> lse, *_ = row_scores(logits, target, 0)
    >>> row_gradient(logits, lse, target, half, half, 0)[0]
    tensor([[-0.2500,  0.2500, -0.2500,  0.2500]])
    """
    dtype = logits.dtype
    # Other matrix products may sum in another order.
    allowed = max(1e-3, 64 * torch.finfo(dtype).eps)
    if runs_fused(logits):
        from sb_memeff.ops.triton import logit_rows

        if deviation is None:
            deviation = lse.new_zeros(1)
        return logit_rows.row_gradient(
            logits,
            lse,
            target,
            blank,
            emission,
            blank_index,
            deviation,
            allowed,
            clamp,
            weight,
            scale_into_float16 if fit_into_float16 else None,
            overwrite,
        )
    logits = logits.to(wide_dtype(dtype))
    gradient = (logits - lse[:, None]).exp_()
    gradient *= (blank + emission)[:, None]
    gradient[:, blank_index] -= blank
    gradient.scatter_add_(1, target[:, None], -emission[:, None])
    if deviation is not None and has_values(gradient):
        # A row's gradient sums to 0. Ignore rows that are not finite.
        sums = gradient.sum(1).nan_to_num_(0, 0, 0)
        largest = torch.linalg.vector_norm(sums, torch.inf)
        torch.maximum(deviation, (largest / allowed).float(), out=deviation)
    if clamp is not None:
        gradient.clamp_(-clamp, clamp)
    if weight is not None:
        gradient *= weight.to(gradient.dtype)[:, None]
    factor = None
    if fit_into_float16:
        largest = torch.linalg.vector_norm(gradient, torch.inf)
        scale = scale_into_float16(largest)
        gradient *= scale
        factor = scale.reciprocal()
    return gradient.to(dtype), factor


def scale_into_float16(largest: torch.Tensor) -> torch.Tensor:
    """Powers of two that bring magnitudes between 8 and 16.

    Arguments
    ---------
    largest : torch.Tensor
        The largest magnitudes, float32 or float64; of what is not finite, or
        0, the power is some finite one.

    Returns
    -------
    torch.Tensor
        Of that shape and dtype.

    Example
    -------
    >>> scale_into_float16(torch.tensor([3.0, 16.0, 1e-5]))
    tensor([4.0000e+00, 5.0000e-01, 1.0486e+06])
    """
    largest = largest.nan_to_num(1, 1).clamp_(min=1e-30)
    # largest = mantissa 2^n, so the quotient is a power of two.
    return 16 * torch.frexp(largest).mantissa / largest
