"""The demo's tables of networks and optimizers.

Authors
 * The sb_memeff authors 2026
"""

import math

import network_memory
import torch
from network_memory import print_networks, print_states
from resnets import networks

from sb_memeff.memory.step import StepMemory


def row(network, peak_bytes, step_s, depth=34):
    """A row as compare_networks returns it."""
    return {
        "network": network,
        "depth": depth,
        "base_channels": 8,
        "shape": [32, 200, 80],
        "parameters": 660_000,
        "saved_bytes": peak_bytes // 2,
        "peak_bytes": peak_bytes,
        "step_s": step_s,
    }


def test_networks_are_compared_with_the_first_of_their_size(capsys):
    print_networks(
        [
            [
                row("ResNet34", 600 * 10**6, 0.5),
                row("RevNet34 Type II", 150 * 10**6, 1.0),
            ],
            [
                row("ResNet293", 60000 * 10**6, None, depth=293),
                row("RevNet293 Type II", 2000 * 10**6, None, depth=293),
            ],
        ]
    )
    _, title, head, *lines = capsys.readouterr().out.splitlines()
    assert title == "depth 34, width 8, batch 32 x 200 frames x 80 bands"
    assert head.split()[-2:] == ["ratio", "s/step"]
    assert "s/step" not in lines[4]
    assert lines[1].split()[-4:] == ["150", "MB", "1/4.0", "1.00"]
    assert {len(line) for line in lines[:2]} == {len(head)}
    assert "depth 293" in lines[3] and "2.00 GB  1/30.0" in lines[6]


def test_states_are_compared_in_pairs(capsys):
    print_states({"SGD": 60 * 10**6, "SGD8bit": 15 * 10**6})
    line = capsys.readouterr().out.splitlines()[-1].split()
    assert line == "SGD 60.0 MB SGD8bit 15.0 MB 1/4.0".split()


def test_networks_and_sizes_that_are_compared(monkeypatch):
    asked = []

    def shallow(name, base_channels):
        asked.append((name, base_channels))
        return dict.fromkeys(networks(name), lambda: torch.nn.Linear(80, 4))

    def elements(build, shape):
        return StepMemory(1, 4, math.prod(shape), 0, "forward", "", {})

    monkeypatch.setattr(network_memory, "networks", shallow)
    # Some 100 s in all.
    monkeypatch.setattr(network_memory, "training_step_memory", elements)
    sizes = network_memory.compare_networks(8, (2, 24, 80))
    assert [row["network"] for row in sizes[0]] == [
        "ResNet34",
        "ResNet34 with checkpoints",
        "RevNet34 Type I",
        "RevNet34 Type II",
    ]
    assert sizes[2][0]["network"] == "ResNet293"
    assert [len(rows) for rows in sizes] == [4, 4, 4]
    assert asked == [("ResNet34", 8), ("ResNet34", 32), ("ResNet293", 32)]
    # Only the first size is one that a CPU can run.
    for rows, timed, frames in zip(
        sizes, (True, False, False), (2 * 24, 64 * 200, 64 * 200)
    ):
        assert {row["step_s"] is not None for row in rows} == {timed}
        assert {row["saved_bytes"] for row in rows} == {frames * 80}
