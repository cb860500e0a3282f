"""The grid of an exact stream: rounding onto it, and sums on it.

A sum of multiples of 2**-bits is exact in float32 as long as it stays below
2**(24 - bits), and so is its inverse.

Authors
 * The sb_memeff authors 2026
"""

import torch

from sb_memeff.ops.dispatch import runs_fused
from sb_memeff.ops.slices import slices
from sb_memeff.ops.summary import Summaries, is_dense

__all__ = ["add_on_grid", "round_to_grid", "subtract_on_grid"]


def round_to_grid(
    x: torch.Tensor, bits: int, summaries: Summaries | None = None
) -> torch.Tensor:
    """Rounds to multiples of 2**-bits, half to even.

    Arguments
    ---------
    x : torch.Tensor
        Any shape, floating point.
    bits : int
        Bits after the binary point.
    summaries : Summaries, optional
        A kernel stores the summary of the result in it.

    Returns
    -------
    torch.Tensor
        A new tensor of that shape, float32 (float64 of float64).

    Example
    -------
    >>> round_to_grid(torch.tensor([0.3, 0.4]), bits=1)
    tensor([0.5000, 0.5000])
    """
    if runs_fused(x):
        # Copying half a tensor takes less time than the plain form.
        x = x if is_dense(x) else x.clone()
        if is_dense(x):
            rounded = torch.empty_like(x, dtype=torch.float32)
            return _combine(0, None, x, bits, rounded, summaries)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    # Scaling by a power of two is exact; only round() rounds. It makes -0 of
    # small negative numbers, which no subtraction would give back.
    return (x * 2.0**bits).round_().mul_(2.0**-bits).add_(0.0)


def add_on_grid(
    stream: torch.Tensor,
    increment: torch.Tensor,
    bits: int,
    summaries: Summaries | None = None,
) -> torch.Tensor:
    """stream + round_to_grid(increment).

    Arguments
    ---------
    stream : torch.Tensor
        float32, on the grid.
    increment : torch.Tensor
        Of that shape, float32 or half precision.
    bits : int
        Bits after the binary point.
    summaries : Summaries, optional
        A kernel stores the summary of the result in it.

    Returns
    -------
    torch.Tensor
        A new tensor, float32, laid out as the stream.

    Example
    -------
    >>> add_on_grid(torch.tensor([2.0]), torch.tensor([0.3]), bits=1)
    tensor([2.5000])
    """
    if _are_fused(stream, increment):
        result = torch.empty_like(stream)
        return _combine(1, stream, increment, bits, result, summaries)
    rounded = round_to_grid(increment, bits)
    if rounded.stride() != stream.stride():
        return stream + rounded
    # In place, since the increment is still in memory.
    return rounded.add_(stream)


def subtract_on_grid(
    stream: torch.Tensor,
    increment: torch.Tensor,
    bits: int,
    summaries: Summaries | None = None,
    overwrite: bool = False,
) -> torch.Tensor:
    """stream - round_to_grid(increment), which undoes ``add_on_grid``.

    Arguments
    ---------
    stream : torch.Tensor
        float32, on the grid.
    increment : torch.Tensor
        Of that shape, float32 or half precision.
    bits : int
        Bits after the binary point.
    summaries : Summaries, optional
        A kernel stores the summary of the result in it.
    overwrite : bool
        Put the result where the stream is.

    Returns
    -------
    torch.Tensor
        The stream itself, if it is overwritten; else a new tensor.

    Example
    -------
    >>> subtract_on_grid(torch.tensor([2.5]), torch.tensor([0.3]), bits=1)
    tensor([2.])
    """
    if _are_fused(stream, increment):
        result = stream if overwrite else torch.empty_like(stream)
        return _combine(-1, stream, increment, bits, result, summaries)
    if overwrite and stream.dim():
        for rows in slices(len(stream), stream.nbytes):
            stream[rows].sub_(round_to_grid(increment[rows], bits))
        return stream
    rounded = round_to_grid(increment, bits)
    if rounded.stride() != stream.stride():
        return stream - rounded
    return rounded.neg_().add_(stream)


def _are_fused(stream: torch.Tensor, increment: torch.Tensor) -> bool:
    """Whether values at the same position in memory belong together."""
    return (
        runs_fused(stream, increment)
        and stream.dtype == torch.float32
        and stream.shape == increment.shape
        and is_dense(stream)
        and (
            stream.stride() == increment.stride()
            or (stream.is_contiguous() and increment.is_contiguous())
        )
    )


def _combine(
    sign: int,
    stream: torch.Tensor | None,
    increment: torch.Tensor,
    bits: int,
    result: torch.Tensor,
    summaries: Summaries | None,
) -> torch.Tensor:
    from sb_memeff.ops.triton.grid import combine_on_grid

    row = summary = None
    if summaries is not None:
        row, summary = summaries.new(result.device)
    combine_on_grid(sign, stream, increment, bits, result, row)
    if summaries is not None and summary is not None:
        summaries.put(result, summary)
    return result
