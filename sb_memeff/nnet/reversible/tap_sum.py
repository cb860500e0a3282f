"""The sum of the values that the taps of a chain read.

Authors
 * The sb_memeff authors 2026
"""

from typing import Any, cast

import torch

from sb_memeff.nnet.reversible.grid import StreamFormat

__all__ = ["DetachedTapSum", "TapSum"]


class TapSum:
    """Sum of the values of all taps of a chain, in the dtype of its streams.

    Arguments
    ---------
    stream_format : StreamFormat
        Dtypes.
    """

    def __init__(self, stream_format: StreamFormat):
        self.format = stream_format
        self.value: torch.Tensor | None = None
        self.dtype: torch.dtype | None = None

    def add(self, value: torch.Tensor, name: str) -> None:
        """Adds the value of one more tap.

        Arguments
        ---------
        value : torch.Tensor
            The value.
        name : str
            Name of the module that computed it, for the error.

        Raises
        ------
        ValueError
            If its shape is not that of the values before.
        """
        if self.value is not None and value.shape != self.value.shape:
            raise ValueError(
                f"{name} reads a tensor of shape {tuple(value.shape)}; the "
                f"taps before it gave {tuple(self.value.shape)}. All are added "
                f"up and must have the same shape."
            )
        self._add(value)

    def _add(self, value: torch.Tensor) -> None:
        if self.value is None:
            self.dtype = value.dtype
            # A copy, since the sum is updated in place.
            self.value = value.to(self.format.stream_dtype, copy=True)
        else:
            self.value = self.value.add_(value)

    def result(self) -> torch.Tensor:
        """The sum in the dtype of the first tap's value."""
        return cast(torch.Tensor, self.value).to(self.dtype)


class DetachedTapSum(TapSum):
    """The sum, outside autograd's graph.

    The gradients of all values are equal: each is that of the result. It is
    held once, in the dtype of the result. An empty tensor, the token, passes
    from node to node and fixes their order.

    Arguments
    ---------
    stream_format : StreamFormat
        Dtypes.
    device : torch.device
        Device of the chain.
    """

    def __init__(self, stream_format: StreamFormat, device: torch.device):
        super().__init__(stream_format)
        # autograd refuses a gradient on another device, even an empty one.
        self.token: torch.Tensor | None = torch.empty(0, device=device)
        self.gradient: torch.Tensor | None = None

    def _add(self, value: torch.Tensor) -> None:
        self.token = _AddNode.apply(self, self.token, value)

    def result(self) -> torch.Tensor:
        """The sum, see TapSum; may be called once."""
        return _ResultNode.apply(self, self.token)

    def release(self) -> None:
        """Drops the token, after forward or when it has failed.

        The nodes hold this object. As long as its token holds the nodes,
        Python can free neither.
        """
        self.token = None


class _AddNode(torch.autograd.Function):
    """Adds the term of one tap; its output only orders the nodes."""

    @staticmethod
    def forward(
        ctx: Any,
        tap_sum: DetachedTapSum,
        token: torch.Tensor,
        value: torch.Tensor,
    ) -> torch.Tensor:
        ctx.tap_sum, ctx.dtype = tap_sum, value.dtype
        ctx.is_first = tap_sum.value is None
        TapSum._add(tap_sum, value)
        return token.new_empty(0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    # pyrefly: ignore[bad-override]
    def backward(
        ctx: Any, token: torch.Tensor
    ) -> tuple[None, torch.Tensor, torch.Tensor | None]:
        gradient = ctx.tap_sum.gradient
        if ctx.is_first:
            ctx.tap_sum.gradient = None
        if gradient is not None:
            gradient = gradient.to(ctx.dtype)
        # It is None if the loss depends on the other output only.
        return None, token, gradient


class _ResultNode(torch.autograd.Function):
    """Returns the sum, and keeps its gradient for all terms."""

    @staticmethod
    def forward(
        ctx: Any, tap_sum: DetachedTapSum, token: torch.Tensor
    ) -> torch.Tensor:
        ctx.tap_sum = tap_sum
        value, tap_sum.value = cast(torch.Tensor, tap_sum.value), None
        return value.to(tap_sum.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, torch.Tensor]:
        ctx.tap_sum.gradient = gradient
        return None, gradient.new_empty(0)
