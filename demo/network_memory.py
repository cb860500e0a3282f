"""A training step of vanilla and reversible networks, side by side.

Memory does not depend on the machine; seconds do.

Authors
 * The sb_memeff authors 2026
"""

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
SGD = {"lr": 0.1, "momentum": 0.9}
ADAM = {"lr": 0.1}
# In pairs of 32 and 8 bits.
OPTIMIZERS = (
    (torch.optim.SGD, SGD),
    (optim.SGD8bit, SGD),
    (torch.optim.Adam, ADAM),
    (optim.Adam8bit, ADAM),
)


def compare_networks(base_channels, shape):
    """Rows of ResNet34 at this size, with time, and of both at full size."""
    return [
        compare_size(34, base_channels, shape, timed=True),
        compare_size(34, FULL_CHANNELS, FULL_SHAPE),
        compare_size(293, FULL_CHANNELS, FULL_SHAPE),
    ]


def compare_size(depth, base_channels, shape, timed=False):
    """Measures the networks of one size; seconds are None unless timed."""
    builders = networks(f"ResNet{depth}", base_channels=base_channels)
    seconds = time_steps(builders, shape) if timed else {}
    rows = []
    for kind, build in builders.items():
        memory = training_step_memory(build, shape)
        rows.append(
            {
                "network": LABELS[kind].format(depth),
                "depth": depth,
                "base_channels": base_channels,
                "shape": list(shape),
                "parameters": memory.parameters,
                "saved_bytes": memory.saved_bytes,
                "peak_bytes": memory.peak_bytes,
                "step_s": seconds.get(kind),
            }
        )
    return rows


def time_steps(builders, shape):
    """Seconds of forward, backward and update of each network."""
    features = torch.randn(shape)
    steps = {}
    for kind, build in builders.items():
        net = build()
        optimizer = torch.optim.SGD(net.parameters(), **SGD)
        steps[kind] = training_step(net, features, optimizer)
    return median_seconds(steps, rounds=5)


def print_networks(sizes):
    """Prints the comparison, each network against the first of its size."""
    for rows in sizes:
        first = rows[0]
        batch, frames, bands = first["shape"]
        print(
            f"\ndepth {first['depth']}, width {first['base_channels']}, "
            f"batch {batch} x {frames} frames x {bands} bands"
        )
        table = [
            ("network", "parameters", "kept for backward", "peak", "ratio"),
            *(
                (
                    row["network"],
                    f"{row['parameters'] / 1e6:.2f} M",
                    format_bytes(row["saved_bytes"]),
                    format_bytes(row["peak_bytes"]),
                    f"1/{first['peak_bytes'] / row['peak_bytes']:.1f}",
                )
                for row in rows
            ),
        ]
        if first["step_s"] is not None:
            seconds = ["s/step", *(f"{row['step_s']:.2f}" for row in rows)]
            table = [(*row, cell) for row, cell in zip(table, seconds)]
        print(*aligned(table), sep="\n")
    print(
        "\nPeak: parameters, gradients, activations and temporaries of one "
        "step\nwithout optimizer states, counted on fake tensors. Seconds: "
        "this machine."
    )


def compare_states():
    """Bytes of the optimizers' states for RevNet101, by the class's name."""
    states = {}
    for kind, options in OPTIMIZERS:
        with fake_tensors():
            network = RevResNet.from_preset("RevNet101")
            optimizer = kind(network.parameters(), **options)
            for parameter in network.parameters():
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            states[kind.__name__] = optim.state_bytes(optimizer)
    return states


def print_states(states):
    """Prints the bytes of the states, each 8-bit after its 32-bit optimizer."""
    print("\nOptimizer states of RevNet101, full width")
    items = list(states.items())
    table = [
        (full, format_bytes(a), packed, format_bytes(b), f"1/{a / b:.1f}")
        for (full, a), (packed, b) in zip(items[::2], items[1::2])
    ]
    print(*aligned(table), sep="\n")
