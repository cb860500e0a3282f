"""Time of a training step of ResNet and RevNet, on the GPU if there is one.

Compares what peak_memory.py compares; the networks take turns.

    python benchmarks/step_time_resnet.py [--depth 34] [--base-channels 16]

Authors
 * The sb_memeff authors 2026
"""

import argparse

import torch
from resnets import networks
from result_file import write_results
from table import print_head, print_row
from timing import median_seconds, training_step


def main():
    """Measures, prints a Markdown table and writes the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depth", type=int, nargs="+", default=[34, 101])
    parser.add_argument("--base-channels", type=int, default=32)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--frames", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    x = torch.randn(arguments.batch, arguments.frames, 80, device=device)
    rows = []
    print_head("depth", "stored", "checkpoint per block", "Type I", "Type II")
    for depth in arguments.depth:
        options = {"base_channels": arguments.base_channels}
        steps = {
            kind: training_step(build().to(device), x)
            for kind, build in networks(f"ResNet{depth}", **options).items()
        }
        medians = median_seconds(steps, arguments.rounds)
        rows.append({**vars(arguments), "depth": depth, "seconds": medians})
        base = medians["stored"]
        cells = (f"{t:.2f} s ({t / base:.2f}x)" for t in medians.values())
        print_row(depth, *cells)
    write_results(__file__, rows)


if __name__ == "__main__":
    main()
