"""Compiles the Triton kernels for GPUs that are not here.

Run without TRITON_INTERPRET. Prints a line of JSON for each: kernel, target,
registers and bytes of stack, which are what ptxas had no registers for.
"""

import json
import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sb_memeff.ops.triton import (
    adam_8bit,
    blocks_8bit,
    grid,
    joint,
    lattice,
    logit_rows,
    sgd_8bit,
)

CUOBJDUMP = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
TARGETS = (75, 80, 90)
ROWS = {"logits_ptr": None, "target_ptr": "*i64", "vocabulary": "i32"}
LATTICE = {
    **dict.fromkeys(("blank_ptr", "target_ptr"), "*fp32"),
    **dict.fromkeys(("sums_ptr", "log_likelihood_ptr"), "*fp64"),
    **dict.fromkeys(("frames_ptr", "targets_ptr"), "*i64"),
    **dict.fromkeys(
        (
            "rows",
            "columns",
            "blank_sample",
            "blank_frame",
            "target_sample",
            "target_frame",
        ),
        "i32",
    ),
}
OPTIMIZER = {"table_ptr": "*i64", "tensor_of_ptr": "*i32", "tensors": "i32"}


def kernels():
    """Name, function, types of arguments, constants, and warps."""
    for dtype in ("fp16", "bf16", "fp32"):
        rows = {**ROWS, "logits_ptr": f"*{dtype}"}
        yield (
            f"scores {dtype}",
            logit_rows._scores,
            {**rows, "scores_ptr": "*fp32", "rows": "i32"},
            {"BLANK": 0, "BLOCK": logit_rows.BLOCK},
            4,
        )
        for writes in (True, False):
            flags = ("HAS_CLAMP", "HAS_WEIGHT", "HAS_SCALE")
            yield (
                f"gradient {dtype}" + " (extreme)" * (not writes),
                logit_rows._gradient,
                {
                    **rows,
                    **dict.fromkeys(
                        (
                            "lse_ptr",
                            "blank_ptr",
                            "emission_ptr",
                            "weight_ptr",
                            "scale_ptr",
                            "deviation_ptr",
                            "largest_ptr",
                        ),
                        "*fp32",
                    ),
                    "gradient_ptr": f"*{dtype}",
                    "clamp": "fp32",
                    "deviations_per_unit": "fp32",
                },
                {
                    "BLANK": 0,
                    "BLOCK": logit_rows.BLOCK,
                    "WRITES": writes,
                    **dict.fromkeys(flags, True),
                },
                4,
            )
    for block in (64, 256):
        warps = min(8, block // 32)
        yield f"sums {block}", lattice._sums, LATTICE, {"BLOCK": block}, warps
        outputs = ("blank_posterior_ptr", "target_posterior_ptr")
        yield (
            f"posteriors {block}",
            lattice._posteriors,
            {**LATTICE, **dict.fromkeys(outputs, "*fp32"), "plane": "i64"},
            {"BLOCK": block},
            min(4, block // 32),
        )
    for dtype in ("fp16", "bf16", "fp32"):
        yield (
            f"round_to_grid {dtype}",
            grid._round,
            {"x_ptr": f"*{dtype}", "rounded_ptr": "*fp32", "size": "i32"},
            {"BITS": 12, "BLOCK": grid.BLOCK},
            4,
        )
    # The longest of the activations.
    constants = {"ACTIVATION": "gelu_tanh"}
    for dtype in ("fp16", "bf16", "fp32"):
        plane = ("rows", "columns", "cells", "features")
        types = {
            "cells_ptr": "*i64",
            "slope": "fp32",
            **dict.fromkeys(plane, "i32"),
        }
        strides = ("sample", "frame", "feature")
        yield (
            f"join {dtype}",
            joint._join,
            {
                **types,
                **dict.fromkeys(
                    ("enc_ptr", "pred_ptr", "joined_ptr"), f"*{dtype}"
                ),
                **{f"enc_{name}": "i32" for name in strides},
                "pred_sample": "i32",
                "pred_column": "i32",
                "pred_feature": "i32",
            },
            {**constants, "CELLS": joint.CELLS, "FEATURES": joint.FEATURES},
            4,
        )
        for by_frame in (True, False):
            yield (
                f"add_rows {dtype} by_frame={by_frame}",
                joint._add_rows,
                {
                    **types,
                    "positions_ptr": "*i32",
                    "start": "i32",
                    "total_ptr": "*fp32",
                    "factor_ptr": "*fp32",
                    **dict.fromkeys(
                        ("gradient_ptr", "own_ptr", "other_ptr"), f"*{dtype}"
                    ),
                    **{
                        f"{side}_{name}": "i32"
                        for side in ("own", "other")
                        for name in ("sample", "row", "feature")
                    },
                },
                {
                    **constants,
                    "BY_FRAME": by_frame,
                    "HAS_FACTOR": True,
                    "ADDED": joint.ADDED,
                    "WIDTH": joint.WIDTH,
                },
                4,
            )
    for aligned in (True, False):
        constants = {"ALIGNED": aligned, "BLOCKS": blocks_8bit.BLOCKS}
        tables = dict.fromkeys(("values_ptr", "middles_ptr"), "*fp32")
        numbers = ("lr", "momentum", "undamped", "weight_decay")
        yield (
            f"sgd_8bit aligned={aligned}",
            sgd_8bit._sgd,
            {**OPTIMIZER, **tables, **dict.fromkeys(numbers, "fp32")},
            {
                **constants,
                "DECAYS": True,
                "MAXIMIZE": True,
                "NESTEROV": True,
            },
            4,
        )
        for name in ("corrections", "signed_values", "signed_middles"):
            tables[f"{name}_ptr"] = "*fp32"
        numbers = ("lr", "rate1", "beta2", "rate2", "eps", "weight_decay")
        flags = ("DECAYS", "DECOUPLED", "AMSGRAD", "MAXIMIZE")
        yield (
            f"adam_8bit aligned={aligned}",
            adam_8bit._adam,
            {**OPTIMIZER, **tables, **dict.fromkeys(numbers, "fp32")},
            {**constants, **dict.fromkeys(flags, True)},
            4,
        )


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
    for name, *kernel in kernels():
        for target in TARGETS:
            registers, stack = resources(*kernel, target)
            row = {"kernel": name, "sm": target, "registers": registers}
            print(json.dumps({**row, "stack": stack}), flush=True)
