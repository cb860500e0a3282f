"""Adam and AdamW with moments in 8 bits, in one pass over each block.

The formulas are torch.optim.Adam's, rounded where torch's kernels for CPUs round.

Authors
 * The sb_memeff authors 2026
"""

import math

import numpy as np
import torch

from sb_memeff.ops.blocks_8bit import BLOCK, Codebook, dither_phase
from sb_memeff.ops.numba.blocks_8bit import (
    dithering_tables,
    load_floats,
    load_state,
    rounding_tables,
    store_dithered,
    store_floats,
    store_nearest,
)
from sb_memeff.ops.numba.compiled import compiled, multiply_add
from sb_memeff.ops.numba.table import Table, blocks_of

__all__ = ["adam_8bit"]

# Rows of the table.
PARAMETER, MEAN, SQUARE, HIGHEST = 2, 3, 5, 7


@compiled
def _adam(
    table,
    gradients,
    first,
    last,
    signed,
    unsigned,
    dithered,
    step_of,
    corrections,
    dithers,
    rate1,
    beta2,
    rate2,
    eps,
    weight_decay,
    kept,
    residual_rate,
    decoupled,
    amsgrad,
    maximize,
):
    buffers = np.empty((7, BLOCK), np.float32)
    one = np.float32(1)
    for tensor in range(table.shape[1]):
        step_size, root_correction, correction = corrections[step_of[tensor]]
        dither = dithers[step_of[tensor]]
        start, stop, size = blocks_of(table, tensor, first, last)
        for block in range(start, stop):
            n = min(BLOCK, size - BLOCK * block)
            weight, gradient = buffers[0][:n], buffers[1][:n]
            mean, square = buffers[2][:n], buffers[3][:n]
            highest, divisor = buffers[4][:n], buffers[5][:n]
            ratio = buffers[6][:n]
            load_floats(weight, table[PARAMETER, tensor], block)
            load_floats(gradient, gradients[tensor], block)
            load_state(mean, table, MEAN, tensor, block, signed[0])
            load_state(square, table, SQUARE, tensor, block, unsigned[0])
            if amsgrad:
                load_state(highest, table, HIGHEST, tensor, block, unsigned[0])
            for i in range(n):
                grad = -gradient[i] if maximize else gradient[i]
                if weight_decay != 0:  # 0 times an infinite weight is NaN
                    if decoupled:
                        weight[i] *= kept
                    else:
                        grad = multiply_add(weight[i], weight_decay, grad)
                # torch.lerp
                difference = grad - mean[i]
                if rate1 < 0.5:
                    mean[i] = multiply_add(rate1, difference, mean[i])
                else:
                    mean[i] = multiply_add(rate1 - one, difference, grad)
                new = multiply_add(rate2 * grad, grad, square[i] * beta2)
                square[i] = new
                # NaN stays NaN.
                if not amsgrad or highest[i] <= new or new != new:
                    highest[i] = new
                root = math.sqrt(highest[i]) / root_correction + eps
                weight[i] += -step_size * mean[i] / root
                divisor[i] = math.sqrt(highest[i] / correction) + eps
                if new == np.inf:
                    # The moments restart, or the block would stop.
                    mean[i] = square[i] = highest[i] = 0
            if amsgrad:
                store_nearest(
                    highest, ratio, table, HIGHEST, tensor, block, unsigned, 1
                )
            store_dithered(
                square, ratio, table, SQUARE, tensor, block, dithered, dither
            )
            residual = mean
            store_nearest(
                residual, ratio, table, MEAN, tensor, block, signed, 0
            )
            for i in range(n):
                weight[i] -= residual[i] * residual_rate / divisor[i]
            store_floats(weight, table[PARAMETER, tensor], block)


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

    The arguments are those of ``ops.triton.adam_8bit.adam_8bit``. All moments are
    in 8 bits.
    """
    beta1, beta2 = betas
    different, step_of = steps.cpu().unique(return_inverse=True)
    corrections, dithers = [], []
    for step in different:
        number = step.item()
        root_correction = (1 - beta2**number) ** 0.5
        correction = 1 - beta2**step
        corrections.append(
            (lr / (1 - beta1**number), root_correction, correction.item())
        )
        dithers.append(unsigned.dither(dither_phase(step)))
    numbers = (
        1 - beta1,
        beta2,
        1 - beta2,
        eps,
        weight_decay,
        1 - lr * weight_decay,
        residual_rate,
    )
    table.launch(
        _adam,
        gradients,
        rounding_tables(signed),
        rounding_tables(unsigned),
        dithering_tables(unsigned),
        step_of.numpy(),
        np.array(corrections, np.float32),
        torch.stack(dithers).numpy(),
        *map(np.float32, numbers),
        bool(decoupled_weight_decay),
        bool(amsgrad),
        bool(maximize),
    )
