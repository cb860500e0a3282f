"""Chains whose streams share another axis than the first after the batch."""

import pytest
import torch
from torch import nn

from sb_memeff.nnet.reversible import (
    AdditiveCoupling,
    ReversibleSequence,
    SpaceToDepth,
    Tap,
    check_invertible,
)
from tests.unittests.nnet.reversible.chains import (
    gradients,
    relative_error,
    stored,
)


class Attention(nn.Module):
    """Self-attention over the frames of [N, T, C]."""

    def __init__(self, channels):
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.attention = nn.MultiheadAttention(channels, 2, batch_first=True)

    def forward(self, x):
        """Attends."""
        x = self.norm(x)
        return self.attention(x, x, x, need_weights=False)[0]


def transformer(axis=-1, depth=3, **options):
    """Reversible transformer layers of 2 x 8 channels."""
    torch.manual_seed(0)
    return ReversibleSequence(
        [
            AdditiveCoupling(
                Attention(8),
                nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.Tanh()),
            )
            for _ in range(depth)
        ],
        axis=axis,
        **options,
    )


class Turned(nn.Module):
    """The same function of [N, C, T]."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        """Calls it on [N, T, C]."""
        return self.module(x.mT).mT


@pytest.mark.parametrize("axis", [-1, 2])
def test_gradients_are_those_of_stored_activations(axis):
    net, x = transformer(axis), torch.randn(2, 7, 16)
    y, ours, _ = gradients(net, x)
    expected, reference, _ = gradients(stored(net), x)
    assert torch.equal(y, expected)
    assert relative_error(ours, reference) < 1e-6


def test_as_the_turned_chain():
    net, x = transformer(), torch.randn(2, 7, 16)
    turned = ReversibleSequence(
        [AdditiveCoupling(Turned(b.f), Turned(b.g)) for b in net.blocks]
    )
    outputs, found = [], []
    for module, given in ((net, x), (turned, x.mT.contiguous())):
        given.requires_grad_()
        outputs.append(module(given))
        outputs[-1].square().sum().backward()
        found.append([given.grad, *(p.grad for p in net.parameters())])
        net.zero_grad()
    found[1][0] = found[1][0].mT
    assert relative_error(outputs[:1], [outputs[1].mT]) < 1e-6
    assert relative_error(*found) < 1e-5


@pytest.mark.parametrize("save_memory", [True, False])
def test_taps_and_other_modules(save_memory):
    """A tap reads both streams joined along the axis, as modules do."""
    net = transformer(depth=1, save_memory=save_memory)
    net.blocks.append(Tap(nn.Linear(16, 3)))
    net.blocks.append(nn.Linear(16, 6))
    net.blocks.append(AdditiveCoupling(nn.Linear(3, 3), nn.Linear(3, 3)))
    y, total = net(torch.randn(2, 7, 16))
    assert y.shape == (2, 7, 6) and total.shape == (2, 7, 3)
    total.sum().backward()
    assert net.blocks[1].read.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("input_shape", [None, (2, 7, 16)])
def test_inverse(input_shape):
    net = transformer().eval()
    x = torch.randn(2, 7, 16).mul(4096).round().div(4096)
    with torch.no_grad():
        assert torch.equal(net.inverse(net(x), input_shape=input_shape), x)


def test_inverse_names_a_shape_that_does_not_fit():
    net = transformer().eval()
    with torch.no_grad(), pytest.raises(ValueError, match=r"\(2, 7, 18\)"):
        net.inverse(net(torch.randn(2, 7, 16)), input_shape=(2, 7, 18))


@pytest.mark.parametrize(
    "shape, axis", [((2, 16, 7), -1), ((2, 16), 2), ((2, 16), -2)]
)
def test_odd_or_missing_channels(shape, axis):
    with pytest.raises(ValueError, match=f"dimension {axis} in two"):
        transformer(axis)(torch.randn(shape))


def test_the_batch_is_no_axis():
    with pytest.raises(ValueError, match="axis=0 is the batch"):
        transformer(axis=0)


def test_space_to_depth_works_on_axis_1_alone():
    with pytest.raises(ValueError, match="axis must be 1, not -1"):
        ReversibleSequence([SpaceToDepth(2)], axis=-1)


def test_it_is_shown():
    assert "axis=-1" in repr(transformer())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("turned", [False, True])
def test_half_precision_and_any_strides(dtype, turned):
    """Inversion stays exact under autocast, whatever the input's layout."""
    net, x = transformer(), torch.randn(2, 7, 16)
    if turned:
        x = x.mT.contiguous().mT
    with torch.autocast("cpu", dtype):
        report = check_invertible(net, x)
    assert report.inversion_error == 0
    assert report.gradient_error < 1e-6
