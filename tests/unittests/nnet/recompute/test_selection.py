"""Which blocks a pattern names.

Authors
 * The sb_memeff authors 2026
"""

import copy

import pytest
import torch
from speechbrain.lobes.models.convolution import ConvolutionFrontEnd
from speechbrain.nnet.containers import LengthsCapableSequential
from torch import nn

from sb_memeff.nnet.recompute import recompute_blocks
from sb_memeff.nnet.recompute.selection import find_segments
from tests.unittests.nnet.reversible.chains import saved_bytes


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


class Router(nn.ModuleDict):
    """Defines forward, unlike ModuleDict."""

    def forward(self, x):
        return self["only"](x)


@pytest.mark.parametrize(
    "container, content",
    [
        (lambda: Router({"only": nn.Linear(2, 2)}), "only"),
        (lambda: LengthsCapableSequential(nn.Linear(2, 2)), "0"),
        (lambda: nn.Sequential(nn.Linear(2, 2)), "0"),
    ],
)
def test_containers_that_are_called(container, content):
    net = nn.ModuleDict({"front": container()})
    for pattern, names in (
        ("front", ["front"]),
        ("**", ["front", f"front.{content}"]),
    ):
        segments = find_segments(net, pattern, 1)
        assert [name for ((name, _),) in segments] == names
    with pytest.raises(ValueError, match="There are: front, "):
        find_segments(net, "back", 1)


def test_speechbrains_front_end_is_recomputed():
    front = ConvolutionFrontEnd(
        input_shape=[2, 10, 8],
        num_blocks=2,
        num_layers_per_block=1,
        out_channels=(4, 4),
        kernel_sizes=(3, 3),
        strides=(2, 2),
        residuals=(False, False),
    ).double()
    x = torch.rand(2, 10, 8, dtype=torch.float64)
    found = []
    for recompute in (False, True):
        net = nn.ModuleDict({"CNN": copy.deepcopy(front)})
        if recompute:
            assert recompute_blocks(net, "CNN") == ["CNN"]
        torch.manual_seed(1)
        stored, y = saved_bytes(net["CNN"], x)
        y.sum().backward()
        found.append((y, stored, [p.grad for p in net.parameters()]))
    (y_ref, everything, reference), (y, stored, ours) = found
    assert torch.equal(y, y_ref)
    assert all(map(torch.equal, ours, reference))
    assert stored <= x.nbytes < everything / 5
