"""The vanilla networks."""

import pytest
import torch
from torch import nn

from sb_memeff.lobes.models.WeSpeakerResNet import ResNet
from sb_memeff.lobes.residual import Bottleneck

# Millions of parameters, as WeSpeaker publishes them.
PUBLISHED = {
    "ResNet34": 6.63,
    "ResNet101": 15.9,
    "ResNet152": 19.8,
    "ResNet221": 23.8,
    "ResNet293": 28.6,
}


@pytest.mark.parametrize("name", ResNet.PRESETS)
def test_parameters_are_the_published_ones(name):
    with torch.device("meta"):
        net = ResNet.from_preset(name)
    millions = sum(p.numel() for p in net.parameters()) / 1e6
    assert millions == pytest.approx(PUBLISHED[name], rel=5e-3)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.GELU, nn.PReLU])
def test_activations_in_place_or_not(activation):
    net = ResNet(
        input_size=16,
        channels=[8, 8, 8, 8],
        block_sizes=[1, 1, 1, 1],
        activation=activation,
        block="bottleneck",
    )
    net(torch.rand(2, 10, 16), torch.tensor([1.0, 0.6])).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_every_activation_is_the_one_asked_for(block):
    """Those of the further blocks of a stage too."""
    net = ResNet(
        channels=[8, 8, 16, 16],
        block_sizes=[2, 1, 3, 1],
        activation=nn.GELU,
        block=block,
    )
    kinds = [
        type(m) for m in net.modules() if "activation" in type(m).__module__
    ]
    assert kinds == [nn.GELU] * (1 + 7)


def test_padded_frames_of_a_block_without_a_stride():
    """The masks of input and output are the same then."""
    torch.manual_seed(0)
    block, x = Bottleneck(8, 2), torch.randn(2, 8, 10, 4)
    padding = (torch.arange(10) >= torch.tensor([[10], [6]]))[:, None, :, None]
    x.masked_fill_(padding, 0.0)
    found = block(x, padding)
    torch.testing.assert_close(found, block(x, padding, padding))
    assert not found.masked_select(padding).any()
    alone = block.eval()(x[1:, :, :6])
    torch.testing.assert_close(block(x, padding)[1:, :, :6], alone)


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_every_block_learns_though_it_begins_as_its_shortcut(block):
    """A zero before its last activation would shut it for ever."""
    torch.manual_seed(0)
    net = ResNet(
        input_size=16,
        channels=[8, 8, 8, 8],
        block_sizes=[1, 2, 1, 1],
        block=block,
    )
    net(torch.randn(4, 10, 16)).square().mul(torch.randn(256)).sum().backward()
    blocks = [part for stage in net.stages for part in stage]
    assert len(blocks) == 5
    for part in blocks:
        weights = [m.weight for m in part.children() if hasattr(m, "weight")]
        assert any(w.grad.any() for w in weights)


def test_errors():
    with pytest.raises(ValueError, match="ResNet18.*ResNet34, ResNet101"):
        ResNet.from_preset("ResNet18")
    with pytest.raises(ValueError, match="basic, bottleneck, got 'se'"):
        ResNet(block="se")
    with pytest.raises(ValueError, match=r"block_sizes.*four.*\[3, 4\]"):
        ResNet(block_sizes=[3, 4])
    for strides in ([1, 2], [1, 2, 2, [1, 2, 3]], [1, 2, 2, 0.5]):
        with pytest.raises(ValueError, match=r"strides.*pairs \(time, freq"):
            ResNet(strides=strides)
    with pytest.raises(ValueError, match=r"4 divides, got \[6, 8, 8, 8\]"):
        ResNet(channels=[6, 8, 8, 8], block="bottleneck")
    with pytest.raises(ValueError, match="each of the 2 utterances"):
        ResNet.from_preset("ResNet34", base_channels=4)(
            torch.rand(2, 20, 80), torch.ones(3)
        )
