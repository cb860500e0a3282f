"""State bytes and step time of 8-bit optimizers on RevNets of full width.

Compares torch's, bitsandbytes' and our classes: bytes of the states, time of
``step()`` alone (all parameters of a network, random gradients), and peak memory of
a whole training step. On a CPU it is the time that the process computes, which
other processes change little. Threads that wait count, too, so that one thread is
best.

    OMP_NUM_THREADS=1 python benchmarks/optimizer_states.py [--depth 34 101 293]

Authors
 * The sb_memeff authors 2026
"""

import argparse
import time

import bitsandbytes
import torch
from resnets import networks
from result_file import write_results
from table import print_head, print_row
from timing import median_seconds

from sb_memeff import optim
from sb_memeff.memory.step import training_step_memory

SGD = {"lr": 1e-4, "momentum": 0.9, "weight_decay": 1e-4}
ADAM = {"lr": 1e-4, "weight_decay": 1e-4}
OPTIMIZERS = {
    "torch SGD": (torch.optim.SGD, SGD),
    "bitsandbytes SGD8bit": (bitsandbytes.optim.SGD8bit, SGD),
    "sb_memeff SGD8bit": (optim.SGD8bit, SGD),
    "torch AdamW": (torch.optim.AdamW, ADAM),
    "bitsandbytes AdamW8bit": (bitsandbytes.optim.AdamW8bit, ADAM),
    "sb_memeff AdamW8bit": (optim.AdamW8bit, ADAM),
}


def measure(depth, device, rounds):
    """States and times of all optimizers.

    Arguments
    ---------
    depth : int
        Depth of the RevNet (Type II).
    device : str
        Device to run on.
    rounds : int
        Number of timed steps; the median is reported.

    Returns
    -------
    list
        A dict for each optimizer.
    """
    weights = [
        p.detach() for p in networks(f"ResNet{depth}")["type_2"]().parameters()
    ]
    optimizers = {}
    for name, (kind, options) in OPTIMIZERS.items():
        parameters = [torch.nn.Parameter(w.to(device).clone()) for w in weights]
        for p in parameters:
            p.grad = torch.randn_like(p)
        optimizers[name] = kind(parameters, **options)
    steps = {name: optimizer.step for name, optimizer in optimizers.items()}
    clock = time.process_time if device == "cpu" else time.perf_counter
    medians = median_seconds(steps, rounds, clock)
    return [
        {
            "optimizer": name,
            "parameters": sum(w.numel() for w in weights),
            "state_bytes": optim.state_bytes(optimizer),
            "step_s": medians[name],
        }
        for name, optimizer in optimizers.items()
    ]


def main():
    """Measures, prints a Markdown table and writes the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depth", type=int, nargs="+", default=[34, 101, 293])
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    print_head(
        "depth",
        "optimizer",
        "states",
        "bytes per parameter",
        "step",
        "peak of a training step",
    )
    for depth in arguments.depth:
        for row in measure(depth, device, arguments.rounds):
            kind, options = OPTIMIZERS[row["optimizer"]]
            row.update(depth=depth, device=device, peak_bytes=None)
            # bitsandbytes' own optimizers do not run on fake tensors.
            if not row["optimizer"].startswith("bitsandbytes"):
                memory = training_step_memory(
                    networks(f"ResNet{depth}")["type_2"],
                    (64, 200, 80),
                    lambda p, k=kind, o=options: k(p, **o),
                )
                row["peak_bytes"] = memory.peak_bytes
            rows.append(row)
            print_row(*cells(row))
    write_results(__file__, rows)


def cells(row):
    """A row of the README's table."""
    each = row["state_bytes"] / row["parameters"]
    peak = row["peak_bytes"]
    return (
        row["depth"],
        row["optimizer"],
        f"{row['state_bytes'] / 1e6:.1f} MB",
        f"{each:.2f}",
        f"{row['step_s'] * 1e3:.0f} ms",
        "" if peak is None else f"{peak / 1e9:.3f} GB",
    )


if __name__ == "__main__":
    main()
