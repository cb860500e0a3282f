"""One-launch step of Adam and AdamW with moments in 8 bits.

The formulas are torch.optim.Adam's.

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

__all__ = ["adam_8bit"]


@triton.jit
def _adam(
    table_ptr,
    tensor_of_ptr,
    tensors,
    corrections_ptr,
    signed_values_ptr,
    signed_middles_ptr,
    values_ptr,
    middles_ptr,
    lr,
    rate1,
    beta2,
    rate2,
    eps,
    weight_decay,
    DECAYS: tl.constexpr,
    DECOUPLED: tl.constexpr,
    AMSGRAD: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    tensor, block, value, has_block, size = locate(
        table_ptr, tensor_of_ptr, tensors, BLOCKS
    )
    has_value = inside(value, size, ALIGNED)
    weights = pointer_of(table_ptr, tensors, tensor, 0, tl.float32, ALIGNED)
    gradients = pointer_of(table_ptr, tensors, tensor, 1, tl.float32, ALIGNED)
    weight = tl.load(weights + value, mask=has_value, other=0.0)
    gradient = tl.load(gradients + value, mask=has_value, other=0.0)
    if MAXIMIZE:
        gradient = -gradient
    if DECAYS:  # 0 times an infinite weight would be NaN
        if DECOUPLED:
            weight *= 1 - lr * weight_decay
        else:
            gradient += weight_decay * weight

    codes, maxima = state_of(table_ptr, tensors, tensor, 2, ALIGNED)
    mean = load_quantized(
        codes, maxima, signed_values_ptr, block, value, has_block, has_value
    )
    mean += rate1 * (gradient - mean)
    store_quantized(
        mean,
        codes,
        maxima,
        signed_middles_ptr,
        block,
        value,
        has_block,
        has_value,
        True,
    )
    codes, maxima = state_of(table_ptr, tensors, tensor, 4, ALIGNED)
    square = load_quantized(
        codes, maxima, values_ptr, block, value, has_block, has_value
    )
    square = beta2 * square + rate2 * gradient * gradient
    store_quantized(
        square,
        codes,
        maxima,
        middles_ptr,
        block,
        value,
        has_block,
        has_value,
        False,
    )
    if AMSGRAD:
        codes, maxima = state_of(table_ptr, tensors, tensor, 6, ALIGNED)
        highest = load_quantized(
            codes, maxima, values_ptr, block, value, has_block, has_value
        )
        # tl.maximum would drop NaN.
        square = tl.where(highest > square, highest, square)
        store_quantized(
            square,
            codes,
            maxima,
            middles_ptr,
            block,
            value,
            has_block,
            has_value,
            False,
        )
    step_size = tl.load(corrections_ptr + tensor)
    root_correction = tl.load(corrections_ptr + tensors + tensor)
    root = tl.sqrt(square) / root_correction + eps
    tl.store(weights + value, weight - step_size * mean / root, mask=has_value)


def adam_8bit(
    params: list[torch.Tensor],
    grads: list[torch.Tensor],
    moments: list[list[torch.Tensor]],
    steps: torch.Tensor,
    signed: tuple[torch.Tensor, torch.Tensor],
    unsigned: tuple[torch.Tensor, torch.Tensor],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decoupled_weight_decay: bool,
    amsgrad: bool,
    maximize: bool,
) -> None:
    """Updates parameters and the codes and maxima of their moments in place.

    Arguments
    ---------
    params, grads : list of torch.Tensor
        float32, contiguous, on one device.
    moments : list of list of torch.Tensor
        Codes and maxima of the first moments, the second moments and, with
        amsgrad, the largest second moments, as in
        ``ops.blocks_8bit.Quantized8bit``.
    steps : torch.Tensor
        The number of each parameter's step, starting at 1, on the CPU or on
        the parameters' device. Neither makes the host wait.
    signed, unsigned : tuple of torch.Tensor
        Values and middles of an ``ops.blocks_8bit.Codebook``.
    lr, betas, eps, weight_decay : float
        See torch.optim.Adam.
    decoupled_weight_decay, amsgrad, maximize : bool
        See torch.optim.Adam.
    """
    beta1, beta2 = betas
    steps = steps.double()
    corrections = torch.stack(
        [lr / (1 - beta1**steps), (1 - beta2**steps).sqrt()]
    ).float()
    if params[0].is_cuda and not corrections.is_cuda:
        corrections = corrections.pin_memory()
    launch_on_blocks(
        _adam,
        [params, grads, *moments],
        corrections.to(params[0].device, non_blocking=True),
        *signed,
        *unsigned,
        float(lr),
        1.0 - beta1,
        float(beta2),
        1.0 - beta2,
        float(eps),
        float(weight_decay),
        DECAYS=weight_decay != 0,
        DECOUPLED=decoupled_weight_decay,
        AMSGRAD=amsgrad,
        MAXIMIZE=maximize,
    )
