"""Scores of rows of logits, and the gradient with respect to the logits.

One program a row. The formulas are those of ``ops.logit_rows``.

Authors
 * The sb_memeff authors 2026
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from sb_memeff.ops.triton.launch import launch

__all__ = ["row_gradient", "row_scores"]

# Columns that a program holds at a time.
BLOCK = 1024


@triton.jit
def _scores(
    logits_ptr,
    target_ptr,
    scores_ptr,
    rows,
    vocabulary,
    BLANK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    start = logits_ptr + row * vocabulary
    largest = -float("inf")
    total = 0.0
    for first in range(0, vocabulary, BLOCK):
        v = first + tl.arange(0, BLOCK)
        z = tl.load(start + v, mask=v < vocabulary, other=-float("inf"))
        z = z.to(tl.float32)
        new = tl.maximum(largest, tl.max(z, 0))
        # Infinite values are not shifted, because inf - inf is NaN.
        shift = tl.where(tl.abs(new) == float("inf"), 0.0, new)
        total = total * tl.exp(largest - shift)
        total += tl.sum(tl.exp(z - shift), 0)
        largest = new
    shift = tl.where(tl.abs(largest) == float("inf"), 0.0, largest)
    lse = shift + tl.log(total)
    blank = tl.load(start + BLANK).to(tl.float32)
    symbol = tl.load(target_ptr + row)
    target = tl.load(start + symbol).to(tl.float32)
    tl.store(scores_ptr + row, lse)
    tl.store(scores_ptr + rows + row, blank - lse)
    tl.store(scores_ptr + 2 * rows + row, target - lse)


@triton.jit
def _gradient(
    logits_ptr,
    lse_ptr,
    target_ptr,
    blank_ptr,
    emission_ptr,
    weight_ptr,
    scale_ptr,
    gradient_ptr,
    deviation_ptr,
    largest_ptr,
    vocabulary,
    clamp,
    deviations_per_unit,
    BLANK: tl.constexpr,
    HAS_CLAMP: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    WRITES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    start = row * vocabulary
    lse = tl.load(lse_ptr + row)
    blank = tl.load(blank_ptr + row)
    emission = tl.load(emission_ptr + row)
    symbol = tl.load(target_ptr + row)
    factor = 1.0
    if HAS_WEIGHT:
        factor = tl.load(weight_ptr + row)
    if HAS_SCALE:
        factor = factor * tl.load(scale_ptr)
    total = 0.0
    largest = 0.0
    for first in range(0, vocabulary, BLOCK):
        v = first + tl.arange(0, BLOCK)
        inside = v < vocabulary
        z = tl.load(logits_ptr + start + v, mask=inside, other=-float("inf"))
        g = tl.exp(z.to(tl.float32) - lse) * (blank + emission)
        g = tl.where(inside, g, 0.0)
        g = g - tl.where(v == BLANK, blank, 0.0)
        g = g - tl.where(v == symbol, emission, 0.0)
        total += tl.sum(g, 0)
        if HAS_CLAMP:
            # tl.minimum and tl.maximum would drop NaN.
            g = tl.where(g > clamp, clamp, g)
            g = tl.where(g < -clamp, -clamp, g)
        g = g * factor
        if WRITES:
            g = g.to(gradient_ptr.dtype.element_ty)
            tl.store(gradient_ptr + start + v, g, mask=inside)
        else:
            size = tl.where(g == g, tl.abs(g), 1.0)
            largest = tl.maximum(largest, tl.max(size, 0))
    if WRITES:
        off = tl.abs(total) * deviations_per_unit
        # A row's gradient sums to 0. Ignore rows that are not finite.
        off = tl.where(off < float("inf"), off, 0.0)
        tl.atomic_max(deviation_ptr, off)
    else:
        tl.atomic_max(largest_ptr, largest)


def row_scores(
    logits: torch.Tensor, target: torch.Tensor, blank_index: int
) -> torch.Tensor:
    """See ``sb_memeff.ops.logit_rows.row_scores``."""
    logits, target = logits.contiguous(), target.contiguous()
    rows, vocabulary = logits.shape
    scores = logits.new_empty(3, rows, dtype=torch.float32)
    if rows:
        launch(
            _scores,
            (rows,),
            logits,
            target,
            scores,
            rows,
            vocabulary,
            BLANK=blank_index,
            BLOCK=BLOCK,
        )
    return scores


def row_gradient(
    logits: torch.Tensor,
    lse: torch.Tensor,
    target: torch.Tensor,
    blank: torch.Tensor,
    emission: torch.Tensor,
    blank_index: int,
    deviation: torch.Tensor,
    allowed: float,
    clamp: float | None = None,
    weight: torch.Tensor | None = None,
    fit: Callable[[torch.Tensor], torch.Tensor] | None = None,
    overwrite: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See ``sb_memeff.ops.logit_rows.row_gradient``."""
    logits = logits.contiguous()
    lse, target, blank, emission = (
        x.contiguous() for x in (lse, target, blank, emission)
    )
    if weight is not None:
        weight = weight.to(torch.float32).contiguous()
    rows, vocabulary = logits.shape
    # A program reads the logits of a column before it writes them.
    gradient = logits if overwrite else torch.empty_like(logits)
    scale = factor = None
    if not rows:
        return gradient, factor

    def launch_gradient(
        writes: bool, scale: torch.Tensor | None, largest: torch.Tensor | None
    ) -> None:
        # A pointer that is not read may be any.
        launch(
            _gradient,
            (rows,),
            logits,
            lse,
            target,
            blank,
            emission,
            lse if weight is None else weight,
            lse if scale is None else scale,
            gradient,
            deviation,
            deviation if largest is None else largest,
            vocabulary,
            0.0 if clamp is None else float(clamp),
            1 / allowed,
            BLANK=blank_index,
            HAS_CLAMP=clamp is not None,
            HAS_WEIGHT=weight is not None,
            HAS_SCALE=scale is not None,
            WRITES=writes,
            BLOCK=BLOCK,
        )

    if fit is not None:
        largest = torch.zeros_like(deviation)
        launch_gradient(False, None, largest)
        scale = fit(largest.reshape(()))
        factor = scale.reciprocal()
    launch_gradient(True, scale, None)
    return gradient, factor
