"""The vanilla depth-first networks."""

import pytest
import torch
from torch import nn

from sb_memeff.lobes.models.DFResNet import DFResNet
from sb_memeff.lobes.models.RevDFResNet import RevDFResNet
from sb_memeff.lobes.models.RevResNet import RevResNet
from sb_memeff.lobes.models.WeSpeakerResNet import ResNet

# Millions of parameters. Gemini: README of Tianchi Liu's repository with the
# trained networks of the paper. DFResNet56 and 233: the comparison in the
# README of ReDimNet. Of the other two we have seen no count; these are ours.
COUNTS = {
    "DFResNet56": (4.5, 0.05),
    "DFResNet110": (7.18, 1e-3),
    "DFResNet179": (9.84, 1e-3),
    "DFResNet233": (12.3, 5e-3),
    "GeminiDFResNet60": (4.05, 1e-3),
    "GeminiDFResNet114": (6.53, 1e-3),
    "GeminiDFResNet183": (9.20, 1e-3),
    "GeminiDFResNet237": (11.68, 1e-3),
}


@pytest.mark.parametrize("name", DFResNet.PRESETS)
def test_parameters(name):
    with torch.device("meta"):
        net = DFResNet.from_preset(name)
    millions = sum(p.numel() for p in net.parameters()) / 1e6
    expected, tolerance = COUNTS[name]
    assert millions == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("name", DFResNet.PRESETS)
def test_layers_are_as_many_as_the_name_says(name):
    """Stem, blocks, embedding; the Gemini names count down-sampling too."""
    with torch.device("meta"):
        net = DFResNet.from_preset(name)
    layers = [
        layer
        for layer, module in net.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear))
    ]
    # The three down-sampling layers of the others have the name "conv".
    uncounted = sum(layer.endswith(".conv") for layer in layers)
    assert uncounted == (4 if "Gemini" in name else 3)
    counted = len(layers) - (0 if "Gemini" in name else uncounted)
    assert name.endswith(f"Net{counted}")


def test_golden_gemini_halves_the_frames_once_and_the_bands_four_times():
    net = DFResNet.from_preset("GeminiDFResNet60", base_channels=4)
    sizes = []
    for stage in net.stages:
        stage.register_forward_hook(lambda *_: None)
        stage[-1].register_forward_hook(
            lambda module, args, y: sizes.append(tuple(y.shape[2:]))
        )
    net(torch.rand(2, 50, 80))
    assert sizes == [(50, 40), (25, 20), (25, 10), (25, 5)]


def test_errors():
    with pytest.raises(ValueError, match="DFResNet18.*DFResNet56, DFResNet110"):
        DFResNet.from_preset("DFResNet18")
    with pytest.raises(ValueError, match=r"block_sizes.*four.*\[3, 4\]"):
        DFResNet(block_sizes=[3, 4])
    with pytest.raises(ValueError, match=r"strides.*pairs \(time, frequency"):
        DFResNet(strides=[1, [2, 2], [2, 0], 2])


@pytest.mark.parametrize(
    "network",
    [ResNet, DFResNet, RevResNet, RevDFResNet],
    ids=lambda n: n.__name__,
)
def test_a_stage_may_have_other_channels_without_a_stride(network):
    net = network(
        input_size=24,
        channels=(8, 16, 32, 32),
        block_sizes=(1, 1, 1, 1),
        strides=(1, 2, 1, 1),
        lin_neurons=5,
    )
    assert net(torch.rand(2, 21, 24)).shape == (2, 5)
