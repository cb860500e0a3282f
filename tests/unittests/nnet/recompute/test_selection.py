"""Which blocks a pattern names.

Authors
 * The sb_memeff authors 2026
"""

import pytest
import torch
from torch import nn

from sb_memeff.nnet.recompute.selection import find_segments


class Encoder(nn.Module):
    """Layers in a list, a layer beside it, and parameters in a list."""

    def __init__(self):
        super().__init__()
        self.norm = nn.Identity()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(2, 2), nn.Identity()) for _ in range(2)
        )
        self.scales = nn.ParameterList([torch.ones(1)])


@pytest.mark.parametrize(
    "pattern, names",
    [
        # ** stands for any number of names, none among them.
        ("**.norm", ["norm"]),
        ("layers.**.0", ["layers.0", "layers.0.0", "layers.1.0"]),
        ("layers.0.**", ["layers.0", "layers.0.0", "layers.0.1"]),
        ("layers.*.**.1", ["layers.0.1", "layers.1.1"]),
        # Containers are never called; among others they are left out.
        ("*", ["norm"]),
        ("*.*", ["layers.0", "layers.1"]),
        ("**.layers.[1-9]", ["layers.1"]),
    ],
)
def test_names_with_stars(pattern, names):
    segments = find_segments(Encoder(), pattern, 1)
    assert [name for ((name, _),) in segments] == names


def test_everything():
    net = Encoder()
    segments = find_segments(net, "**", 1)
    called = [
        name
        for name, part in net.named_modules()
        if part not in (net.layers, net.scales)
    ]
    assert "" in called
    assert [name for ((name, _),) in segments] == called


@pytest.mark.parametrize("name", ["layers", "scales"])
def test_a_container_is_never_called(name):
    with pytest.raises(ValueError, match=rf"{name} is a \w+List.*'{name}\.\*'"):
        find_segments(Encoder(), name, 1)
