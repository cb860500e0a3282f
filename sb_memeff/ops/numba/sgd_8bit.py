"""SGD with momentum in 8 bits, in one pass over each block.

The formulas are torch.optim.SGD's, rounded where torch's kernels for CPUs round.

Authors
 * The sb_memeff authors 2026
"""

import numpy as np

from sb_memeff.ops.blocks_8bit import BLOCK, Codebook
from sb_memeff.ops.numba.blocks_8bit import (
    load_floats,
    load_state,
    rounding_tables,
    store_floats,
    store_nearest,
)
from sb_memeff.ops.numba.compiled import compiled, multiply_add
from sb_memeff.ops.numba.table import Table, blocks_of

__all__ = ["sgd_8bit"]

# Rows of the table.
PARAMETER, MOMENTUM = 2, 3


@compiled
def _sgd(
    table,
    gradients,
    first,
    last,
    codebook,
    lr,
    residual_rate,
    momentum,
    undamped,
    weight_decay,
    nesterov,
    maximize,
):
    buffers = np.empty((4, BLOCK), np.float32)
    for tensor in range(table.shape[1]):
        start, stop, size = blocks_of(table, tensor, first, last)
        for block in range(start, stop):
            n = min(BLOCK, size - BLOCK * block)
            weight, gradient = buffers[0][:n], buffers[1][:n]
            buffer, ratio = buffers[2][:n], buffers[3][:n]
            load_floats(weight, table[PARAMETER, tensor], block)
            load_floats(gradient, gradients[tensor], block)
            load_state(buffer, table, MOMENTUM, tensor, block, codebook[0])
            for i in range(n):
                grad = -gradient[i] if maximize else gradient[i]
                if weight_decay != 0:  # 0 times an infinite weight is NaN
                    grad = multiply_add(weight[i], weight_decay, grad)
                buffer[i] = multiply_add(grad, undamped, buffer[i] * momentum)
                update = buffer[i]
                if nesterov:
                    update = multiply_add(update, momentum, grad)
                weight[i] = multiply_add(update, -lr, weight[i])
            residual = buffer
            store_nearest(
                residual, ratio, table, MOMENTUM, tensor, block, codebook, 0
            )
            for i in range(n):
                weight[i] -= residual[i] * residual_rate
            store_floats(weight, table[PARAMETER, tensor], block)


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

    The arguments are those of ``ops.triton.sgd_8bit.sgd_8bit``. All momenta are
    in 8 bits.
    """
    numbers = lr, residual_rate, momentum, 1 - dampening, weight_decay
    table.launch(
        _sgd,
        gradients,
        rounding_tables(codebook),
        *map(np.float32, numbers),
        bool(nesterov),
        bool(maximize),
    )
