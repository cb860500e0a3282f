"""Time of a training step of ResNet and RevNet, on the GPU if there is one.

It compares the networks of peak_memory.py. Their steps alternate, so that other
load on the machine affects all of them.

    python benchmarks/step_time_resnet.py [--depth 34] [--base-channels 16]

Authors
 * The sb_memeff authors 2026
"""

import argparse
import statistics
import time

import torch
from common import networks, write_results


def timed_step(net, x):
    """Measures the seconds of a forward and a backward pass."""
    if x.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    net(x).square().mean().backward()
    if x.is_cuda:
        torch.cuda.synchronize()
    net.zero_grad()
    return time.perf_counter() - start


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
    print("| depth | stored | checkpoint per block | Type I | Type II |")
    print("|---|---|---|---|---|")
    for depth in arguments.depth:
        options = {"base_channels": arguments.base_channels}
        built = networks(f"ResNet{depth}", **options)
        built = {k: build().to(device) for k, build in built.items()}
        times = {kind: [] for kind in built}
        for _ in range(arguments.rounds):
            for kind, net in built.items():
                times[kind].append(timed_step(net, x))
        # The first step is a warm-up.
        medians = {k: statistics.median(t[1:]) for k, t in times.items()}
        rows.append({**vars(arguments), "depth": depth, "seconds": medians})
        base = medians["stored"]
        cells = (f"{t:.2f} s ({t / base:.2f}x)" for t in medians.values())
        print(f"| {depth} | " + " | ".join(cells) + " |", flush=True)
    write_results(__file__, rows)


if __name__ == "__main__":
    main()
