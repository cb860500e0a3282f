"""Invertible down-sampling."""

import pytest
import torch
from torch import nn

from sb_memeff.memory.fake import fake_tensors
from sb_memeff.memory.tracker import StorageTracker
from sb_memeff.nnet.reversible.layout import split_streams
from sb_memeff.nnet.reversible.space_to_depth import SpaceToDepth


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
    _, ours = down.backward_streams(list(streams), list(streams), None, shape)
    assert torch.equal(torch.cat(ours, 1), dx)


def test_space_to_depth_errors():
    with pytest.raises(ValueError, match="factor=0"):
        SpaceToDepth(0)
    with pytest.raises(ValueError, match="factor=1.5 must be an integer"):
        SpaceToDepth(1.5)
    with pytest.raises(ValueError, match="2 axes.*has 1 after"):
        SpaceToDepth((2, 2))(torch.zeros(1, 2, 4))


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


def test_backward_holds_one_stream_twice_at_a_time():
    """Both streams and both gradients, and one that is made."""
    size = 4 * 2 * 8 * 40 * 40
    with fake_tensors(), StorageTracker() as tracker:
        streams = [torch.zeros(2, 32, 20, 20) for _ in range(4)]
        y, dy = streams[:2], streams[2:]
        del streams
        SpaceToDepth(2).backward_streams(y, dy, None, (2, 8, 40, 40))
    assert tracker.peak == 5 * size
