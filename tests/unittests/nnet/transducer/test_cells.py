"""The cells of a batch, and the sums of their gradients.

Authors
 * The sb_memeff authors 2026
"""

import pytest
import torch
from speechbrain.nnet.transducer.transducer_joint import Transducer_joint
from torch import nn

from sb_memeff.nnet.transducer import cells as cells_module
from sb_memeff.nnet.transducer.cells import CellLogits, Cells, Gradients

H, V = 6, 9
FRAMES, COUNTS = torch.tensor([4, 1, 3, 2]), torch.tensor([2, 0, 1, 2])


def cells(dtype=torch.float32):
    torch.manual_seed(0)
    logits = CellLogits(Transducer_joint(), nn.Linear(H, V)).to(dtype)
    enc, pred = torch.randn(4, 4, H), torch.randn(4, 3, H)
    targets = torch.randint(1, V, (4, 2))
    return Cells(
        logits, enc.to(dtype), pred.to(dtype), targets, FRAMES, COUNTS, 0, None
    )


@pytest.mark.parametrize("size", [1, 24, 30, 1000])
def test_groups_hold_the_cells_of_the_batch(size):
    """The same rows in the same order, however the batch is cut."""
    whole = cells()
    groups = list(whole.groups(size))
    assert len(groups) == {1: 4, 24: 2, 30: 2, 1000: 1}[size]
    located = [torch.stack(g.locate(g.places())) for g in groups]
    expected = torch.stack(whole.locate(whole.places()))
    assert torch.equal(torch.cat(located, 1), expected)
    assert expected.shape[1] == (FRAMES * (COUNTS + 1)).sum()
    for group in groups:
        places = group.places()
        assert places.max() < group.shape[0] * group.shape[1] * group.shape[2]
        sample = group.locate(places)[0]
        assert set(sample.tolist()) == set(group.samples)


@pytest.mark.parametrize("scaled", [True, False])
def test_float16_keeps_small_gradients(scaled, monkeypatch):
    """In early gradients GradScaler's factor is not known yet."""
    if not scaled:
        monkeypatch.setattr(
            cells_module, "_scale_for_half", lambda gradient: torch.ones(())
        )
    found = []
    for dtype in (torch.float16, torch.float64):
        some = cells(dtype)
        sums = Gradients(some.enc, some.pred, {})
        places = some.places()
        made = sums.run(some, places)
        normaliser, *_ = some.scores(places, made[0].detach())
        tiny = torch.full_like(normaliser, 2e-7)
        sums.add(made, normaliser, tiny, 0 * tiny)
        found.append(sums.sums[0].double())
    error = (found[0] - found[1]).norm() / found[1].norm()
    assert (error < 0.01) == scaled


@pytest.mark.parametrize("size", [1e-12, 1e-6, 1.0, 1e4, 1e9])
def test_the_scale_for_half_is_a_power_of_two_that_fits(size):
    gradient = size * torch.randn(30, 7)
    scale = cells_module._scale_for_half(gradient)
    assert scale.log2() == scale.log2().round()
    assert 1 <= (scale * gradient).abs().max() < 2


def test_the_scale_of_nothing_is_one():
    for value in (0.0, torch.nan, torch.inf):
        gradient = torch.full((3, 2), value)
        assert cells_module._scale_for_half(gradient) == 1
