"""The grid of the exact stream, and the kinds of arithmetic."""

import pytest
import torch
from torch import nn

from sb_memeff.nnet.reversible.grid import StreamFormat
from sb_memeff.nnet.replay import Recorder
from sb_memeff.nnet.reversible import AdditiveCoupling, ReversibleSequence


def on_grid(bits=12, kind=Arithmetic):
    return kind(nn.Identity(), torch.float32, bits, (), {})


@pytest.mark.parametrize("bits, reach", [(12, 4096.0), (7, 131072.0)])
def test_sums_on_the_grid_are_exact(bits, reach):
    torch.manual_seed(0)
    run = on_grid(bits)
    # Magnitudes from far below a grid step to the edge of the range.
    scale = torch.logspace(-6, torch.tensor(reach / 2).log10().item(), 4000)
    x = run.on_grid((torch.rand(4000) * 2 - 1) * scale)
    h = run.on_grid((torch.rand(4000) * 2 - 1) * scale.flip(0))
    assert torch.equal((x + h) - h, x)
    assert torch.equal(x, (x.double() * 2**bits).round().float() / 2**bits)
    # Beside the grid it is not so: that is why there is one.
    x, h = torch.rand(4000), 100 * torch.rand(4000)
    assert not torch.equal((x + h) - h, x)


def test_rounding_passes_the_gradient():
    x = torch.randn(5, requires_grad=True)
    (dx,) = torch.autograd.grad(on_grid().on_grid(x), x, torch.arange(5.0))
    assert torch.equal(dx, torch.arange(5.0))


def test_float64_is_left_alone():
    net = ReversibleSequence([AdditiveCoupling(nn.Tanh(), nn.Tanh())])
    x = torch.randn(2, 4, dtype=torch.float64)
    y1 = x[:, :2] + x[:, 2:].tanh()
    assert torch.equal(net(x), torch.cat((y1, x[:, 2:] + y1.tanh()), 1))


@pytest.mark.parametrize("bits", [12, None])
def test_recording_works_on_copies(bits):
    run = on_grid(bits, RecordingArithmetic)
    run.start(Recorder(torch.device("cpu")), watch=False)
    x = torch.zeros(1, 4, 3)
    for stream in run.streams(x):
        stream.add_(1)
    assert not x.any()


class Constant(nn.Module):
    def forward(self, x):
        return torch.ones_like(x)


def test_a_function_that_ignores_its_input_has_gradient_zero():
    net = ReversibleSequence([AdditiveCoupling(Constant(), nn.Tanh())])
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    (ours,) = torch.autograd.grad(net(x).square().sum(), x)
    net.save_memory = False
    (reference,) = torch.autograd.grad(net(x).square().sum(), x)
    torch.testing.assert_close(ours, reference)
