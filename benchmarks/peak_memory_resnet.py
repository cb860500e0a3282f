"""Peak memory of a training step of every ResNet and RevNet preset.

Compares, at equal depth and nearly equal parameters: all activations stored,
torch.utils.checkpoint around each residual block, Type I, Type II. Fake
tensors: deterministic, no GPU needed.

    python benchmarks/peak_memory_resnet.py [--batch 64] [--frames 200]

Authors
 * The sb_memeff authors 2026
"""

import argparse

import torch
from common import networks, write_results

from sb_memeff.utils.memory import training_step_memory

DEPTHS = (34, 101, 152, 221, 293)


def sgd(parameters):
    """The recipe's optimizer; its state counts."""
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True)


def main():
    """Measures, prints a Markdown table and writes the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--frames", type=int, default=200)
    parser.add_argument("--mels", type=int, default=80)
    arguments = parser.parse_args()
    shape = (arguments.batch, arguments.frames, arguments.mels)
    rows = []
    print(
        "| depth | stored | checkpoint per block | Type I | Type II "
        "| Type I is smaller by | Type II is smaller by |\n"
        "|---|---|---|---|---|---|---|"
    )
    for depth in DEPTHS:
        row = {"depth": depth, "input_shape": shape}
        for kind, build in networks(depth).items():
            memory = training_step_memory(build, shape, optimizer=sgd)
            row[kind] = {
                "parameters": memory.parameters,
                "saved_bytes": memory.saved_bytes,
                "peak_bytes": memory.peak_bytes,
            }
        rows.append(row)
        print(markdown_row(row))
    write_results(__file__, rows)


def markdown_row(row):
    """One line of the README's table."""
    gigabytes = {
        k: row[k]["peak_bytes"] / 1e9
        for k in ("stored", "checkpoint", "type_1", "type_2")
    }
    cells = [f"{value:.2f} GB" for value in gigabytes.values()]
    for kind in ("type_1", "type_2"):
        cells.append(
            f"{gigabytes['stored'] / gigabytes[kind]:.1f}x "
            f"(checkpoint: {gigabytes['checkpoint'] / gigabytes[kind]:.1f}x)"
        )
    return f"| {row['depth']} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
