"""Margins that change, and sub-centres.

Authors
 * The sb_memeff authors 2026
"""

import math

import pytest
import torch
from speechbrain.lobes.models.ECAPA_TDNN import Classifier
from speechbrain.nnet.losses import AdditiveAngularMargin
from torch.nn.functional import normalize, one_hot

from sb_memeff.nnet.angular_margin import (
    InterTopKMargin,
    MarginSchedule,
    SubCenterClassifier,
)


@pytest.fixture
def cosines():
    torch.manual_seed(0)
    return 2 * torch.rand(6, 9) - 1


TARGETS = one_hot(torch.tensor([0, 8, 3, 3, 5, 1]), 9).float()


@pytest.mark.parametrize("margin", [0.0, 0.13, 0.5])
def test_without_penalty_it_is_speechbrains(cosines, margin):
    loss = InterTopKMargin(margin=0.5, scale=20.0)
    loss.set_margin(margin)
    expected = AdditiveAngularMargin(margin=margin, scale=20.0)
    assert torch.equal(loss(cosines, TARGETS), expected(cosines, TARGETS))


@pytest.mark.parametrize("margin", [0.2, 0.1])
def test_nearest_wrong_speakers_come_nearer(cosines, margin):
    loss = InterTopKMargin(margin=0.2, scale=20.0, k_top=3, k_top_margin=0.06)
    loss.set_margin(margin)
    expected = AdditiveAngularMargin(margin, 20.0)(cosines, TARGETS)
    for row, target in enumerate(TARGETS.argmax(1).tolist()):
        wrong = sorted(set(range(9)) - {target}, key=lambda n: cosines[row, n])
        for n in wrong[-3:]:
            angle = math.acos(cosines[row, n]) - 0.06 * margin / 0.2
            expected[row, n] = 20 * math.cos(angle)
    found = loss(cosines, TARGETS)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("k_top", [0, 2])
def test_gradients_are_finite(k_top):
    cosines = torch.eye(9)[:6].requires_grad_()
    loss = InterTopKMargin(k_top=k_top)
    loss(cosines, TARGETS).square().sum().backward()
    assert cosines.grad.isfinite().all()


def test_schedule():
    loss = InterTopKMargin(margin=0.2)
    schedule = MarginSchedule(loss, 0.05, 0.2, start_step=100, end_step=300)
    margins = []
    for step in range(0, 400, 25):
        schedule(step)
        margins.append(loss.margin)
    assert margins[:5] == [0.05] * 5 and margins[12:] == [0.2] * 4
    rises = [b - a for a, b in zip(margins[4:], margins[5:13])]
    # Each quarter of the rise is a fixed part of the one before.
    ratios = [b / a for a, b in zip(rises, rises[1:-1])]
    assert ratios == pytest.approx([0.001**0.125] * 6, rel=1e-3)
    # At any step, without those before: a resumed training goes on.
    schedule(150)
    assert loss.margin == margins[6]


def test_a_constant_margin():
    loss = InterTopKMargin(margin=0.3)
    schedule = MarginSchedule(loss, 0.3, 0.3, start_step=0, end_step=0)
    schedule(0)
    assert loss.margin == 0.3


def test_sub_centers():
    torch.manual_seed(0)
    theirs = Classifier(input_size=5, out_neurons=4)
    one = SubCenterClassifier(5, out_neurons=4)
    one.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 1, 5)
    assert torch.equal(one(x), theirs(x)) and torch.equal(one(x[:, 0]), one(x))
    three = SubCenterClassifier(5, out_neurons=4, sub_centers=3)
    cosines = normalize(x[:, 0]) @ normalize(three.weight).T
    for speaker in range(4):
        best = cosines[:, 3 * speaker : 3 * speaker + 3].amax(1)
        torch.testing.assert_close(three(x)[:, 0, speaker], best)
