"""The cells of a batch, and the sums of their gradients.

Authors
 * The sb_memeff authors 2026
"""

import pytest
import torch
from speechbrain.nnet.transducer.transducer_joint import Transducer_joint
from torch import nn

from sb_memeff.nnet.transducer_loss.cells import (
    CellLogits,
    Cells,
    Gradients,
)

H, V = 6, 9
FRAMES, COUNTS = torch.tensor([4, 1, 3, 2]), torch.tensor([2, 0, 1, 2])


def cells(dtype=torch.float32):
    torch.manual_seed(0)
    logits = CellLogits(Transducer_joint(), nn.Linear(H, V)).to(dtype)
    enc, pred = torch.randn(4, 4, H), torch.randn(4, 3, H)
    targets = torch.randint(1, V, (4, 2))
    return Cells(
        logits,
        enc.to(dtype),
        pred.to(dtype),
        targets,
        FRAMES,
        COUNTS,
        (FRAMES.tolist(), COUNTS.tolist()),
        0,
    )


def located_in(group):
    """Sample, rows in the batch, and target of the cells of a group."""
    tile = group.tile(group.indices())
    enc_row = tile.enc_row + group.samples.start * group.rows
    pred_row = tile.pred_row + group.samples.start * group.columns
    return torch.stack([tile.sample, enc_row, pred_row, tile.target])


@pytest.mark.parametrize("size", [1, 24, 30, 1000])
def test_groups_hold_the_cells_of_the_batch(size):
    """The same rows in the same order, however the batch is cut."""
    whole = cells()
    groups = list(whole.groups(size))
    assert len(groups) == {1: 4, 24: 2, 30: 2, 1000: 1}[size]
    located = [located_in(g) for g in groups]
    expected = located_in(whole)
    assert torch.equal(torch.cat(located, 1), expected)
    assert expected.shape[1] == (FRAMES * (COUNTS + 1)).sum()
    for group in groups:
        indices = group.indices()
        assert indices.max() < group.shape[0] * group.shape[1] * group.shape[2]
        sample = group.sample_of(indices)
        assert set(sample.tolist()) == set(group.samples)


def gradients(dtype, posterior):
    """Of encoder, predictor and weights, where all posteriors are alike."""
    some = cells(dtype)
    weights = dict(some.logits.named_parameters())
    sums = Gradients(some.enc, some.pred, weights)
    tile = some.tile(some.indices())
    computed = sums.compute_logits(some, tile)
    lse, *_ = some.scores(tile, computed[0].detach())
    blank = torch.full_like(lse, posterior)
    with sums.group(some.samples):
        sums.add(computed, lse, blank, 0 * blank)
        found = [x.sum.double() for x in sums.of_inputs]
    return found + [total.double() for total in sums.weight_sums.values()]


@pytest.mark.parametrize("posterior", [1e-30, 2e-7, 1.0, 1e6])
def test_float16_holds_gradients_of_any_size(posterior):
    """In early gradients GradScaler's factor is not known yet."""
    found, exact = (
        gradients(dtype, posterior) for dtype in (torch.float16, torch.float64)
    )
    for a, b in zip(found, exact):
        assert (a - b).norm() < 3e-3 * b.norm()


def test_float16_weight_gradients_do_not_overflow():
    """A sum over rows may be larger than float16 can hold."""
    layer = nn.Linear(2, 3).half()
    for p in layer.parameters():
        # All symbols are alike.
        nn.init.zeros_(p)
    logits = CellLogits(Transducer_joint(nonlinearity=nn.Identity), layer)
    enc = torch.full((1, 3000, 2), 20.0).half()
    pred = torch.full((1, 1, 2), 20.0).half()
    frames, counts = torch.tensor([3000]), torch.tensor([0])
    targets = torch.empty(1, 0, dtype=torch.long)
    some = Cells(logits, enc, pred, targets, frames, counts, ([3000], [0]), 0)
    sums = Gradients(enc, pred, dict(logits.named_parameters()))
    tile = some.tile(some.indices())
    computed = sums.compute_logits(some, tile)
    lse, *_ = some.scores(tile, computed[0].detach())
    with sums.group(some.samples):
        sums.add(computed, lse, torch.ones(3000), torch.zeros(3000))
    weight, bias = sums.weight_sums.values()
    expected = 3000 * torch.tensor([-2 / 3, 1 / 3, 1 / 3])
    assert 40 * 2000 > torch.finfo(torch.float16).max
    torch.testing.assert_close(bias, expected, rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(
        weight, 40 * expected[:, None].expand(3, 2), rtol=1e-3, atol=1e-1
    )
