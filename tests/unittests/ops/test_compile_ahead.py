"""All kernels compile for the GPUs they are meant for, and do not spill."""

import importlib
import inspect
import json
import os
import pkgutil
import re
import subprocess
import sys

import pytest
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

import sb_memeff.ops.triton
from tests.unittests.ops import compile_ahead


@pytest.fixture(scope="module")
def rows():
    environment = {
        name: value
        for name, value in os.environ.items()
        if name != "TRITON_INTERPRET"
    }
    done = subprocess.run(
        [sys.executable, "-m", compile_ahead.__name__],
        capture_output=True,
        text=True,
        env={**environment, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert not done.returncode, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def kernels():
    """Names of those that are launched, which no other one calls."""
    sources = {}
    package = sb_memeff.ops.triton
    for module in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{module.name}")
        for name, value in vars(module).items():
            if isinstance(value, (InterpretedFunction, JITFunction)):
                sources[name] = inspect.getsource(value.fn)
    return {
        name
        for name in sources
        if not any(
            re.search(rf"\b{name}\b", source)
            for other, source in sources.items()
            if other != name
        )
    }


def test_every_kernel_is_compiled(rows):
    for target in compile_ahead.TARGETS:
        found = {row["kernel"] for row in rows if row["sm"] == target}
        assert found == kernels()


def test_no_kernel_spills(rows):
    assert {row["sm"] for row in rows} == {75, 80, 90}
    for row in rows:
        assert row["stack"] == 0, row
        assert row["registers"] <= 128, row
