"""The streams of a chain: float32 numbers on a grid, where sums are exact.

Prior art: bit-reversible integrators in fixed-point arithmetic (Rein and
Tamayo, "JANUS: a bit-wise reversible integrator for N-body dynamics", 2018).

Authors
 * The sb_memeff authors 2026
"""

import dataclasses
from typing import Any

import torch

from sb_memeff.nnet.reversible.layout import is_channels_last, split_streams
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
    """Rounds without a graph."""
    if runs_fused(x) and (x.is_contiguous() or is_channels_last(x)):
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
    """Dtypes of modules and streams, and the grid of the streams.

    Arguments
    ---------
    module_dtype : torch.dtype
        Dtype of the inputs of modules.
    grid_bits : int, optional
        Streams are multiples of 2**-grid_bits; None for a stream without a
        grid.
    axis : int
        The dimension of a tensor that is split into two streams.
    """

    module_dtype: torch.dtype
    grid_bits: int | None
    axis: int = 1

    @property
    def stream_dtype(self) -> torch.dtype:
        """float64 for modules in float64, else float32."""
        return torch.promote_types(self.module_dtype, torch.float32)

    def on_grid(self, x: torch.Tensor) -> torch.Tensor:
        """Converts a tensor to the dtype and the grid of the streams."""
        # Rounding converts half precision by itself, in the same pass.
        widened = torch.promote_types(x.dtype, torch.float32)
        if self.grid_bits is None or widened != self.stream_dtype:
            x = x.to(self.stream_dtype)
        return x if self.grid_bits is None else round_to_grid(x, self.grid_bits)

    def to_streams(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """Makes two streams of two tensors, or of the halves of one.

        They are new tensors, since the layout of an expanded input cannot be
        restored.
        """
        if len(tensors) == 1:
            tensors = self.split(tensors[0])
        if self.grid_bits is None:
            return [x.to(self.stream_dtype, copy=True) for x in tensors]
        return [self.on_grid(x) for x in tensors]

    def from_streams(self, *tensors: torch.Tensor) -> torch.Tensor:
        """Makes the input of a module of two streams, or of one tensor."""
        if len(tensors) == 1:
            return tensors[0]
        return self.join(*tensors).to(self.module_dtype)

    def split(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Splits a tensor into two streams in its dtype, which are views."""
        return split_streams(x, self.axis)

    def join(self, *streams: torch.Tensor) -> torch.Tensor:
        """Joins two streams to one tensor in their dtype."""
        return torch.cat(streams, dim=self.axis)
