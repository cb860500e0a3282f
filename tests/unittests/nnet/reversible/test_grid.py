"""The grid of the exact stream."""

import pytest
import torch
from torch import nn

from sb_memeff.nnet.reversible import AdditiveCoupling, ReversibleSequence
from sb_memeff.nnet.reversible.grid import StreamFormat
from sb_memeff.ops.grid import round_to_grid


@pytest.mark.parametrize("bits, reach", [(12, 4096.0), (7, 131072.0)])
def test_sums_on_the_grid_are_exact(bits, reach):
    torch.manual_seed(0)
    # Magnitudes from far below a grid step to the edge of the range.
    scale = torch.logspace(-6, torch.tensor(reach / 2).log10().item(), 4000)
    values = (torch.rand(2, 4000) * 2 - 1) * scale
    x, h = round_to_grid(values, bits)
    assert torch.equal((x + h) - h, x)
    # Rounded correctly, which plain float64 arithmetic can tell.
    exact = (values.double() * 2**bits).round() / 2**bits
    assert torch.equal(torch.stack((x, h)).double(), exact)
    assert not torch.equal(torch.stack((x, h)), values)
    # Beside the grid sums are not exact: that is why there is one.
    x, h = torch.rand(4000), 100 * torch.rand(4000)
    assert not torch.equal((x + h) - h, x)


def test_zeros_are_positive():
    """Else y - h would give 0 where x was -0: equal, but other bits."""
    small = torch.tensor([-1e-5, -0.0, 0.0, 1e-5])
    for x in (small, small.clone().requires_grad_()):
        on_grid = StreamFormat(torch.float32, 12).on_grid(x)
        assert not on_grid.signbit().any()


def test_rounding_passes_the_gradient():
    x = torch.randn(5, requires_grad=True)
    stream = torch.ones(5)
    stream_format = StreamFormat(torch.float32, 12)
    for y in (
        stream_format.on_grid(x),
        stream_format.add(stream, x),
        stream_format.subtract(stream, -x),
    ):
        (dx,) = torch.autograd.grad(y, x, torch.arange(5.0))
        assert torch.equal(dx, torch.arange(5.0))


def test_float64_is_left_alone():
    net = ReversibleSequence([AdditiveCoupling(nn.Tanh(), nn.Tanh())])
    x = torch.randn(2, 4, dtype=torch.float64)
    y1 = x[:, :2] + x[:, 2:].tanh()
    assert torch.equal(net(x), torch.cat((y1, x[:, 2:] + y1.tanh()), 1))


def test_float64_is_left_alone_under_autocast_too():
    """Autocast chooses the precision of float32 operators, not of float64."""
    torch.manual_seed(0)
    net = ReversibleSequence([AdditiveCoupling(nn.Tanh(), nn.Tanh())])
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    y1 = x[:, :2] + x[:, 2:].tanh()
    expected = torch.cat((y1, x[:, 2:] + y1.tanh()), 1)
    with torch.autocast("cpu", torch.bfloat16):
        for net.save_memory in (True, False):
            y = net(x)
            assert y.dtype == torch.float64
            assert torch.equal(y, expected)
        assert net.inverse(y).dtype == torch.float64


@pytest.mark.parametrize("bits", [12, None])
def test_streams_are_copies(bits):
    x = torch.zeros(1, 4, 3)
    for stream in StreamFormat(torch.float32, bits).to_streams(x):
        stream.add_(1)
    assert not x.any()


@pytest.mark.parametrize("bits", [12, None])
@pytest.mark.parametrize(
    "inner, outer",
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_dtypes(inner, outer, bits):
    stream_format = StreamFormat(inner, bits)
    streams = stream_format.to_streams(torch.ones(1, 4, 3, dtype=inner))
    assert [s.dtype for s in streams] == [outer, outer]
    assert stream_format.from_streams(*streams).dtype == inner


@pytest.mark.parametrize("bits", [None, 12])
@pytest.mark.parametrize("stream", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [torch.float16, torch.float32, torch.float64])
def test_values_of_any_dtype_become_the_streams(value, stream, bits):
    x = torch.rand(7, dtype=value)
    assert StreamFormat(stream, bits).on_grid(x).dtype == stream
