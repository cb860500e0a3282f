"""The maths of invertible blocks."""

import pytest
import torch
from torch import nn

from sb_memeff.nnet.reversible.coupling import AdditiveCoupling, Tap


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
