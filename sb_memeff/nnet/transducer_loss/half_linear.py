"""Linear layers in half precision with weight gradients in float32.

autograd computes the gradient of a weight in the dtype of the layer's input. In
float16 the sum over the rows of a tile overflows at 65504, whatever the loss
scale, and in bfloat16 each tile keeps only 8 bits. Here the product of
half-precision rows is float32, and is added to a float32 sum.

Authors
 * The sb_memeff authors 2026
"""

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from sb_memeff.ops.dispatch import is_on_gpu

__all__ = ["HALF", "Float32WeightGradients", "wide_product"]

HALF = (torch.float16, torch.bfloat16)
# Whether torch has a product of half-precision matrices with a float32 result.
HAS_WIDE_MM = (
    "dtype" in torch.ops.aten.mm.overloads() and torch.version.hip is None
)


class Float32WeightGradients(TorchFunctionMode):
    """Accumulates weight gradients of linear layers in float32.

    The layers' outputs and the gradients of their inputs are those of torch.
    The mode changes only ``torch.nn.functional.linear`` in half precision.

    Arguments
    ---------
    sums : dict
        Maps the id of a weight or bias, which must be a leaf, to the float32
        tensor that accumulates its gradient; autograd then computes no
        gradient for it. Other weights get gradients as usual, in their dtype.

    Attributes
    ----------
    factor : torch.Tensor or None
        Scalar factor of everything added to the sums; set it before
        backward.

    Example
    -------
    >>> layer = torch.nn.Linear(3, 2).bfloat16()
    >>> total = torch.zeros(2, 3)
    >>> with Float32WeightGradients({id(layer.weight): total}):
    ...     y = layer(torch.ones(4, 3).bfloat16())
    >>> y.sum().backward()
    >>> total
    tensor([[4., 4., 4.],
            [4., 4., 4.]])
    >>> layer.weight.grad is None, layer.bias.grad.dtype
    (True, torch.bfloat16)
    """

    def __init__(self, sums: dict[int, torch.Tensor]):
        super().__init__()
        self.sums = sums
        self.factor: torch.Tensor | None = None

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Collection[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Replaces torch.nn.functional.linear."""
        kwargs = kwargs or {}
        if func is functional.linear:
            return self._linear(*args, **kwargs)
        return func(*args, **kwargs)

    def _linear(
        self,
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        dtype = _dtype_of_linear(input, weight, bias)
        if dtype not in HALF or weight.dim() != 2:
            return functional.linear(input, weight, bias)
        totals = self.sums.get(id(weight)), self.sums.get(id(bias))
        return _HalfLinear.apply(input, weight, bias, dtype, self, totals)

    def add(
        self,
        total: torch.Tensor | None,
        found: torch.Tensor,
        dtype: torch.dtype,
    ) -> torch.Tensor | None:
        """Adds to a sum, or returns the gradient for autograd."""
        if total is None:
            return found.to(dtype)
        if self.factor is None:
            total += found
        else:
            total.addcmul_(found, self.factor)
        return None


def _dtype_of_linear(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.dtype | None:
    """The dtype in which torch computes the layer; None if it would fail."""
    tensors = [x for x in (input, weight, bias) if x is not None]
    kind = input.device.type
    if torch.is_autocast_enabled(kind):
        # Autocast does not convert float64 and integers.
        narrow = (*HALF, torch.float32)
        if all(x.dtype in narrow for x in tensors):
            return torch.get_autocast_dtype(kind)
    elif all(x.dtype == input.dtype for x in tensors):
        return input.dtype
    return None


class _HalfLinear(torch.autograd.Function):
    """A linear layer whose backward adds to sums in float32."""

    @staticmethod
    def forward(
        ctx: Any,
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
        mode: Float32WeightGradients,
        totals: tuple[torch.Tensor | None, torch.Tensor | None],
    ) -> torch.Tensor:
        rows, narrow = input.to(dtype), weight.to(dtype)
        ctx.save_for_backward(rows, narrow)
        ctx.mode, ctx.totals = mode, totals
        ctx.dtypes = input.dtype, weight.dtype, bias is not None and bias.dtype
        if bias is not None:
            bias = bias.to(dtype)
        with torch.autocast(input.device.type, enabled=False):
            return functional.linear(rows, narrow, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    # pyrefly: ignore[bad-override]
    def backward(
        ctx: Any, gradient: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        add, totals = ctx.mode.add, ctx.totals
        for_input = for_weight = for_bias = None
        flat = gradient.reshape(-1, gradient.shape[-1])
        with torch.autocast(gradient.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                for_input = (gradient @ weight).to(ctx.dtypes[0])
            if ctx.needs_input_grad[1]:
                found = wide_product(flat.t(), rows.reshape(-1, rows.shape[-1]))
                for_weight = add(totals[0], found, ctx.dtypes[1])
            if ctx.needs_input_grad[2]:
                found = flat.sum(0, dtype=torch.float32)
                for_bias = add(totals[1], found, ctx.dtypes[2])
        return for_input, for_weight, for_bias, None, None, None


def wide_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Multiplies two half-precision matrices in float32.

    Arguments
    ---------
    a : torch.Tensor
        [M, N].
    b : torch.Tensor
        [N, K].

    Returns
    -------
    torch.Tensor
        [M, K].

    Example
    -------
    >>> ones = torch.ones(2, 3).half()
    >>> wide_product(ones, 3e4 * ones.t())[0]
    tensor([90000., 90000.])
    """
    if is_on_gpu(a) and HAS_WIDE_MM:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()
