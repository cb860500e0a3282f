"""How functions are compiled, and what numba lacks.

Authors
 * The sb_memeff authors 2026
"""

from collections.abc import Callable
from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

__all__ = ["array_at", "as_float", "compiled", "multiply_add"]


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles a function in its first call.

    Its arithmetic is IEEE's, as in torch, and it runs without Python's lock.

    Arguments
    ---------
    function : callable
        The function.

    Returns
    -------
    callable
        With the same arguments.
    """
    return numba.njit(nogil=True, error_model="numpy")(function)


@intrinsic
def multiply_add(typing_context, a, b, c):
    """a * b + c, rounded once if the CPU can, as in torch's kernels."""
    x = types.float32

    def generate(context, builder, signature, arguments):
        """Calls LLVM's operation."""
        number = ir.FloatType()
        function = builder.module.declare_intrinsic(
            "llvm.fmuladd", [number], ir.FunctionType(number, 3 * [number])
        )
        return builder.call(function, arguments)

    return x(x, x, x), generate


@intrinsic
def as_float(typing_context, bits):
    """The float32 of these 32 bits."""

    def generate(context, builder, signature, arguments):
        """Reads the bits as a float."""
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), generate


@intrinsic
def _pointer(typing_context, address):
    def generate(context, builder, signature, arguments):
        """Converts the address to a pointer."""
        pointer = context.get_value_type(types.voidptr)
        return builder.inttoptr(arguments[0], pointer)

    return types.voidptr(types.int64), generate


@compiled
def array_at(address, size, dtype):
    """The contiguous array at an address."""
    return numba.carray(_pointer(address), (size,), dtype)
