"""Forward-backward algorithm on the lattice of a transducer.

A path goes from (0, 0) to (T-1, U) and ends with a blank. In cell (t, u) it
emits blank and moves to (t+1, u), or emits the next target and moves to (t, u+1).
The algorithm needs only two scores of each cell from the joint network.

Source: Graves, Sequence Transduction with Recurrent Neural Networks (arXiv
1211.3711), section 2.4; alpha and beta are the variables of that name.

Authors
 * The sb_memeff authors 2026
"""

from typing import NamedTuple

import torch

from sb_memeff.ops.dispatch import has_values, runs_fused

__all__ = ["Lattice", "forward_backward", "loss_and_occupancies"]


class Lattice(NamedTuple):
    """Result of forward_backward.

    Arguments
    ---------
    log_likelihood : torch.Tensor
        [B], logarithm of the sum of all paths' probabilities.
    blank : torch.Tensor
        [B, T, U+1], probability that the path emits blank in a cell.
    target : torch.Tensor
        [B, T, U], probability that it emits the next target there.
    """

    log_likelihood: torch.Tensor
    blank: torch.Tensor
    target: torch.Tensor


def forward_backward(
    blank: torch.Tensor,
    target: torch.Tensor,
    logit_lengths: torch.Tensor,
    target_lengths: torch.Tensor,
) -> Lattice:
    """Computes the log-likelihood and the posterior of each transition.

    The two posteriors are the gradient of the log-likelihood with respect to
    the scores. The arithmetic is float64 for any dtype, because with thousands
    of frames alpha + beta - log Z cancels six digits. It takes T + U steps of
    operations on [2B, min(T, U+1)].

    Arguments
    ---------
    blank : torch.Tensor
        [B, T, U+1], log-probabilities of blank; -inf is allowed.
    target : torch.Tensor
        [B, T, U], log-probabilities of target u+1 in cells (t, u).
    logit_lengths : torch.Tensor
        [B], number of frames of each sample, from 1 to T.
    target_lengths : torch.Tensor
        [B], number of targets of each sample, from 0 to U.

    Returns
    -------
    Lattice
        Posteriors are 0 outside a sample's lattice, and everywhere if no
        path is possible (log-likelihood -inf).

    Example
    -------
    >>> blank = torch.full((1, 2, 2), 0.5).log()
    >>> target = torch.full((1, 2, 1), 0.5).log()
    >>> lattice = forward_backward(
    ...     blank, target, torch.tensor([2]), torch.tensor([1])
    ... )
    >>> lattice.log_likelihood.exp()
    tensor([0.2500])
    >>> lattice.target
    tensor([[[0.5000],
             [0.5000]]])
    """
    if runs_fused(blank, target):
        from sb_memeff.ops.triton import lattice

        return Lattice(
            *lattice.forward_backward(
                blank, target, logit_lengths, target_lengths
            )
        )
    dtype = blank.dtype
    batch, rows, columns = blank.shape
    blank, target = blank.double(), target.double()
    logit_lengths, target_lengths = (
        n.to(blank.device).long() for n in (logit_lengths, target_lengths)
    )
    sample = torch.arange(batch, device=blank.device)
    t = torch.arange(rows, device=blank.device)[:, None]
    u = torch.arange(columns, device=blank.device)
    # After the last target: one more column of impossible scores.
    target = torch.nn.functional.pad(target, (0, 1), value=-torch.inf)
    inside = (t < logit_lengths[:, None, None]) & (
        u <= target_lengths[:, None, None]
    )
    blank = blank.masked_fill(~inside, -torch.inf)
    has_next = inside & (u < target_lengths[:, None, None])
    target = target.masked_fill(~has_next, -torch.inf)

    # Beta is the alpha of the reversed lattice.
    t_back = logit_lengths[:, None, None] - 1 - t
    u_back = target_lengths[:, None, None] - u
    alpha, reverse = _alpha(
        torch.cat([blank, _take(blank, t_back - 1, u_back)]),
        torch.cat([target, _take(target, t_back, u_back - 1)]),
    ).chunk(2)
    beta = _take(reverse, t_back, u_back)
    final = blank[sample, logit_lengths - 1, target_lengths]
    log_likelihood = alpha[sample, logit_lengths - 1, target_lengths] + final
    beta = beta + final[:, None, None]

    # Nothing follows the last blank.
    after_blank = torch.full_like(beta, -torch.inf)
    after_blank[:, :-1] = beta[:, 1:]
    after_blank[sample, logit_lengths - 1, target_lengths] = 0.0
    after_target = beta[:, :, 1:]
    # Without any path posteriors are 0, not NaN.
    scale = log_likelihood.masked_fill(log_likelihood.isneginf(), 0.0)
    start = alpha - scale[:, None, None]
    return Lattice(
        log_likelihood.to(dtype),
        (start + blank + after_blank).exp().to(dtype),
        (start + target)[:, :, :-1].add(after_target).exp().to(dtype),
    )


def loss_and_occupancies(
    blank: torch.Tensor,
    target: torch.Tensor,
    logit_lengths: torch.Tensor,
    target_lengths: torch.Tensor,
    fastemit_lambda: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Computes the losses, and the posteriors for the gradients of the rows.

    Arguments
    ---------
    blank : torch.Tensor
        [B, T, U+1], log-probabilities of blank.
    target : torch.Tensor
        [B, T, U+1], log-probabilities of the next target; the last column is
        not used.
    logit_lengths : torch.Tensor
        [B].
    target_lengths : torch.Tensor
        [B].
    fastemit_lambda : float
        Loss and emissions are multiplied by 1 + lambda (arXiv 2010.11148).

    Returns
    -------
    tuple of torch.Tensor
        Losses [B], and flat posteriors [B T (U+1)] of the blank and of
        emissions.

    Example
    -------
    >>> scores = torch.full((1, 2, 2), 0.5).log()
    >>> loss, blank, emission = loss_and_occupancies(
    ...     scores, scores, torch.tensor([2]), torch.tensor([1])
    ... )
    >>> emission
    tensor([0.5000, 0.0000, 0.5000, 0.0000])
    """
    lattice = forward_backward(
        blank, target[..., :-1], logit_lengths, target_lengths
    )
    emission = torch.nn.functional.pad(lattice.target, (0, 1))
    boost = 1 + fastemit_lambda
    return (
        -boost * lattice.log_likelihood,
        lattice.blank.flatten(),
        boost * emission.flatten(),
    )


def _take(
    plane: torch.Tensor, t: torch.Tensor, u: torch.Tensor
) -> torch.Tensor:
    """plane[b, t[b], u[b]], -inf outside."""
    batch, rows, columns = plane.shape
    outside = (t < 0) | (u < 0) | (t >= rows) | (u >= columns)
    cell = t.clamp(0, rows - 1) * columns + u.clamp(0, columns - 1)
    taken = plane.flatten(1).gather(1, cell.flatten(1)).view(cell.shape)
    return taken.masked_fill(outside, -torch.inf)


def _alpha(down: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Log-sums over the paths from (0, 0) to every cell.

    Cells of a diagonal depend only on the previous diagonal: one step for each.

    Arguments
    ---------
    down : torch.Tensor
        [N, I, J], scores from (i, j) to (i+1, j).
    right : torch.Tensor
        [N, I, J], scores from (i, j) to (i, j+1).

    Returns
    -------
    torch.Tensor
        [N, I, J].
    """
    samples, rows, columns = down.shape
    if columns > rows:
        return _alpha(right.mT, down.mT).mT
    diagonals = rows + columns - 1
    # One more, impossible column on the left, so that (i, -1) is no special case.
    down, right = (
        _skew(scores, diagonals, columns) for scores in (down, right)
    )
    alpha = torch.full_like(down, -torch.inf)
    alpha[0, :, 1] = 0.0
    if not has_values(alpha):
        # Memory analysis: all steps need the same memory.
        diagonals = min(diagonals, 2)
    for n in range(1, diagonals):
        before = alpha[n - 1]
        torch.logaddexp(
            before[:, 1:] + down[n - 1, :, 1:],
            before[:, :-1] + right[n - 1, :, :-1],
            out=alpha[n, :, 1:],
        )
    return _unskewed_view(alpha, rows, columns)


def _skew(scores: torch.Tensor, diagonals: int, columns: int) -> torch.Tensor:
    samples, rows, _ = scores.shape
    skewed = scores.new_full((diagonals, samples, columns + 1), -torch.inf)
    _unskewed_view(skewed, rows, columns).copy_(scores)
    return skewed


def _unskewed_view(
    skewed: torch.Tensor, rows: int, columns: int
) -> torch.Tensor:
    """Cell (i, j) is at [i + j, :, j + 1]."""
    diagonal, sample, column = skewed.stride()
    return skewed.as_strided(
        (skewed.shape[1], rows, columns),
        (sample, diagonal, diagonal + column),
        column,
    )
