"""What a result file says about where it came from.

Authors
 * The sb_memeff authors 2026
"""

import datetime
import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def machine():
    """Machine, versions and date of a run.

    Returns
    -------
    dict
        Processor, GPU, threads, versions and date.
    """
    gpu = torch.cuda.is_available()
    return {
        "date": datetime.date.today().isoformat(),
        "processor": f"{platform.machine()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if gpu else None,
        "python": platform.python_version(),
        **{
            name: _version(name)
            for name in ("torch", "speechbrain", "bitsandbytes", "sb_memeff")
        },
    }


def _version(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def write_results(script, results):
    """Writes results/<script>.json next to the benchmarks.

    Arguments
    ---------
    script : str
        ``__file__`` of the benchmark.
    results : list or dict
        What it found.
    """
    path = RESULTS / f"{Path(script).stem}.json"
    path.write_text(
        json.dumps({"machine": machine(), "results": results}, indent=2) + "\n"
    )
    print(f"written to {path}")
