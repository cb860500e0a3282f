"""Compiles the Triton kernels for GPUs that are not here.

Run without TRITON_INTERPRET and without a GPU. Prints a line of JSON for each
launch of each kernel in KERNELS: target, registers and bytes of stack, which
are what ptxas had no registers for.

Authors
 * The sb_memeff authors 2026
"""

import json
import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from tests.unittests.ops.kernels import KERNELS

CUOBJDUMP = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
TARGETS = (75, 80, 90)
POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.bool: "*i1",
}
# May be larger than those of the tests.
LONG = ("plane",)


def type_of(name, value):
    """Of an argument, as Triton calls it."""
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i64" if name in LONG else "i32"


def launches():
    """Name, function, types of arguments, constants and warps of each."""
    found = []

    def record(function, *args, grid, warmup, num_warps=4, **constants):
        names = [name for name in function.arg_names if name not in constants]
        given = dict(zip(names, args, strict=True))
        # Triton compiles other code for an argument that is absent.
        constants |= {k: None for k, value in given.items() if value is None}
        types = {
            name: type_of(name, value)
            for name, value in given.items()
            if name not in constants
        }
        if (launch := (function, types, constants, num_warps)) not in found:
            found.append(launch)

    # Nothing is launched, so nothing that is computed means anything.
    JITFunction.run = record
    for name, kernel in KERNELS.items():
        found.clear()
        for shape in kernel.shapes:
            for dtype in kernel.bounds:
                inputs = kernel.draw(shape, dtype)
                kernel.fused(*inputs, **kernel.settings[-1])
        for launch in found:
            yield name, *launch


def resources(function, types, constants, warps, target):
    """Registers and bytes of stack of a compiled kernel."""
    signature = {**types, **dict.fromkeys(constants, "constexpr")}
    signature = {name: signature[name] for name in function.arg_names}
    compiled = triton.compile(
        ASTSource(function, signature, constexprs=constants),
        target=GPUTarget("cuda", target, 32),
        options={"num_warps": warps},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    return map(int, re.search(r"REG:(\d+) STACK:(\d+)", text).groups())


if __name__ == "__main__":
    for name, function, *launch in launches():
        for target in TARGETS:
            registers, stack = resources(function, *launch, target)
            row = {
                "operation": name,
                "kernel": function.__name__,
                "launch": str(launch),
                "sm": target,
                "registers": registers,
                "stack": stack,
            }
            print(json.dumps(row), flush=True)
