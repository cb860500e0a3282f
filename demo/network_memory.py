"""A training step of vanilla and reversible networks, side by side.

Memory does not depend on the machine; seconds do.

Authors
 * The sb_memeff authors 2026
"""

import statistics
import time

FULL_CHANNELS = 32
# Frames of 10 ms, bands.
FULL_SHAPE = (64, 200, 80)


def list_networks(depth, base_channels):
    """The networks that are compared.

    Arguments
    ---------
    depth : int
        Their depth, as in the names of the presets.
    base_channels : int
        Their width.

    Returns
    -------
    dict
        Name to a function that builds the network.
    """
    from sb_memeff.lobes.models.ResNet import ResNet
    from sb_memeff.lobes.models.RevResNet import RevResNet

    def reversible(downsampling):
        return lambda: RevResNet.from_preset(
            f"RevNet{depth}",
            base_channels=base_channels,
            downsampling=downsampling,
        )

    return {
        f"ResNet{depth}": lambda: ResNet.from_preset(
            f"ResNet{depth}", base_channels=base_channels
        ),
        f"RevNet{depth} Type I": reversible("strided"),
        f"RevNet{depth} Type II": reversible("invertible"),
    }


def time_steps(builders, shape, steps=5):
    """Times forward, backward and update.

    Arguments
    ---------
    builders : dict
        Name to a function that builds the network.
    shape : tuple
        Shape of the features, [batch, frames, bands].
    steps : int
        Timed steps of each network.

    Returns
    -------
    dict
        Name to the median in seconds.
    """
    import torch

    torch.manual_seed(0)
    features = torch.randn(shape)
    networks = {name: build() for name, build in builders.items()}
    optimizers = {
        name: torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)
        for name, network in networks.items()
    }
    seconds = {name: [] for name in networks}
    # In turn, so that whatever else the machine does hits all of them. The
    # first round warms up.
    for round_ in range(steps + 1):
        for name, network in networks.items():
            started = time.perf_counter()
            network(features).square().mean().backward()
            optimizers[name].step()
            optimizers[name].zero_grad()
            if round_:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(s) for name, s in seconds.items()}


def compare(base_channels, shape):
    """Measures parameters, memory and time of the networks.

    Arguments
    ---------
    base_channels : int
        Width at which time is measured, too.
    shape : tuple
        Shape of the features there, [batch, frames, bands].

    Returns
    -------
    list
        One dict for each network and size, in the order of the table.
    """
    from sb_memeff.memory.step import training_step_memory

    rows = []
    for depth, width, size, measure_time in (
        (34, base_channels, shape, True),
        (34, FULL_CHANNELS, FULL_SHAPE, False),
        (293, FULL_CHANNELS, FULL_SHAPE, False),
    ):
        builders = list_networks(depth, width)
        seconds = time_steps(builders, size) if measure_time else {}
        for name, build in builders.items():
            memory = training_step_memory(build, size)
            rows.append(
                {
                    "network": name,
                    "depth": depth,
                    "base_channels": width,
                    "shape": list(size),
                    "parameters": memory.parameters,
                    "saved_bytes": memory.saved_bytes,
                    "peak_bytes": memory.peak_bytes,
                    "step_s": seconds.get(name),
                }
            )
    return rows


def print_table(rows):
    """Prints the comparison, each network against the first of its size.

    Arguments
    ---------
    rows : list
        As compare returns them.
    """
    title = None
    for row in rows:
        batch, frames, bands = row["shape"]
        size = (
            f"depth {row['depth']}, width {row['base_channels']}, "
            f"batch {batch} x {frames} frames x {bands} bands"
        )
        if size != title:
            title, first = size, row
            print(
                f"\n{size}\n{'network':<18}{'parameters':>12}"
                f"{'kept for backward':>19}{'peak memory':>20}"
                f"{'s/step':>8}"
            )
        fewer = first["peak_bytes"] / row["peak_bytes"]
        seconds = "" if row["step_s"] is None else f"{row['step_s']:.2f}"
        line = (
            f"{row['network']:<18}{row['parameters'] / 1e6:>10.2f} M"
            f"{row['saved_bytes'] / 2**20:>15.1f} MiB"
            f"{row['peak_bytes'] / 2**20:>9.0f} MiB {f'1/{fewer:.1f}':>6}"
            f"{seconds:>8}"
        )
        print(line.rstrip())
    print(
        "\nPeak: parameters, gradients, activations and temporaries of one "
        "step\nwithout optimizer states, counted on fake tensors. Seconds: "
        "this machine."
    )


def compare_states():
    """Measures the states of the optimizers, 32-bit and 8-bit.

    Returns
    -------
    list
        One dict for each optimizer.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from sb_memeff import optim
    from sb_memeff.lobes.models.RevResNet import RevResNet

    rows = []
    for name in ("SGD", "Adam"):
        options = {"momentum": 0.9} if name == "SGD" else {}
        for kind in (
            getattr(torch.optim, name),
            getattr(optim, f"{name}8bit"),
        ):
            with FakeTensorMode():
                network = RevResNet.from_preset("RevNet101")
                optimizer = kind(network.parameters(), lr=0.1, **options)
                for parameter in network.parameters():
                    parameter.grad = torch.zeros_like(parameter)
                optimizer.step()
                states = optim.state_bytes(optimizer)
            rows.append({"optimizer": kind.__name__, "state_bytes": states})
    return rows


def print_states(rows):
    """Prints the bytes of the states.

    Arguments
    ---------
    rows : list
        As compare_states returns them.
    """
    print("\nOptimizer states of RevNet101, full width")
    for full, packed in zip(rows[::2], rows[1::2]):
        bytes_ = [row["state_bytes"] for row in (full, packed)]
        print(
            f"{full['optimizer']:<6}{bytes_[0] / 2**20:>8.1f} MiB    "
            f"{packed['optimizer']:<10}{bytes_[1] / 2**20:>6.1f} MiB"
            f"    1/{bytes_[0] / bytes_[1]:.1f}"
        )
