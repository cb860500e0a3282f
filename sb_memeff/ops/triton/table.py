"""Tables of tensors, for kernels that process many tensors in one launch.

A table in the GPU's memory contains the sizes and addresses of all tensors. Each
program reads the addresses of its tensor and processes a few blocks of 256 values
of it.

Authors
 * The sb_memeff authors 2026
"""

import functools
import itertools
import operator
from collections.abc import Sequence
from typing import cast

import torch
import triton
import triton.language as tl

from sb_memeff.ops.triton.launch import address, launch

__all__ = ["Table", "inside", "locate", "pointer_of", "upload"]

# Blocks of a program; more would need too many registers.
BLOCKS = 2
# If addresses and sizes are multiples of this, loads and stores are vectorized.
ALIGNMENT = 16


@triton.jit
def locate(table_ptr, tensor_of_ptr, tensors, BLOCKS: tl.constexpr):
    """Tensor, block and value indices of a program, and a mask of blocks."""
    program = tl.program_id(0)
    tensor = tl.load(tensor_of_ptr + program)
    size = tl.load(table_ptr + tensor)
    first = (program - tl.load(table_ptr + tensors + tensor)) * BLOCKS
    block = first + tl.arange(0, BLOCKS)
    value = block[:, None] * 256 + tl.arange(0, 256)[None, :]
    return tensor, block, value, block * 256 < size, size


@triton.jit
def inside(value, size, ALIGNED: tl.constexpr):
    """Mask of the values inside a tensor."""
    if ALIGNED:
        size = tl.multiple_of(size, 16)
    return value < size


@triton.jit
def pointer_of(address, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointer to a tensor, from its address."""
    pointer = address.to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


class Table:
    """Sizes and addresses of tensors of one device, in its memory.

    It is valid as long as the tensors keep their memory.

    Arguments
    ---------
    rows : list of list
        Tensors of each row of addresses. The first row determines the sizes.
        None has the address 0.
    """

    def __init__(self, rows: list[list[torch.Tensor | None]]):
        first = cast("list[torch.Tensor]", rows[0])
        sizes = [x.numel() for x in first]
        programs = [triton.cdiv(size, BLOCKS * 256) for size in sizes]
        *first_programs, self.programs = itertools.accumulate(
            programs, initial=0
        )
        addresses = [[0 if x is None else address(x) for x in r] for r in rows]
        self.tensors = len(sizes)
        self.device = first[0].device
        self.aligned = _aligned([*sizes, *itertools.chain(*addresses)])
        self._numbers = upload([sizes, first_programs, *addresses], self.device)
        tensor_of = torch.arange(self.tensors, dtype=torch.int32)
        self._tensor_of = tensor_of.repeat_interleave(
            torch.tensor(programs), output_size=self.programs
        ).to(self.device)

    def launch(
        self,
        kernel: triton.JITFunction,
        *arguments: torch.Tensor | float,
        others: Sequence[int] = (),
        **constants: bool,
    ) -> None:
        """Runs a kernel on all blocks.

        Arguments
        ---------
        kernel : triton.JITFunction
            Takes the table, the tensor index of each program, the number of
            tensors, and the arguments.
        *arguments : torch.Tensor or float
            Further arguments of the kernel.
        others : sequence of int
            Addresses among the arguments.
        **constants : bool
            Its constexpr arguments.
        """
        launch(
            kernel,
            (self.programs,),
            self._numbers,
            self._tensor_of,
            self.tensors,
            *arguments,
            ALIGNED=self.aligned and _aligned(others),
            BLOCKS=BLOCKS,
            **constants,
        )


def upload(
    rows: Sequence[Sequence[int] | torch.Tensor], device: torch.device
) -> torch.Tensor:
    """Copies rows of numbers to a device; the host does not wait.

    Arguments
    ---------
    rows : sequence
        Numbers, or int64 tensors on the CPU, all of the same length.
    device : torch.device
        The device.

    Returns
    -------
    torch.Tensor
        [rows, numbers], int64.
    """
    numbers = torch.stack(
        [torch.as_tensor(row, dtype=torch.int64) for row in rows]
    )
    if device.type == "cuda":
        # Not one buffer for all steps: the previous copy may still be waiting.
        numbers = numbers.pin_memory()
    return numbers.to(device, non_blocking=True)


def _aligned(numbers: Sequence[int]) -> bool:
    return not functools.reduce(operator.or_, numbers, 0) % ALIGNMENT
