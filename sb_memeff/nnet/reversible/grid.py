"""The streams of a chain: float32 numbers on a grid, where sums are exact.

Prior art: bit-reversible integrators in fixed-point arithmetic (Rein and
Tamayo, "JANUS: a bit-wise reversible integrator for N-body dynamics", 2018).

Authors
 * The sb_memeff authors 2026
"""

import dataclasses
from typing import Any

import torch

from sb_memeff.nnet.reversible.layout import split_streams
from sb_memeff.ops.grid import add_on_grid, round_to_grid, subtract_on_grid
from sb_memeff.ops.summary import Summaries

__all__ = ["StreamFormat"]


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
    summaries : Summaries, optional
        Kernels store the summaries of the streams that they write in it.
    """

    module_dtype: torch.dtype
    grid_bits: int | None
    axis: int = 1
    summaries: Summaries | None = None

    @property
    def stream_dtype(self) -> torch.dtype:
        """float64 for modules in float64, else float32."""
        return torch.promote_types(self.module_dtype, torch.float32)

    def on_grid(
        self, x: torch.Tensor, summaries: Summaries | None = None
    ) -> torch.Tensor:
        """Converts a tensor to the dtype and the grid of the streams.

        Arguments
        ---------
        x : torch.Tensor
            Any shape, floating point.
        summaries : Summaries, optional
            A kernel stores the summary of the result in it.

        Returns
        -------
        torch.Tensor
            The tensor; a new one if there is a grid.
        """
        x = self._widened(x)
        if self.grid_bits is None:
            return x
        if _needs_graph(x):
            return _RoundToGrid.apply(x, self.grid_bits)
        return round_to_grid(x, self.grid_bits, summaries)

    def add(
        self, stream: torch.Tensor, increment: torch.Tensor
    ) -> torch.Tensor:
        """Adds an increment to a stream, on the grid.

        Arguments
        ---------
        stream : torch.Tensor
            [N, C/2, ...].
        increment : torch.Tensor
            Same shape, floating point.

        Returns
        -------
        torch.Tensor
            A new tensor in the dtype of the streams.
        """
        if self.grid_bits is None or _needs_graph(stream, increment):
            # Rebinds the name, so that the increment is freed before the sum.
            increment = self.on_grid(increment)
            return stream + increment
        increment = self._widened(increment)
        return add_on_grid(stream, increment, self.grid_bits, self.summaries)

    def subtract(
        self,
        stream: torch.Tensor,
        increment: torch.Tensor,
        overwrite: bool = False,
    ) -> torch.Tensor:
        """Undoes ``add``.

        Arguments
        ---------
        stream : torch.Tensor
            A result of ``add``.
        increment : torch.Tensor
            The same as there.
        overwrite : bool
            Put the result where the stream is.

        Returns
        -------
        torch.Tensor
            The stream before.
        """
        if self.grid_bits is None or _needs_graph(stream, increment):
            increment = self.on_grid(increment)
            return stream.sub_(increment) if overwrite else stream - increment
        return subtract_on_grid(
            stream,
            self._widened(increment),
            self.grid_bits,
            self.summaries,
            overwrite,
        )

    def _widened(self, x: torch.Tensor) -> torch.Tensor:
        # Rounding converts half precision by itself, in the same pass.
        widened = torch.promote_types(x.dtype, torch.float32)
        if self.grid_bits is None or widened != self.stream_dtype:
            return x.to(self.stream_dtype)
        return x

    def to_streams(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """Makes two streams of two tensors, or of the halves of one.

        They are new tensors, since the layout of an expanded input cannot be
        restored.
        """
        if len(tensors) == 1:
            tensors = self.split(tensors[0])
        if self.grid_bits is None:
            return [x.to(self.stream_dtype, copy=True) for x in tensors]
        return [self.on_grid(x, self.summaries) for x in tensors]

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


def _needs_graph(*tensors: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


class _RoundToGrid(torch.autograd.Function):
    """The gradient passes unchanged."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bits: int) -> torch.Tensor:
        ctx.dtype = x.dtype
        return round_to_grid(x, bits)

    @staticmethod
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient.to(ctx.dtype), None
