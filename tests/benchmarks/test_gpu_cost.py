"""Budgets of a GPU's step, counted without one: what grows here is found here.

Authors
 * The sb_memeff authors 2026
"""

import gpu_cost
import pytest
import torch
from resnets import networks

SHAPE = (64, 200, 80)


def test_bytes_launches_and_flops_of_known_operations():
    from sb_memeff.memory.fake import fake_tensors

    with fake_tensors():
        x, y = torch.zeros(1000, 10), torch.zeros(10, 30)
        with gpu_cost.Cost() as cost:
            z = x @ y
            z.view(-1)[1:].add_(1)
            torch.empty(1000)
    assert cost.launches == {"mm": 1, "add_": 1}
    size = 4 * (1000 * 10 + 10 * 30 + 1000 * 30)
    assert cost.bytes["mm"] == size
    assert cost.bytes["add_"] == 2 * 4 * (30000 - 1)
    assert cost.flops == 2 * 1000 * 10 * 30


def test_the_joint_loss():
    row = gpu_cost.joint(32, 250, 60)
    assert row["launches"] <= 320 and row["gigabytes"] <= 15


def test_further_runs_of_samples_cost_as_much_as_the_first():
    one, ten = (gpu_cost.joint(n, 1000, 200, 64, 100) for n in (5, 50))
    assert ten["runs"] == 10 * one["runs"] == 10
    assert ten["launches"] == 10 * one["launches"]


@pytest.mark.parametrize("precision", [torch.float16, None])
def test_the_bytes_of_a_reversible_network(precision):
    """Against the stored one, shallow: where they are most."""
    stored, reversible = (
        gpu_cost.network_step(networks("ResNet34")[kind], precision, SHAPE)
        for kind in ("stored", "type_2")
    )
    launches, moved, _ = (
        a / b for a, b in zip(reversible.total, stored.total, strict=True)
    )
    # In float32 activations of 125 MiB are made in slices.
    assert moved < (1.87 if precision else 1.37)
    assert launches < (1.53 if precision else 2.4)
