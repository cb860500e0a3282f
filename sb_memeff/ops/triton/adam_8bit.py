"""One-launch step of Adam and AdamW with moments in 8 bits.

The formulas are torch.optim.Adam's.

Authors
 * The sb_memeff authors 2026
"""

import torch
import triton
import triton.language as tl

from sb_memeff.ops.blocks_8bit import Codebook, dither_phase
from sb_memeff.ops.triton.blocks_8bit import load_state, store_state
from sb_memeff.ops.triton.table import (
    Table,
    inside,
    locate,
    pointer_of,
    upload,
)

__all__ = ["adam_8bit"]


@triton.jit
def _adam(
    table_ptr,
    tensor_of_ptr,
    tensors,
    gradients_ptr,
    corrections_ptr,
    signed_values_ptr,
    signed_middles_ptr,
    values_ptr,
    middles_ptr,
    columns_ptr,
    rate1,
    beta2,
    rate2,
    eps,
    weight_decay,
    kept,
    residual_rate,
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
    row_ptr = table_ptr + 2 * tensors + tensor
    weights = pointer_of(tl.load(row_ptr), tl.float32, ALIGNED)
    gradients = pointer_of(tl.load(gradients_ptr + tensor), tl.float32, ALIGNED)
    weight = tl.load(weights + value, mask=has_value, other=0.0)
    gradient = tl.load(gradients + value, mask=has_value, other=0.0)
    # Rounded where torch's kernels round.
    if MAXIMIZE:
        gradient = -gradient
    if DECAYS:  # 0 times an infinite weight would be NaN
        if DECOUPLED:
            weight *= kept
        else:
            gradient = tl.fma(weight, weight_decay, gradient)

    mean_ptr = row_ptr + tensors
    mean = load_state(
        mean_ptr,
        tensors,
        signed_values_ptr,
        block,
        value,
        has_block,
        has_value,
        ALIGNED,
    )
    # torch.lerp
    difference = gradient - mean
    if rate1 < 0.5:
        mean = tl.fma(difference, rate1, mean)
    else:
        mean = tl.fma(difference, rate1 - 1, gradient)
    state_ptr = mean_ptr + 2 * tensors
    square = load_state(
        state_ptr,
        tensors,
        values_ptr,
        block,
        value,
        has_block,
        has_value,
        ALIGNED,
    )
    square = tl.fma(gradient * gradient, rate2, square * beta2)
    phase = tl.load(corrections_ptr + 2 * (tensors + tensor))
    dither = (tl.load(columns_ptr + tl.arange(0, 256)) + phase)[None, :]
    dither = tl.where(dither >= 1, dither - 1, dither)
    store_state(
        square,
        state_ptr,
        tensors,
        values_ptr,
        middles_ptr,
        block,
        value,
        has_block,
        has_value,
        dither,
        False,
        True,
        ALIGNED,
    )
    if AMSGRAD:
        state_ptr += 2 * tensors
        highest = load_state(
            state_ptr,
            tensors,
            values_ptr,
            block,
            value,
            has_block,
            has_value,
            ALIGNED,
        )
        # tl.maximum would drop NaN.
        square = tl.where(highest > square, highest, square)
        store_state(
            square,
            state_ptr,
            tensors,
            values_ptr,
            middles_ptr,
            block,
            value,
            has_block,
            has_value,
            0.0,
            False,
            False,
            ALIGNED,
        )
    step_size = tl.load(corrections_ptr + 2 * tensor)
    root_correction = tl.load(corrections_ptr + 2 * tensor + 1)
    root_correction = tl.broadcast_to(root_correction, square.shape)
    root = tl.div_rn(tl.sqrt_rn(square), root_correction) + eps
    weight = tl.fma(tl.div_rn(mean, root), -step_size, weight)
    if tl.load(mean_ptr + tensors) != 0:
        # Its second moment restarts, see store_state.
        mean = tl.where(root == float("inf"), 0.0, mean)
    # Last, as it needs registers.
    residual = store_state(
        mean,
        mean_ptr,
        tensors,
        signed_values_ptr,
        signed_middles_ptr,
        block,
        value,
        has_block,
        has_value,
        0.0,
        True,
        False,
        ALIGNED,
    )
    weight = tl.fma(tl.div_rn(residual, root), -residual_rate, weight)
    tl.store(weights + value, weight, mask=has_value)


def adam_8bit(
    table: Table,
    gradients: list[int],
    steps: torch.Tensor,
    signed: Codebook,
    unsigned: Codebook,
    *,
    lr: float,
    residual_rate: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decoupled_weight_decay: bool,
    amsgrad: bool,
    maximize: bool,
) -> None:
    """Updates parameters and their moments in place.

    Arguments
    ---------
    table : Table
        Rows: parameters; first moments or their codes; scales of the blocks of
        codes, as in ``ops.blocks_8bit.Quantized8bit``; two such rows for the
        second moments and, with amsgrad, for the largest second moments.
        Parameters and moments are float32 and contiguous.
    gradients : list of int
        Addresses of the gradients, which are like the parameters.
    steps : torch.Tensor
        The number of each parameter's step, starting at 1, on the CPU or on
        the parameters' device. Neither makes the host wait.
    signed, unsigned : Codebook
        Those of first and of second moments.
    lr, betas, eps, weight_decay : float
        See torch.optim.Adam.
    residual_rate : float
        Factor of what rounding takes from the first moments, which is applied
        to the parameters like a first moment.
    decoupled_weight_decay, amsgrad, maximize : bool
        See torch.optim.Adam.
    """
    beta1, beta2 = betas
    phases = dither_phase(steps)
    steps = steps.double()
    pairs = [
        (lr / (1 - beta1**steps), (1 - beta2**steps).sqrt()),
        (phases, phases),
    ]
    # [2, tensors, 2]
    corrections = torch.stack([torch.stack(x, 1).float() for x in pairs])
    if corrections.device == table.device:
        (addresses,) = upload([gradients], table.device)
    else:
        # All in one copy.
        uploaded = upload(
            [gradients, *corrections.view(torch.int64)[..., 0]], table.device
        )
        addresses, corrections = uploaded[0], uploaded[1:].view(torch.float32)
    table.launch(
        _adam,
        addresses,
        corrections,
        signed.values,
        signed.middles,
        unsigned.values,
        unsigned.middles,
        unsigned.columns,
        1.0 - beta1,
        float(beta2),
        1.0 - beta2,
        float(eps),
        float(weight_decay),
        1.0 - lr * weight_decay,
        float(residual_rate),
        others=gradients,
        DECAYS=weight_decay != 0,
        DECOUPLED=decoupled_weight_decay,
        AMSGRAD=amsgrad,
        MAXIMIZE=maximize,
    )
