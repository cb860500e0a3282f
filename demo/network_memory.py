"""A training step of vanilla and reversible networks, side by side.

Memory does not depend on the machine; seconds do.

Authors
 * The sb_memeff authors 2026
"""

import itertools

import torch
from resnets import networks
from table import aligned
from timing import median_seconds, training_step

from sb_memeff import optim
from sb_memeff.lobes.models.RevResNet import RevResNet
from sb_memeff.memory.fake import fake_tensors
from sb_memeff.memory.step import training_step_memory
from sb_memeff.memory.units import format_bytes

FULL_CHANNELS = 32
# Frames of 10 ms, bands.
FULL_SHAPE = (64, 200, 80)
LABELS = {
    "stored": "ResNet{}",
    "checkpoint": "ResNet{} with checkpoints",
    "type_1": "RevNet{} Type I",
    "type_2": "RevNet{} Type II",
}


def compare_networks(base_channels, shape):
    """Measures the networks at this size, with time, and at full sizes.

    Arguments
    ---------
    base_channels : int
        Width of the networks.
    shape : tuple
        Shape of the features, [batch, frames, bands].

    Returns
    -------
    list
        One dict for each network and size, in the order of the table.
    """
    rows = []
    for depth, width, size, is_timed in (
        (34, base_channels, shape, True),
        (34, FULL_CHANNELS, FULL_SHAPE, False),
        (293, FULL_CHANNELS, FULL_SHAPE, False),
    ):
        builders = networks(f"ResNet{depth}", base_channels=width)
        seconds = time_steps(builders, size) if is_timed else {}
        for kind, build in builders.items():
            memory = training_step_memory(build, size)
            rows.append(
                {
                    "network": LABELS[kind].format(depth),
                    "depth": depth,
                    "base_channels": width,
                    "shape": list(size),
                    "parameters": memory.parameters,
                    "saved_bytes": memory.saved_bytes,
                    "peak_bytes": memory.peak_bytes,
                    "step_s": seconds.get(kind),
                }
            )
    return rows


def time_steps(builders, shape):
    """Seconds of forward, backward and update of each network."""
    torch.manual_seed(0)
    features = torch.randn(shape)
    steps = {}
    for kind, build in builders.items():
        net = build()
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)
        steps[kind] = training_step(net, features, optimizer)
    return median_seconds(steps, rounds=5)


def print_networks(rows):
    """Prints the comparison, each network against the first of its size."""
    sizes = ("depth", "base_channels", "shape")
    for size, group in itertools.groupby(rows, lambda r: [r[k] for k in sizes]):
        depth, width, (batch, frames, bands) = size
        print(
            f"\ndepth {depth}, width {width}, "
            f"batch {batch} x {frames} frames x {bands} bands"
        )
        group = list(group)
        table = [
            (
                row["network"],
                f"{row['parameters'] / 1e6:.2f} M",
                format_bytes(row["saved_bytes"]),
                format_bytes(row["peak_bytes"]),
                f"1/{group[0]['peak_bytes'] / row['peak_bytes']:.1f}",
                "" if row["step_s"] is None else f"{row['step_s']:.2f}",
            )
            for row in group
        ]
        head = ("network", "parameters", "kept for backward", "peak memory", "")
        print(*aligned([(*head, "s/step"), *table]), sep="\n")
    print(
        "\nPeak: parameters, gradients, activations and temporaries of one "
        "step\nwithout optimizer states, counted on fake tensors. Seconds: "
        "this machine."
    )


def compare_states():
    """Measures the states of 32-bit and 8-bit optimizers, in pairs."""
    sgd, adam = {"lr": 0.1, "momentum": 0.9}, {"lr": 0.1}
    rows = []
    for kind, options in (
        (torch.optim.SGD, sgd),
        (optim.SGD8bit, sgd),
        (torch.optim.Adam, adam),
        (optim.Adam8bit, adam),
    ):
        with fake_tensors():
            network = RevResNet.from_preset("RevNet101")
            optimizer = kind(network.parameters(), **options)
            for parameter in network.parameters():
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            states = optim.state_bytes(optimizer)
        rows.append({"optimizer": kind.__name__, "state_bytes": states})
    return rows


def print_states(rows):
    """Prints the bytes of the states, each 8-bit after its 32-bit optimizer."""
    print("\nOptimizer states of RevNet101, full width")
    table = [
        (
            full["optimizer"],
            format_bytes(full["state_bytes"]),
            packed["optimizer"],
            format_bytes(packed["state_bytes"]),
            f"1/{full['state_bytes'] / packed['state_bytes']:.1f}",
        )
        for full, packed in zip(rows[::2], rows[1::2])
    ]
    print(*aligned(table), sep="\n")
