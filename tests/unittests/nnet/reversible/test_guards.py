"""Report streams that leave the grid, or that backward does not reconstruct."""

import re

import pytest
import torch
from torch import nn

from sb_memeff.nnet.replay import mismatch
from sb_memeff.nnet.reversible import (
    AdditiveCoupling,
    ReversibleSequence,
    guards,
    inversion_errors,
)
from tests.unittests.nnet.reversible.chains import (
    Nondeterministic,
    chain,
    images,
    other_order,
)


@pytest.mark.parametrize("scale, block", [(5000.0, 0), (3000.0, 1)])
def test_leaving_the_grid_is_reported_before_any_gradient(scale, block):
    net = ReversibleSequence(
        [AdditiveCoupling(nn.Identity(), nn.Identity()) for _ in range(3)]
    )
    net.blocks[0].f = nn.Conv2d(4, 4, 1)
    nn.init.zeros_(net.blocks[0].f.weight)
    nn.init.zeros_(net.blocks[0].f.bias)
    x = torch.zeros(2, 8, 3, 3)
    x[:, :4] = scale / 2 if block else scale
    x.requires_grad_()
    y = net(x)
    with pytest.raises(RuntimeError, match=f"blocks.{block} .*grid_bits=9"):
        y.sum().backward()
    assert x.grad is None
    assert net.blocks[0].f.weight.grad is None
    net.grid_bits = 7
    net(x).sum().backward()
    assert x.grad is not None


def test_non_finite_values_pass_on_as_in_autograd():
    net = chain(2, dropout=0.0)
    x = images()
    x[0, 0, 0, 0] = float("inf")
    x.requires_grad_()
    net(x).sum().backward()
    assert not torch.isfinite(x.grad).all()


def test_leaving_the_grid_is_reported_while_others_observe():
    net = chain(2, dropout=0.0)
    with inversion_errors(net), pytest.raises(RuntimeError, match="reached"):
        net(1e4 * images()).sum().backward()


def test_a_negative_stream_beyond_the_grid_is_reported():
    net = ReversibleSequence([AdditiveCoupling(nn.Identity(), nn.Identity())])
    x = torch.zeros(2, 8, 3)
    x[0, 1, 2] = -5000.0
    with pytest.raises(RuntimeError, match="reached 5000, beyond 4096"):
        net(x.requires_grad_()).sum().backward()


def test_another_order_of_summation_is_an_error_that_names_the_block():
    net = other_order()
    x = 100 * torch.randn(50, 128)
    with pytest.raises(RuntimeError, match=r"input of blocks\.1 differs"):
        net(x).square().sum().backward()
    # Neither that block nor those before it have gradients.
    assert net.blocks[1].f.linear.weight.grad is None
    assert net.blocks[0].g.weight.grad is None


def test_another_order_of_summation_may_be_a_warning(monkeypatch, caplog):
    monkeypatch.setattr(mismatch._pending, "action", "warn")
    monkeypatch.setattr(mismatch._pending, "_warned", set())
    net = other_order()
    x = 100 * torch.randn(50, 128)
    for _ in range(2):
        net(x).square().sum().backward()
    (text,) = [
        r.message for r in caplog.records if "blocks.1 differs" in r.message
    ]
    size = float(re.search(r"differs by (\S+) of the largest", text)[1])
    assert 1e-7 < size < 1e-3
    assert all(p.grad is not None for p in net.parameters())


def test_a_float64_stream_is_compared_with_a_tolerance():
    net = other_order().double()
    x = 100 * torch.randn(50, 128, dtype=torch.float64)
    net(x).square().sum().backward()
    net.blocks[1].f = Nondeterministic()
    with pytest.raises(RuntimeError, match=r"blocks\.1 differs by 0"):
        net(x).square().sum().backward()


def test_a_stream_without_a_grid_is_not_compared():
    net = other_order()
    net.exact = False
    net(100 * torch.randn(50, 128)).square().sum().backward()


def test_comparisons_wait_for_the_device_no_more_than_the_range_does(
    monkeypatch,
):
    """The host reads once in backward: how far the streams reach."""
    waits = []

    class Copied:
        def query(self):
            return False

        def synchronize(self):
            waits.append(1)

    copies = []

    def copy_to_host(tensor):
        copies.append(len(tensor))
        return tensor, Copied()

    monkeypatch.setattr(mismatch, "_pending", mismatch._Pending(copy_to_host))
    monkeypatch.setattr(guards, "is_read_at_once", lambda device: False)
    net = chain(3, dropout=0.0)
    net(images()).sum().backward()
    assert copies == waits == []
    net(images()).sum().backward()
    # Those of the step before, of all blocks in one copy.
    assert copies == [3]
    assert waits == [1]


@pytest.mark.parametrize("scale", [5000.0, -5000.0])
@pytest.mark.parametrize("stream", [0, 1])
def test_either_stream_beyond_the_grid_on_either_side(scale, stream):
    net = ReversibleSequence(
        [AdditiveCoupling(nn.Tanh(), nn.Tanh()) for _ in range(2)]
    )
    x = torch.zeros(2, 4)
    x[1, 2 * stream] = scale
    y = net(x.requires_grad_())
    with pytest.raises(RuntimeError, match="blocks.0 the stream reached 500"):
        y.sum().backward()
    assert x.grad is None


class Constant(nn.Module):
    """Adds the same to a whole stream."""

    def __init__(self, value):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))

    def forward(self, x):
        return self.value.expand_as(x)


@pytest.mark.parametrize("block", [0, 1, 2])
def test_any_block_may_be_the_one_that_leaves_the_grid(block):
    """The last one too, though its output is the input of no other."""
    net = ReversibleSequence(
        [AdditiveCoupling(Constant(0.0), Constant(0.0)) for _ in range(3)]
    )
    net.blocks[block].g.value.data.fill_(5000.0)
    y = net(torch.zeros(2, 4))
    with pytest.raises(RuntimeError, match=f"at blocks.{block} the stream re"):
        y.sum().backward()
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_edge_of_the_grid_is_beyond_it(sign):
    """4096 + 2**-12 is rounded to 4096, so that 4096 may stand for either."""
    net = ReversibleSequence([AdditiveCoupling(nn.Tanh(), nn.Tanh())])
    x = torch.zeros(2, 4)
    x[0, 0] = sign * 4096.0
    y = net(x.requires_grad_())
    with pytest.raises(RuntimeError, match="reached 4096, beyond 4096"):
        y.sum().backward()
    x = x.detach()
    x[0, 0] = sign * (4096.0 - 2.0**-10)
    y = net(x.requires_grad_())
    y.sum().backward()
    assert x.grad is not None
