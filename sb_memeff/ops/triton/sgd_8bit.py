"""One-launch step of SGD with momentum in 8 bits.

The formulas are torch.optim.SGD's.

Authors
 * The sb_memeff authors 2026
"""

import torch
import triton
import triton.language as tl

from sb_memeff.ops.triton.blocks_8bit import (
    inside,
    launch_on_blocks,
    load_quantized,
    locate,
    pointer_of,
    state_of,
    store_quantized,
)

__all__ = ["sgd_8bit"]


@triton.jit
def _sgd(
    table_ptr,
    tensor_of_ptr,
    tensors,
    values_ptr,
    middles_ptr,
    lr,
    momentum,
    undamped,
    weight_decay,
    DECAYS: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    NESTEROV: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    tensor, block, value, has_block, size = locate(
        table_ptr, tensor_of_ptr, tensors, BLOCKS
    )
    has_value = inside(value, size, ALIGNED)
    weights = pointer_of(table_ptr, tensors, tensor, 0, tl.float32, ALIGNED)
    gradients = pointer_of(table_ptr, tensors, tensor, 1, tl.float32, ALIGNED)
    codes, maxima = state_of(table_ptr, tensors, tensor, 2, ALIGNED)
    weight = tl.load(weights + value, mask=has_value, other=0.0)
    gradient = tl.load(gradients + value, mask=has_value, other=0.0)
    buffer = load_quantized(
        codes, maxima, values_ptr, block, value, has_block, has_value
    )
    if MAXIMIZE:
        gradient = -gradient
    if DECAYS:  # 0 times an infinite weight would be NaN
        gradient += weight_decay * weight
    buffer = momentum * buffer + undamped * gradient
    update = gradient + momentum * buffer if NESTEROV else buffer
    tl.store(weights + value, weight - lr * update, mask=has_value)
    store_quantized(
        buffer,
        codes,
        maxima,
        middles_ptr,
        block,
        value,
        has_block,
        has_value,
        True,
    )


def sgd_8bit(
    params: list[torch.Tensor],
    grads: list[torch.Tensor],
    codes: list[torch.Tensor],
    maxima: list[torch.Tensor],
    values: torch.Tensor,
    middles: torch.Tensor,
    *,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
) -> None:
    """Updates parameters and the codes and maxima of their momenta in place.

    Arguments
    ---------
    params, grads : list of torch.Tensor
        float32, contiguous, on one device.
    codes, maxima : list of torch.Tensor
        The momenta, as in ``ops.blocks_8bit.Quantized8bit``.
    values, middles : torch.Tensor
        Those of a signed ``ops.blocks_8bit.Codebook``.
    lr, momentum, dampening, weight_decay : float
        See torch.optim.SGD.
    nesterov, maximize : bool
        See torch.optim.SGD.
    """
    launch_on_blocks(
        _sgd,
        [params, grads, codes, maxima],
        values,
        middles,
        float(lr),
        float(momentum),
        1.0 - dampening,
        float(weight_decay),
        DECAYS=weight_decay != 0,
        MAXIMIZE=maximize,
        NESTEROV=nesterov,
    )
