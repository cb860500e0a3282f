"""All kernels compile for the GPUs they are meant for, and do not spill."""

import json
import os
import subprocess
import sys

from tests.unittests.ops import compile_ahead


def test_no_kernel_spills():
    environment = {
        name: value
        for name, value in os.environ.items()
        if name != "TRITON_INTERPRET"
    }
    done = subprocess.run(
        [sys.executable, "-m", compile_ahead.__name__],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert not done.returncode, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["sm"] for row in rows} == {75, 80, 90}
    assert len(rows) == 3 * len(list(compile_ahead.kernels()))
    for row in rows:
        assert row["stack"] == 0, row
        assert row["registers"] <= 128, row
