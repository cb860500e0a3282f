"""Linear layers in half precision whose weight gradients are float32.

The gradients of the tiles of a batch are added up. autograd would round the
weight gradient of each tile to half precision before the sum: its error would
grow with the number of tiles, and float16 would overflow. A product of half
precision matrices is accumulated in float32 anyway; here it stays there.

Authors
 * The sb_memeff authors 2026
"""

import torch
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

__all__ = ["WideLinear"]


class WideLinear(TorchFunctionMode):
    """While on, ``torch.nn.functional.linear`` collects float32 gradients.

    It collects those of known weights in half-precision products; everything
    else is computed as usual.

    Arguments
    ---------
    sums : dict
        ``id`` of a weight to the float32 tensor that its gradient is added to.
    """

    def __init__(self, sums: dict[int, torch.Tensor]):
        super().__init__()
        self.sums = sums
        # What the gradients were multiplied by, a scalar tensor or 1.
        self.scale = 1

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Replaces linear."""
        if func is linear:
            return self._linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _linear(self, input, weight, bias=None):
        if not (torch.is_grad_enabled() and id(weight) in self.sums):
            return linear(input, weight, bias)
        return _Linear.apply(self, input, weight, bias)

    def add(self, weight, gradient):
        """Adds the gradient of a weight that is collected."""
        if weight is not None and id(weight) in self.sums:
            self.sums[id(weight)].add_(gradient / self.scale)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, mode, x, weight, bias):
        # Autocast, if it is on, picks the dtype.
        y = linear(x, weight, bias)
        ctx.mode, ctx.weight, ctx.bias = mode, weight, bias
        ctx.dtype = x.dtype
        ctx.save_for_backward(x.to(y.dtype))
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        gradient = gradient.flatten(0, -2)
        dx = (gradient @ ctx.weight.to(gradient.dtype)).view(x.shape)
        ctx.mode.add(ctx.weight, _product(gradient, x.flatten(0, -2)))
        if ctx.bias is not None:
            wide = ctx.mode.sums[id(ctx.weight)].dtype
            ctx.mode.add(ctx.bias, gradient.sum(0, dtype=wide))
        return None, dx.to(ctx.dtype), None, None


def _product(gradient, x):
    """gradient^T x in float32."""
    if gradient.is_cuda and gradient.dtype in (torch.float16, torch.bfloat16):
        return torch.mm(gradient.t(), x, out_dtype=torch.float32)
    return gradient.float().t() @ x.float()
