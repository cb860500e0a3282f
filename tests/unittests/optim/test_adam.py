"""What Adam8bit and AdamW8bit do that no contract of all optimizers says.

Authors
 * The sb_memeff authors 2026
"""

import bitsandbytes
import pytest
import torch
from torch import nn

from sb_memeff.optim import Adam8bit
from tests.unittests.optim.optimizers import (
    distances_to_torchs,
    through_a_file,
    train,
    trained,
)


def test_adam_has_l2_weight_decay():
    ours, bnb = distances_to_torchs(
        Adam8bit,
        bitsandbytes.optim.Adam8bit,
        {"lr": 0.003, "weight_decay": 0.1},
    )
    assert ours < 0.05 < 0.3 < bnb


def test_amsgrad_switched_on():
    """torch's class fails in step(); the maxima begin with 0 here."""
    net, optimizer = trained(Adam8bit)
    optimizer.param_groups[0]["amsgrad"] = True
    resumed = Adam8bit(net.parameters())
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    train(net, resumed, 1)
    state = resumed.state_dict()["state"][0]
    assert torch.equal(state["exp_avg_sq"], state["max_exp_avg_sq"])


def test_large_steps_do_not_follow_small_gradients():
    """A second moment that is rounded to 0 would divide by nearly nothing."""
    weight = nn.Parameter(torch.zeros(4096))
    optimizer = Adam8bit([weight], lr=1e-3)
    for step in range(3):
        # 1e-5 of the largest: its square is less than the least code.
        weight.grad = torch.full((4096,), 1e-5 if step < 2 else 0.0)
        weight.grad[::256] = 1.0
        before = weight.detach().clone()
        optimizer.step()
    assert (weight - before).abs().max() < 2e-3


@pytest.mark.parametrize("amsgrad", [False, True])
def test_an_infinite_second_moment_restarts(amsgrad):
    """The gradient does not move it, as in torch. Others of its block go on."""
    weight, other = (nn.Parameter(torch.zeros(4096)) for _ in range(2))
    optimizer = Adam8bit([weight], lr=1e-3, amsgrad=amsgrad)
    theirs = torch.optim.Adam([other], lr=1e-3, amsgrad=amsgrad)
    torch.manual_seed(0)
    for step in range(30):
        weight.grad = torch.randn(4096)
        if step == 10:
            weight.grad[5] = 1e30
        other.grad = weight.grad.clone()
        before = weight.detach().clone()
        optimizer.step()
        theirs.step()
        moved = (weight - before).abs()
        assert moved.isfinite().all() and moved.max() < 0.01
        assert (moved[5] == 0) == (step == 10)
    is_other = torch.arange(4096) != 5
    error = (weight - other)[is_other].norm() / other[is_other].norm()
    assert error < 0.02
    # torch's value stopped; it goes on here.
    loaded = Adam8bit([other], lr=1e-3)
    loaded.load_state_dict(theirs.state_dict())
    before = other.detach().clone()
    loaded.step()
    moved = (other - before).abs()
    assert moved.min() > 0 and moved.max() < 0.01


@pytest.mark.parametrize("factor", [0.2, 5.0])
def test_a_second_moment_follows_its_gradient(factor):
    """It changes by 0.1 % at a step. The gaps between codes are wider."""
    torch.manual_seed(0)
    size = 4096
    few = torch.arange(size) % 64 == 0
    ends = []
    for cls in (torch.optim.Adam, Adam8bit, bitsandbytes.optim.Adam8bit):
        weight = nn.Parameter(torch.zeros(size))
        optimizer = cls([weight], lr=1e-3)
        generator = torch.Generator().manual_seed(0)
        for step in range(1500):
            weight.grad = torch.randn(size, generator=generator)
            if step >= 300:
                weight.grad[few] *= factor
            optimizer.step()
        state = optimizer.state[weight]
        if cls is bitsandbytes.optim.Adam8bit:
            codes = state["state2"].long()
            scales = state["absmax2"].repeat_interleave(256)
            ends.append(state["qmap2"][codes] * scales)
        else:
            ends.append(optimizer.state_dict()["state"][0]["exp_avg_sq"])
    exact, ours, theirs = (x[few].mean() for x in ends)
    assert abs(ours - exact) < 0.1 * exact
    if factor < 1:
        assert abs(theirs - exact) > 0.5 * exact
