"""The exact stream: float32 numbers on a grid, where sums are exact.

Prior art: bit-reversible integrators in fixed-point arithmetic (Rein and
Tamayo, "JANUS: a bit-wise reversible integrator for N-body dynamics", 2018).

Authors
 * The sb_memeff authors 2026
"""

import dataclasses
from typing import Any

import torch

from sb_memeff.nnet.reversible.coupling import channels_are_last, halves
from sb_memeff.ops.dispatch import runs_fused

__all__ = ["StreamFormat", "round_to_grid"]


def round_to_grid(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Rounds to multiples of 2**-bits; the gradient passes unchanged.

    Arguments
    ---------
    x : torch.Tensor
        Any shape, floating point.
    bits : int
        Bits after the binary point.

    Returns
    -------
    torch.Tensor
        A new tensor of that shape, float32 (float64 of float64).

    Example
    -------
    >>> round_to_grid(torch.tensor([0.3, 0.4]), bits=1)
    tensor([0.5000, 0.5000])
    """
    if torch.is_grad_enabled() and x.requires_grad:
        return _RoundToGrid.apply(x, bits)
    return _rounded(x, bits)


def _rounded(x: torch.Tensor, bits: int) -> torch.Tensor:
    """On the grid, in float32 or float64."""
    if runs_fused(x) and (x.is_contiguous() or channels_are_last(x)):
        from sb_memeff.ops.triton import grid

        return grid.round_to_grid(x, bits)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    # Scaling by a power of two is exact; only round() rounds. It makes -0 of
    # small negative numbers, which no subtraction would give back.
    return (x * 2.0**bits).round_().mul_(2.0**-bits).add_(0.0)


class _RoundToGrid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bits: int) -> torch.Tensor:
        ctx.dtype = x.dtype
        return _rounded(x, bits)

    @staticmethod
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient.to(ctx.dtype), None


@dataclasses.dataclass(frozen=True)
class StreamFormat:
    """Dtypes inside and outside of f and g, and the grid of the streams.

    Arguments
    ---------
    inner_dtype : torch.dtype
        In which modules are called.
    bits : int, optional
        Streams are multiples of 2**-bits; None for a stream without a grid.
    axis : int
        The dimension of a tensor that both streams share.
    """

    inner_dtype: torch.dtype
    bits: int | None
    axis: int = 1

    @property
    def stream_dtype(self) -> torch.dtype:
        """float32, or float64 for itself."""
        return torch.promote_types(self.inner_dtype, torch.float32)

    def on_grid(self, x: torch.Tensor) -> torch.Tensor:
        """A tensor in the dtype and on the grid of the streams."""
        # Rounding takes half precision as it is, in one pass.
        widened = torch.promote_types(x.dtype, torch.float32)
        if self.bits is None or widened != self.stream_dtype:
            x = x.to(self.stream_dtype)
        return x if self.bits is None else round_to_grid(x, self.bits)

    def enter(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """Two streams from two tensors, or from the halves of one.

        They are new tensors: an expanded input has no layout to restore.
        """
        if len(tensors) == 1:
            tensors = self.split(tensors[0])
        if self.bits is None:
            return [x.to(self.stream_dtype, copy=True) for x in tensors]
        return [self.on_grid(x) for x in tensors]

    def leave(self, *tensors: torch.Tensor) -> torch.Tensor:
        """One tensor, as modules see it, from two streams or from itself."""
        if len(tensors) == 1:
            return tensors[0]
        return self.join(*tensors).to(self.inner_dtype)

    def split(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of one tensor: the two streams, in its dtype."""
        return halves(x, self.axis)

    def join(self, *streams: torch.Tensor) -> torch.Tensor:
        """One tensor of two streams, in their dtype."""
        return torch.cat(streams, dim=self.axis)
