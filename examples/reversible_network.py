"""Builds a reversible network and checks that its gradients are exact.

    python examples/reversible_network.py

Authors
 * The sb_memeff authors 2026
"""

from functools import partial

import torch
from torch import nn

from sb_memeff.memory.step import training_step_memory
from sb_memeff.nnet.reversible import (
    AdditiveCoupling,
    ReversibleSequence,
    SpaceToDepth,
    check_invertible,
)


def body(channels):
    """A residual body: any module that keeps the shape of its input."""
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, padding=1),
    )


def network(depth, save_memory=True):
    """A stem, ``depth`` couplings, down-sampling, ``depth`` couplings."""
    # Each coupling splits its input into two streams of half the channels.
    return ReversibleSequence(
        [
            nn.Conv2d(1, 16, 3, padding=1),
            *(AdditiveCoupling(body(8), body(8)) for _ in range(depth)),
            SpaceToDepth(2),
            *(AdditiveCoupling(body(32), body(32)) for _ in range(depth)),
        ],
        save_memory=save_memory,
    )


def main():
    """Compares memory with and without storing activations."""
    for depth in (4, 16):
        stored, ours = (
            training_step_memory(build, (16, 1, 80, 200)).peak_bytes
            for build in (
                partial(network, depth, save_memory=False),
                partial(network, depth),
            )
        )
        print(
            f"{4 * depth:3d} bodies: {stored / 1e6:6.0f} MB stored, "
            f"{ours / 1e6:4.0f} MB reversible"
        )
    report = check_invertible(network(4), torch.rand(2, 1, 20, 30))
    print(report)
    return report


if __name__ == "__main__":
    main()
