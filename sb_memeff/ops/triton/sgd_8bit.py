"""One-launch step of SGD with momentum in 8 bits.

The formulas are torch.optim.SGD's.

Authors
 * The sb_memeff authors 2026
"""

import triton
import triton.language as tl

from sb_memeff.ops.blocks_8bit import Codebook
from sb_memeff.ops.triton.blocks_8bit import load_state, store_state
from sb_memeff.ops.triton.table import (
    Table,
    inside,
    locate,
    pointer_of,
    upload,
)

__all__ = ["sgd_8bit"]


@triton.jit
def _sgd(
    table_ptr,
    tensor_of_ptr,
    tensors,
    gradients_ptr,
    values_ptr,
    middles_ptr,
    lr,
    residual_rate,
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
    row_ptr = table_ptr + 2 * tensors + tensor
    weights = pointer_of(tl.load(row_ptr), tl.float32, ALIGNED)
    gradients = pointer_of(tl.load(gradients_ptr + tensor), tl.float32, ALIGNED)
    weight = tl.load(weights + value, mask=has_value, other=0.0)
    gradient = tl.load(gradients + value, mask=has_value, other=0.0)
    buffer = load_state(
        row_ptr + tensors,
        tensors,
        values_ptr,
        block,
        value,
        has_block,
        has_value,
        ALIGNED,
    )
    # Rounded where torch's kernels round.
    if MAXIMIZE:
        gradient = -gradient
    if DECAYS:  # 0 times an infinite weight would be NaN
        gradient = tl.fma(weight, weight_decay, gradient)
    buffer = tl.fma(gradient, undamped, buffer * momentum)
    update = tl.fma(buffer, momentum, gradient) if NESTEROV else buffer
    weight = tl.fma(update, -lr, weight)
    residual = store_state(
        buffer,
        row_ptr + tensors,
        tensors,
        values_ptr,
        middles_ptr,
        block,
        value,
        has_block,
        has_value,
        0.0,
        True,
        False,
        ALIGNED,
    )
    weight = tl.fma(residual, -residual_rate, weight)
    tl.store(weights + value, weight, mask=has_value)


def sgd_8bit(
    table: Table,
    gradients: list[int],
    codebook: Codebook,
    *,
    lr: float,
    residual_rate: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
) -> None:
    """Updates parameters and their momenta in place.

    Arguments
    ---------
    table : Table
        Rows: parameters; momenta or their codes; scales of the blocks of codes,
        as in ``ops.blocks_8bit.Quantized8bit``. Parameters and momenta are
        float32 and contiguous.
    gradients : list of int
        Addresses of the gradients, which are like the parameters.
    codebook : Codebook
        Signed.
    lr, momentum, dampening, weight_decay : float
        See torch.optim.SGD.
    residual_rate : float
        Factor of what rounding takes from the momenta, which is subtracted from
        the parameters.
    nesterov, maximize : bool
        See torch.optim.SGD.
    """
    (addresses,) = upload([gradients], table.device)
    table.launch(
        _sgd,
        addresses,
        codebook.values,
        codebook.middles,
        float(lr),
        float(residual_rate),
        float(momentum),
        1.0 - dampening,
        float(weight_decay),
        others=gradients,
        DECAYS=weight_decay != 0,
        MAXIMIZE=maximize,
        NESTEROV=nesterov,
    )
