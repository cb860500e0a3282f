"""Finds the largest batch that fits on a GPU, without a GPU.

    python examples/what_fits.py

For SpeechBrain recipes use ``sb-memeff fit``.

Authors
 * The sb_memeff authors 2026
"""

import torch

from sb_memeff.lobes.models.RevResNet import RevResNet
from sb_memeff.memory.step import training_step_memory
from sb_memeff.memory.units import format_bytes, parse_bytes


def main(budget="2GB"):
    """Doubles the batch until a training step no longer fits."""
    batch, fitting = 2, None  # batch norm needs two
    while True:
        memory = training_step_memory(
            lambda: RevResNet.from_preset("RevNet34", input_size=80),
            (batch, 200, 80),
            torch.optim.SGD,
        )
        print(f"batch {batch:3d}: {format_bytes(memory.peak_bytes)}")
        if memory.peak_bytes > parse_bytes(budget):
            return fitting
        batch, fitting = 2 * batch, batch


if __name__ == "__main__":
    print(f"fits into 2 GB: batch {main()}")
