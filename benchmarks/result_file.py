"""The result file of a benchmark.

Authors
 * The sb_memeff authors 2026
"""

import datetime
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path

import torch

import sb_memeff

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
            name: version(name)
            for name in ("torch", "speechbrain", "bitsandbytes")
        },
        "sb_memeff": sb_memeff.__version__,
    }


def append_line(path, row):
    """Adds a line to the result file of a benchmark that takes hours.

    Arguments
    ---------
    path : Path
        A file of JSON lines.
    row : dict
        A result; machine, versions and date are added.
    """
    with path.open("a") as f:
        f.write(json.dumps(row | machine()) + "\n")


def read_lines(path, keys):
    """Results of earlier runs.

    Arguments
    ---------
    path : Path
        As written by append_line; none is there at first.
    keys : tuple of str
        What tells the lines apart.

    Returns
    -------
    dict
        Maps the values of the keys to a row.
    """
    lines = path.read_text().splitlines() if path.is_file() else []
    return {tuple(r[k] for k in keys): r for r in map(json.loads, lines)}


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
