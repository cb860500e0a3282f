"""Weights of several convolutions, converted to half precision in one launch.

Authors
 * The sb_memeff authors 2026
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from sb_memeff.ops.dispatch import is_on_gpu
from sb_memeff.utils.autograd import in_plain_autograd

__all__ = ["cast_weights"]


def cast_weights(
    convs: Sequence[nn.Conv2d],
) -> Sequence[torch.Tensor | None]:
    """Converts weights to the dtype of autocast, all in one launch on a GPU.

    Their gradients are converted back in one launch too.

    Arguments
    ---------
    convs : list of torch.nn.Conv2d
        The convolutions.

    Returns
    -------
    list
        A weight for each convolution; None for each without autocast or on a
        CPU.

    Example
    -------
    >>> cast_weights([nn.Conv2d(3, 5, 1), nn.Conv2d(5, 3, 1)])
    [None, None]
    """
    weights = [conv.weight for conv in convs]
    kind = weights[0].device.type
    if (
        in_plain_autograd()
        and all(map(is_on_gpu, weights))
        and torch.is_autocast_enabled(kind)
    ):
        dtype = torch.get_autocast_dtype(kind)
        if any(w.dtype != dtype for w in weights):
            return _Cast.apply(dtype, *weights)
    return [None for _ in convs]


class _Cast(torch.autograd.Function):
    """Converts several weights in one launch, and back in backward."""

    @staticmethod
    def forward(
        ctx: Any, dtype: torch.dtype, *weights: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.dtypes = [w.dtype for w in weights]
        casts = [torch.empty_like(w, dtype=dtype) for w in weights]
        torch._foreach_copy_(casts, weights)
        needed = ctx.needs_input_grad[1:]
        frozen = [c for c, n in zip(casts, needed) if not n]
        ctx.mark_non_differentiable(*frozen)
        return tuple(casts)

    @staticmethod
    def backward(
        ctx: Any, *gradients: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        found = [g for g in gradients if g is not None]
        wide = [
            None if g is None else torch.empty_like(g, dtype=dtype)
            for g, dtype in zip(gradients, ctx.dtypes)
        ]
        torch._foreach_copy_([w for w in wide if w is not None], found)
        return None, *wide
