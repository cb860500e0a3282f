"""The maths of invertible blocks."""

import pytest
import torch
from torch import nn

from sb_memeff.nnet.reversible.coupling import AdditiveCoupling, Tap
from sb_memeff.nnet.reversible.layout import split_streams
from sb_memeff.nnet.reversible.space_to_depth import SpaceToDepth


def test_additive_coupling_is_the_equation():
    f, g = nn.Linear(3, 3), nn.Linear(3, 3)
    x = torch.randn(5, 6)
    y = AdditiveCoupling(f, g)(x)
    y1 = x[:, :3] + f(x[:, 3:])
    y2 = x[:, 3:] + g(y1)
    torch.testing.assert_close(y, torch.cat((y1, y2), 1))


def test_additive_coupling_inverse():
    block = AdditiveCoupling(nn.Linear(3, 3), nn.Tanh()).double()
    x = torch.randn(5, 6, dtype=torch.float64)
    torch.testing.assert_close(block.inverse(block(x)), x)


def test_a_list_stands_for_the_sum_of_its_members():
    f = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))
    g = nn.ModuleList([nn.Tanh(), nn.Linear(3, 3)])
    block = AdditiveCoupling(f, g).double()
    x = torch.randn(5, 6, dtype=torch.float64)
    y = block(x)
    y1 = x[:, :3] + sum(member(x[:, 3:]) for member in f)
    y2 = x[:, 3:] + sum(member(y1) for member in g)
    torch.testing.assert_close(y, torch.cat((y1, y2), 1))
    torch.testing.assert_close(block.inverse(y), x)


def test_additive_coupling_wants_modules():
    with pytest.raises(TypeError, match="g must be a torch.nn.Module.*func"):
        AdditiveCoupling(nn.ReLU(), lambda x: x)
    with pytest.raises(ValueError, match="f is an empty list"):
        AdditiveCoupling(nn.ModuleList(), nn.ReLU())


def test_tap_on_its_own_is_the_identity():
    tap = Tap(nn.Tanh())
    x = torch.randn(5, 6)
    assert torch.equal(tap(x), x)
    assert torch.equal(tap.inverse(x), x)


def test_tap_wants_a_module():
    with pytest.raises(TypeError, match="read must be a torch.nn.Module.*func"):
        Tap(lambda x: x)


def test_space_to_depth_is_pixel_unshuffle_of_each_stream():
    x = torch.randn(2, 6, 8, 4)
    ours = SpaceToDepth(2)(x)
    first, second = (nn.PixelUnshuffle(2)(half) for half in split_streams(x))
    assert torch.equal(ours, torch.cat((first, second), 1))


@pytest.mark.parametrize(
    "shape, factor, expected",
    [
        ((2, 4, 9), 2, (2, 8, 5)),
        ((2, 4, 8, 6), (1, 3), (2, 12, 8, 2)),
        ((2, 4, 5, 7), 2, (2, 16, 3, 4)),
        ((1, 2, 3, 4, 5), 2, (1, 16, 2, 2, 3)),
        ((2, 4, 8, 6), 1, (2, 4, 8, 6)),
    ],
)
def test_space_to_depth_loses_nothing(shape, factor, expected):
    x = torch.randn(shape)
    down = SpaceToDepth(factor)
    y = down(x)
    assert y.shape == expected
    assert torch.equal(down.inverse(y, input_shape=shape), x)
    assert y.square().sum() == pytest.approx(x.square().sum().item())


def test_space_to_depth_pads_with_zeros_at_the_end():
    y = SpaceToDepth(2)(torch.ones(1, 2, 3))
    assert y.tolist() == [[[1, 1], [1, 0], [1, 1], [1, 0]]]


def test_space_to_depth_gradient_is_its_inverse():
    down = SpaceToDepth((2, 3))
    x = torch.randn(2, 4, 5, 7, requires_grad=True)
    y = down(x)
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    streams = split_streams(dy)
    shape = split_streams(x)[0].shape
    _, ours = down.backward_streams(streams, streams, None, shape)
    assert torch.equal(torch.cat(ours, 1), dx)


def test_space_to_depth_errors():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        SpaceToDepth(0)
    with pytest.raises(ValueError, match="whole.*got 1.5"):
        SpaceToDepth(1.5)
    with pytest.raises(ValueError, match="2 axes.*has 1 after"):
        SpaceToDepth((2, 2))(torch.zeros(1, 2, 4))


def test_split_streams_wants_an_even_number_of_channels():
    with pytest.raises(ValueError, match=r"\(2, 3, 4\)"):
        split_streams(torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match=r"shape \(2,\)"):
        split_streams(torch.zeros(2))


def test_an_exported_space_to_depth_takes_odd_and_even_sizes():
    down = SpaceToDepth(2)
    free = {"x": {2: torch.export.Dim.DYNAMIC}}
    example = (torch.rand(1, 4, 11, 6),)
    program = torch.export.export(down, example, dynamic_shapes=free)
    traced = torch.jit.trace(down, example)
    for size in (8, 9, 10):
        x = torch.rand(1, 4, size, 6)
        for exported in (program.module(), traced):
            assert torch.equal(exported(x), down(x))
