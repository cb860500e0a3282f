"""Forward-backward of all lattices of a batch in two launches.

The first kernel has one program for each sample and direction. It loops over the
frames; within a frame the recursion over the targets,
x[u] = logaddexp(x[u-1] + e[u], c[u]), is an associative scan. The second kernel
converts the sums to posteriors. Sums are float64, as in the plain form.

Authors
 * The sb_memeff authors 2026
"""

import torch
import triton
import triton.language as tl

from sb_memeff.ops.triton.launch import launch

__all__ = ["forward_backward"]


@triton.jit
def _logaddexp(a, b):
    largest = tl.maximum(a, b)
    smaller = tl.where(a == b, 1.0, tl.exp(-tl.abs(a - b)))
    impossible = (a == -float("inf")) & (b == -float("inf"))
    return tl.where(impossible, a, largest + tl.log(1.0 + smaller))


@triton.jit
def _follow(e1, x1, e2, x2):
    return e1 + e2, _logaddexp(x1 + e2, x2)


@triton.jit
def _sums(
    blank_ptr,
    target_ptr,
    sums_ptr,
    log_likelihood_ptr,
    frames_ptr,
    targets_ptr,
    rows,
    columns,
    blank_sample,
    blank_frame,
    target_sample,
    target_frame,
    BLOCK: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    backward = tl.program_id(1) == 1
    frames = tl.load(frames_ptr + sample).to(tl.int32)
    last = tl.load(targets_ptr + sample).to(tl.int32)
    # Alpha of cell (t, u) is the sum over all paths to it, beta the sum over all
    # paths from it to the end. For beta, j counts from the end.
    j = tl.arange(0, BLOCK)
    inside = j <= last
    u = tl.where(backward, last - j, j)
    batch = tl.num_programs(0).to(tl.int64)
    plane = tl.program_id(1).to(tl.int64) * batch + sample
    sums = sums_ptr + plane * rows * columns
    blanks = blank_ptr + sample * blank_sample
    targets = target_ptr + sample * target_sample
    # The target between the columns j - 1 and j.
    between = tl.where(backward, u, u - 1)
    before = tl.full((BLOCK,), -float("inf"), tl.float64)
    for i in range(0, frames):
        t = tl.where(backward, frames - 1 - i, i).to(tl.int64)
        # The blank between this frame and the previous one of the loop.
        through = tl.where(backward, t, t - 1)
        down = tl.load(
            blanks + through * blank_frame + u,
            mask=inside & (through >= 0),
            other=-float("inf"),
        ).to(tl.float64)
        # Alpha starts with 1, beta with the last blank.
        first = tl.where(backward, down, 0.0)
        first = tl.where(j == 0, first, -float("inf"))
        enter = tl.where(i == 0, first, before + down)
        right = tl.load(
            targets + t * target_frame + between,
            mask=inside & (j > 0),
            other=-float("inf"),
        ).to(tl.float64)
        _, before = tl.associative_scan((right, enter), 0, _follow)
        before = tl.where(inside, before, -float("inf"))
        tl.store(sums + t * columns + u, before, mask=inside)
    if backward:
        whole = tl.sum(tl.where(j == last, before, 0.0), 0)
        tl.store(log_likelihood_ptr + sample, whole)


@triton.jit
def _posteriors(
    blank_ptr,
    target_ptr,
    sums_ptr,
    log_likelihood_ptr,
    frames_ptr,
    targets_ptr,
    blank_posterior_ptr,
    target_posterior_ptr,
    plane,
    rows,
    columns,
    blank_sample,
    blank_frame,
    target_sample,
    target_frame,
    BLOCK: tl.constexpr,
):
    sample = (tl.program_id(0) // rows).to(tl.int64)
    t = (tl.program_id(0) % rows).to(tl.int64)
    frames = tl.load(frames_ptr + sample).to(tl.int64)
    last = tl.load(targets_ptr + sample).to(tl.int32)
    whole = tl.load(log_likelihood_ptr + sample)
    # Without any path posteriors are 0, not NaN.
    whole = tl.where(whole == -float("inf"), 0.0, whole)
    alphas = sums_ptr + (sample * rows + t) * columns
    betas = alphas + plane
    nothing = -float("inf")
    for first in range(0, columns, BLOCK):
        u = first + tl.arange(0, BLOCK)
        inside = (t < frames) & (u <= last)
        alpha = tl.load(alphas + u, mask=inside, other=nothing) - whole
        blank = tl.load(
            blank_ptr + sample * blank_sample + t * blank_frame + u,
            mask=inside,
            other=nothing,
        ).to(tl.float64)
        after = tl.load(
            betas + columns + u,
            mask=inside & (t + 1 < frames),
            other=nothing,
        )
        # Nothing follows the last blank.
        after = tl.where((t + 1 == frames) & (u == last), 0.0, after)
        posterior = tl.exp(alpha + blank + after)
        out = blank_posterior_ptr + (sample * rows + t) * columns + u
        posterior = tl.where(inside, posterior, 0.0)
        tl.store(
            out,
            posterior.to(blank_posterior_ptr.dtype.element_ty),
            mask=u < columns,
        )
        emits = inside & (u < last)
        target = tl.load(
            target_ptr + sample * target_sample + t * target_frame + u,
            mask=emits,
            other=nothing,
        ).to(tl.float64)
        after = tl.load(betas + u + 1, mask=emits, other=nothing)
        posterior = tl.exp(alpha + target + after)
        posterior = tl.where(emits, posterior, 0.0)
        out = target_posterior_ptr + (sample * rows + t) * (columns - 1) + u
        tl.store(
            out,
            posterior.to(target_posterior_ptr.dtype.element_ty),
            mask=u < columns - 1,
        )


def forward_backward(
    blank: torch.Tensor,
    target: torch.Tensor,
    frames: torch.Tensor,
    targets: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See ``sb_memeff.ops.lattice.forward_backward``."""
    batch, rows, columns = blank.shape
    blank, target = (
        x if x.stride(-1) == 1 else x.contiguous() for x in (blank, target)
    )
    frames, targets = (
        n.to(blank.device).long().contiguous() for n in (frames, targets)
    )
    sums = blank.new_empty(2, batch, rows, columns, dtype=torch.float64)
    log_likelihood = blank.new_empty(batch, dtype=torch.float64)
    blank_posterior = blank.new_empty(batch, rows, columns)
    target_posterior = blank.new_empty(batch, rows, columns - 1)
    strides = *blank.stride()[:2], *target.stride()[:2]
    block = triton.next_power_of_2(max(columns, 32))
    launch(
        _sums,
        (batch, 2),
        blank,
        target,
        sums,
        log_likelihood,
        frames,
        targets,
        rows,
        columns,
        *strides,
        BLOCK=block,
        num_warps=min(8, block // 32),
    )
    launch(
        _posteriors,
        (batch * rows,),
        blank,
        target,
        sums,
        log_likelihood,
        frames,
        targets,
        blank_posterior,
        target_posterior,
        sums[0].numel(),
        rows,
        columns,
        *strides,
        BLOCK=min(block, 1024),
        num_warps=min(4, block // 32),
    )
    return log_likelihood.to(blank.dtype), blank_posterior, target_posterior
