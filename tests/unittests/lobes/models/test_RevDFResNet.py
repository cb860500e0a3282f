"""Reversible DF-ResNets: what test_lobe_contract.py does not know of them."""

import pytest
import torch
from hyperpyyaml import load_hyperpyyaml

from sb_memeff.lobes.models.DFResNet import DFResNet
from sb_memeff.lobes.models.RevDFResNet import (
    RevDFResNet,
    StridedConvolution,
)
from sb_memeff.lobes.residual import stride_pairs
from sb_memeff.memory.leftovers import no_leftovers
from sb_memeff.memory.step import training_step_memory
from sb_memeff.nnet.padding import mask, padding_masks
from sb_memeff.nnet.reversible import AdditiveCoupling, check_invertible
from sb_memeff.ops import slices
from tests.unittests.weights import without_zeros

KINDS = ["strided", "invertible"]


def peak(cls, name, **options):
    """Peak bytes of a training step with 64 crops of 2 s."""
    shape = (64, 200, 80)
    build = lambda: cls.from_preset(name, **options)  # noqa: E731
    return training_step_memory(build, shape).peak_bytes


@no_leftovers()  # once for both analyses
def test_memory_against_the_vanilla_network():
    """The paper's headline, for deeper networks, is 16.2 times less."""
    vanilla = peak(DFResNet, "DFResNet56")
    # Both types take as much, within 1 %.
    ours = peak(RevDFResNet, "DFRevNet56", downsampling="strided")
    assert vanilla > 21 * ours


@pytest.mark.parametrize("downsampling", KINDS)
def test_slices_save_memory(monkeypatch, downsampling):
    """The expansions dominate: in two slices they take half.

    The streams and their gradients take the same. (The activations, which are
    made for a few samples at a time, are not what is meant here.)
    """
    monkeypatch.setattr(slices, "WHOLE_BYTES", 1 << 60)
    options = {"downsampling": downsampling, "block_sizes": [1, 1, 1, 1]}
    whole = peak(RevDFResNet, "DFRevNet56", slices=[1, 1, 1, 1], **options)
    assert peak(RevDFResNet, "DFRevNet56", **options) < 0.62 * whole


def test_slices_are_the_function():
    """f of a stage is the sum of its slices, each with its inner channels."""
    net = RevDFResNet(
        channels=[8, 8, 8, 8],
        inner_channels=[12, 12, 12, 12],
        slices=[1, 2, 3, 4],
        block_sizes=[1, 1, 1, 1],
    )
    couplings = [b for b in net.trunk.blocks if isinstance(b, AdditiveCoupling)]
    widths = [
        [body.layers[1].conv.in_channels for body in coupling.f]
        for coupling in couplings
    ]
    assert widths == [[12], [6, 6], [4, 4, 4], [3, 3, 3, 3]]
    x = torch.randn(2, 4, 10, 10)
    coupling = without_zeros(couplings[1]).eval()
    y1 = x + sum(body(x) for body in coupling.f)
    y2 = x + sum(body(y1) for body in coupling.g)
    found = coupling(torch.cat((x, x), 1))
    torch.testing.assert_close(found, torch.cat((y1, y2), 1))


def test_inner_channels_are_four_times_those_of_a_stream():
    net = RevDFResNet(channels=[8, 8, 16, 24], block_sizes=[1, 1, 1, 1])
    couplings = [b for b in net.trunk.blocks if isinstance(b, AdditiveCoupling)]
    widths = [
        [body.layers[1].conv.in_channels for body in (*c.f, *c.g)]
        for c in couplings
    ]
    assert widths == [[16, 16], [16, 16], [32, 32], [48, 48]]


@pytest.mark.parametrize(
    "strides", [[2, 1, 2, 2], [1, 1, 1, 1], [[1, 2], [2, 2], [1, 2], [3, 1]]]
)
@pytest.mark.parametrize("downsampling", KINDS)
def test_other_strides(strides, downsampling):
    channels = [8, 8, 16, 16]
    if downsampling == "invertible":
        channels = [4]
        for time, frequency in stride_pairs(strides[1:]):
            channels.append(channels[-1] * time * frequency)
    torch.manual_seed(0)
    net = RevDFResNet(
        input_size=20,
        channels=channels,
        block_sizes=[1, 1, 1, 1],
        strides=strides,
        inner_channels=[4, 4, 4, 4],
        slices=[2, 1, 4, 1],
        downsampling=downsampling,
    )
    net = without_zeros(net).double()
    feats = torch.randn(3, 21, 20, dtype=torch.float64)
    lengths = torch.tensor([21, 13, 7]) / 21
    assert check_invertible(net, feats, lengths).gradient_error < 1e-9
    net.eval()
    alone = net(feats[1:2, :13])
    torch.testing.assert_close(net(feats, lengths)[1:2], alone)


def test_a_transition_leaves_padded_frames_zero():
    """Else the batch norms behind it would count what its kernel reaches."""
    torch.manual_seed(0)
    transition = StridedConvolution(8, 6, stride=2, stage=1)
    masks = padding_masks(
        torch.tensor([1.0, 0.5]), torch.rand(2, 12, 8), [1, 2]
    )
    y = transition(mask(torch.randn(2, 8, 12, 8), masks[0]), masks)
    assert y.shape == (2, 6, 6, 4)
    assert y[0].all() and y[1, :, :3].all() and not y[1, :, 3:].any()


def test_from_yaml():
    hparams = load_hyperpyyaml(
        """
        by_name: !apply:sb_memeff.lobes.models.RevDFResNet.RevDFResNet.from_preset
            name: GeminiDFRevNet60
            downsampling: invertible
            base_channels: 4
            slices: [4, 2, 1, 1]
        by_hand: !new:sb_memeff.lobes.models.RevDFResNet.RevDFResNet
            input_size: 80
            channels: [8, 8, 16, 16]
            block_sizes: [1, 1, 1, 1]
            strides: [[1, 2], 2, [1, 2], [1, 2]]
            lin_neurons: 12
        """
    )
    assert hparams["by_name"](torch.rand(2, 16, 80)).shape == (2, 256)
    assert hparams["by_hand"](torch.rand(2, 16, 80)).shape == (2, 12)


def test_errors():
    with pytest.raises(ValueError, match="DFRevNet18.*DFRevNet56"):
        RevDFResNet.from_preset("DFRevNet18")
    with pytest.raises(ValueError, match="'strided'.*got 'haar'"):
        RevDFResNet.from_preset("DFRevNet56", downsampling="haar")
    with pytest.raises(ValueError, match=r"\[3, 1, 1, 1\] must divide inner"):
        RevDFResNet(channels=[8, 8, 8, 8], slices=[3, 1, 1, 1])
    with pytest.raises(ValueError, match=r"slices.*four.*\[2\]"):
        RevDFResNet(slices=[2])
    with pytest.raises(ValueError, match=r"channels=\[8, 16, 64, 128\]"):
        RevDFResNet(
            channels=[8, 8, 16, 16],
            strides=[1, (1, 2), 2, (1, 2)],
            downsampling="invertible",
        )
