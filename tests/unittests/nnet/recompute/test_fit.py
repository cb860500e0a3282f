"""Budgets for segments of several blocks.

Authors
 * The sb_memeff authors 2026
"""

from torch import nn

from sb_memeff.memory.leftovers import no_leftovers
from sb_memeff.memory.step import training_step_memory
from sb_memeff.nnet.recompute import (
    fit_recompute,
    recompute_blocks,
    store_blocks,
)


def network():
    return nn.Sequential(
        *(
            nn.Sequential(*2 * [nn.Linear(100, 100), nn.Tanh()])
            for _ in range(8)
        )
    )


def peak(recomputed):
    """With so many of the four segments recomputed."""

    def build():
        net = network()
        recompute_blocks(net, "*", 4 / recomputed, segment_length=2)
        return net

    return training_step_memory(build, [1000, 100]).peak_bytes


@no_leftovers()  # looks at all objects of the process once
def test_a_budget_for_segments_of_two_blocks():
    """As few segments as fit, each a whole one."""
    budget = (peak(1) + peak(2)) // 2
    assert peak(2) < budget < peak(1)
    net = network()
    every = fit_recompute(net, "*", budget, [1000, 100], segment_length=2)
    assert every == 2
    found = store_blocks(net)
    assert found == recompute_blocks(net, "*", 2, segment_length=2)
    assert len(found) == 4
