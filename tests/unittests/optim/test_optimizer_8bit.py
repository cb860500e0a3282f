"""A step: how much it unpacks at a time.

Authors
 * The sb_memeff authors 2026
"""

import pytest
import torch
from torch import nn

from sb_memeff.memory.tracker import StorageTracker
from sb_memeff.ops.dispatch import SWITCH
from sb_memeff.optim import optimizer_8bit
from tests.unittests.optim.optimizers import each_class


@each_class
def test_a_step_holds_few_unpacked_states_at_a_time(kind, monkeypatch):
    """Of a chunk's values; not those of all."""
    monkeypatch.setenv(SWITCH, "0")
    peaks = []
    weights = [nn.Parameter(torch.randn(64, 1024)) for _ in range(8)]
    for values in (1 << 16, 1 << 30):
        monkeypatch.setattr(optimizer_8bit, "CPU_CHUNK", values)
        optimizer = kind.make(weights, foreach=False)
        for p in weights:
            p.grad = torch.ones_like(p)
        optimizer.step()
        known = [*weights, *(p.grad for p in weights)]
        with StorageTracker(exclude=known) as tracker:
            optimizer.step()
        peaks.append(tracker.peak)
    moments = optimizer.state[weights[0]].keys() & optimizer.signed.keys()
    unpacked = 4 * len(moments) * weights[0].numel()
    assert peaks[1] - peaks[0] > 5 * unpacked


@each_class
@pytest.mark.parametrize(
    "old, new",
    [((80, 80), (40, 160)), ((6400,), (5000,)), ((6400,), (2, 6400))],
)
def test_parameters_that_change_their_shape_are_refused(kind, old, new):
    """Before anything changes."""
    first, weight = (nn.Parameter(torch.zeros(n)) for n in (old, old))
    optimizer = kind.make([first, weight])
    for shape in (old, new):
        weight.data = torch.zeros(shape)
        first.grad, weight.grad = torch.ones(old), torch.ones(shape)
        before = first.detach().clone()
        if shape == old:
            optimizer.step()
            continue
        with pytest.raises(RuntimeError, match="group 0 has the shape"):
            optimizer.step()
        assert torch.equal(first, before)
