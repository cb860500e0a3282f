"""What SGD8bit does that no contract of all optimizers says.

Authors
 * The sb_memeff authors 2026
"""

import bitsandbytes
import pytest
import torch
from torch import nn

from sb_memeff.optim import SGD8bit
from tests.unittests.optim.optimizers import (
    assert_same_weights,
    distances_to_torchs,
    trained,
)


@pytest.mark.parametrize("option", [{"nesterov": True}, {"dampening": 0.7}])
def test_nesterov_and_dampening_are_used(option):
    ours, bnb = distances_to_torchs(
        SGD8bit,
        bitsandbytes.optim.SGD8bit,
        {"lr": 0.03, "momentum": 0.9, **option},
    )
    assert ours < 0.05 < bnb and ours < bnb / 3


def test_sgd_without_momentum():
    options = {"lr": 0.03, "weight_decay": 0.01}
    net, optimizer = trained(SGD8bit, momentum=0, nesterov=False, **options)
    other, _ = trained(torch.optim.SGD, **options)
    assert_same_weights(net, other)
    assert optimizer.state_bytes() == 0
    with pytest.raises(NotImplementedError):
        bitsandbytes.optim.SGD8bit(net.parameters(), lr=0.1, momentum=0)


def test_nesterov_without_momentum_is_refused():
    with pytest.raises(ValueError, match="Nesterov"):
        SGD8bit([nn.Parameter(torch.zeros(2, 2))], nesterov=True)


@pytest.mark.parametrize("momentum", [0.99, 0.995, 0.999, 0.99999, 1.0])
def test_large_momenta(momentum):
    """A residual that would decay for thousands of steps is not paid in one."""
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(300, 4096, generator=generator)
    ways = []
    for cls in (torch.optim.SGD, SGD8bit):
        weight = nn.Parameter(torch.zeros(4096))
        optimizer = cls([weight], lr=0.01, momentum=momentum)
        for gradient in gradients:
            weight.grad = gradient.clone()
            optimizer.step()
        ways.append(weight.detach())
    exact, ours = ways
    assert (ours - exact).norm() < 0.07 * exact.norm()
