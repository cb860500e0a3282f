"""The vanilla networks."""

import pytest
import torch
from speechbrain.lobes.models.ResNet import ResNet as SpeechBrainResNet
from torch import nn

from sb_memeff.lobes.models.ResNet import ResNet
from tests.unittests.weights import without_zeros

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


def test_called_like_speechbrains():
    options = dict(
        input_size=40,
        channels=[4, 4, 8, 8],
        block_sizes=[1, 1, 1, 1],
        strides=[1, 2, 2, 2],
        lin_neurons=12,
        activation=nn.LeakyReLU,
    )
    feats = torch.rand(2, 30, 40)
    lengths = torch.tensor([1.0, 0.5])
    for net in (SpeechBrainResNet(**options), ResNet(**options)):
        assert net(feats).shape == (2, 12)
        assert net(feats, lengths).shape == (2, 12)
        assert net(feats, lengths=lengths).shape == (2, 12)


@pytest.mark.parametrize("strides", [[1, 2, 2, 2], [[1, 2], 2, [3, 1], 1]])
@pytest.mark.parametrize("name", ["ResNet34", "ResNet101"])
def test_padding_changes_no_embedding(name, strides):
    torch.manual_seed(0)
    net = ResNet.from_preset(
        name, base_channels=4, input_size=20, strides=strides
    )
    net = without_zeros(net).double()
    net(torch.randn(4, 33, 20).double())  # running statistics that matter
    net.eval()
    feats = 10 * torch.randn(3, 21, 20, dtype=torch.float64)
    frames = (21, 13, 6)
    together = net(feats, torch.tensor(frames) / 21)
    for row, n in enumerate(frames):
        alone = net(feats[row : row + 1, :n])
        torch.testing.assert_close(together[row : row + 1], alone)


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
