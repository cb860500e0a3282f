"""Attention of fake tensors, with the memory of a GPU's fused kernel.

``scaled_dot_product_attention`` stores all attention weights on a CPU if it has a
mask and dropout, as in SpeechBrain's rotary attention. On a GPU it stores none.

Authors
 * The sb_memeff authors 2026
"""

import contextlib
from collections.abc import Generator
from typing import Any

import torch
import torch.nn.functional as F
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor

__all__ = ["FUSED_ATTENTION", "fused_attention"]

_forward = torch.ops.aten._scaled_dot_product_efficient_attention.default
# These operators run on a GPU only.
FUSED_ATTENTION: frozenset[OpOverload] = frozenset(
    [
        _forward,
        torch.ops.aten._scaled_dot_product_efficient_attention_backward.default,
    ]
)


@contextlib.contextmanager
def fused_attention() -> Generator[None, None, None]:
    """Calls the operator of torch's memory-efficient kernel for fake tensors.

    The function itself is replaced within the context: it consists of other
    operators, so a dispatch mode does not see it, and a function mode is off in
    backward, where blocks are recomputed.

    Yields
    ------
    None

    Example
    -------
    >>> from sb_memeff.memory.fake import fake_tensors
    >>> with fake_tensors():
    ...     x = torch.empty(2, 4, 100, 16, requires_grad=True)
    ...     F.scaled_dot_product_attention(x, x, x).grad_fn.name()
    'ScaledDotProductEfficientAttentionBackward0'
    """
    original = F.scaled_dot_product_attention

    def attention(query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        fits = isinstance(query, FakeTensor) and query.dim() == 4
        if not fits or kwargs.get("enable_gqa"):
            return original(query, *args, **kwargs)
        return _fused(query, *args, **kwargs)

    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original


def _fused(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Prepares the arguments as torch does, and calls the kernel."""
    kind = query.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        query, key, value = (x.to(dtype) for x in (query, key, value))
    bias = attn_mask
    if bias is not None:
        if bias.dtype == torch.bool:
            nothing = bias.new_zeros((), dtype=query.dtype)
            bias = torch.where(bias, nothing, nothing - torch.inf)
        bias = _aligned(bias.to(query.dtype)).expand(
            *query.shape[:3], key.shape[2]
        )
    needs_sums = any(x.requires_grad for x in (query, key, value))
    return _forward(
        query,
        key,
        value,
        bias,
        needs_sums and torch.is_grad_enabled(),
        dropout_p,
        is_causal,
        scale=scale,
    )[0]


def _aligned(bias: torch.Tensor) -> torch.Tensor:
    """Pads rows to multiples of 8 values, as the kernel needs them."""
    columns = bias.shape[-1]
    if all(stride % 8 == 0 for stride in bias.stride()[:-1]):
        return bias
    return F.pad(bias, (0, -columns % 8))[..., :columns]
