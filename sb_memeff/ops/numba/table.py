"""Tables of tensors, for functions that process many tensors in one call.

A table contains the sizes and addresses of all tensors. Their blocks of 256 values
are divided among threads.

Authors
 * The sb_memeff authors 2026
"""

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from sb_memeff.ops.blocks_8bit import BLOCK
from sb_memeff.ops.numba.compiled import compiled

__all__ = ["Table", "blocks_of"]

# It takes longer to start a thread than to process fewer blocks.
MIN_BLOCKS_PER_THREAD = 256


@compiled
def blocks_of(table, tensor, first, last):
    """The blocks of a tensor that are in a range of all blocks; and its size."""
    size, before = table[0, tensor], table[1, tensor]
    count = (size + BLOCK - 1) // BLOCK
    return max(first - before, 0), min(last - before, count), size


class Table:
    """Sizes and addresses of tensors on the CPU.

    It is valid as long as the tensors keep their memory.

    Arguments
    ---------
    rows : list of list
        Tensors of each row of addresses. The first row determines the sizes.
    """

    def __init__(self, rows: list[list[torch.Tensor]]):
        sizes = [x.numel() for x in rows[0]]
        blocks = [-(-size // BLOCK) for size in sizes]
        *first_blocks, self.blocks = itertools.accumulate(blocks, initial=0)
        addresses = [[x.data_ptr() for x in row] for row in rows]
        self.device = rows[0][0].device
        self._numbers = np.array(
            [sizes, first_blocks, *addresses], dtype=np.int64
        )

    def launch(
        self,
        function: Callable[..., None],
        gradients: list[int],
        *arguments: Any,
    ) -> None:
        """Calls a function for all blocks, in as many threads as torch uses.

        The threads end with the call. So a fork of the process finds none, and
        they treat denormal numbers as the caller's thread does.

        Arguments
        ---------
        function : callable
            Takes the table, the addresses of the gradients, the first block,
            the one after the last block, and the arguments.
        gradients : list of int
            One for each tensor.
        *arguments : tuple
            Further arguments of the function.
        """
        addresses = np.array(gradients, dtype=np.int64)
        threads = min(
            torch.get_num_threads(),
            max(1, self.blocks // MIN_BLOCKS_PER_THREAD),
        )
        bounds = [self.blocks * n // threads for n in range(threads + 1)]

        def run(first: int, last: int) -> None:
            function(self._numbers, addresses, first, last, *arguments)

        if threads == 1:
            return run(*bounds)
        with ThreadPoolExecutor(threads) as pool:
            try:
                parts = [
                    pool.submit(run, *part) for part in zip(bounds, bounds[1:])
                ]
            except RuntimeError:
                # At the end of the program no thread starts any more.
                run(bounds[0], bounds[-1])
            else:
                for part in parts:
                    part.result()
