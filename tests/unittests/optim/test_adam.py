"""What Adam8bit and AdamW8bit do that no contract of all optimizers says.

Authors
 * The sb_memeff authors 2026
"""

import bitsandbytes
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
