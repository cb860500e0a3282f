"""Calibration with quality measures.

Authors
 * The sb_memeff authors 2026
"""

import sys

import pytest
import torch

from sb_memeff.verification.calibration import (
    Calibration,
    calibration_trials,
    quality_measures,
)
from sb_memeff.verification.errors import DetectionErrors, cllr


def test_trials():
    speakers = torch.tensor([4, 2, 0, 2, 1, 4, 4, 3, 0])
    labels, enrol, test = calibration_trials(speakers, 2000, seed=1)
    assert labels.sum() == 1000 and len(enrol) == len(test) == 2000
    assert ((speakers[enrol] == speakers[test]) == labels.bool()).all()
    assert (enrol != test).all()
    # Each possible pair is drawn.
    ones = zip(enrol[labels == 1].tolist(), test[labels == 1].tolist())
    repeated = {0: [2, 8], 2: [1, 3], 4: [0, 5, 6]}
    possible = {
        (a, b) for own in repeated.values() for a in own for b in own if a != b
    }
    assert set(ones) == possible
    assert set(enrol[labels == 0].tolist()) == set(range(9))
    again = calibration_trials(speakers, 2000, seed=1)
    assert torch.equal(again[1], enrol) and torch.equal(again[2], test)
    other = calibration_trials(speakers, 2000, seed=2)
    assert not torch.equal(other[1], enrol)


@pytest.mark.parametrize("speakers", [[0, 0], [0, 1, 2]])
def test_too_few_utterances_for_trials(speakers):
    with pytest.raises(ValueError, match="too few .* raise n_train_snts"):
        calibration_trials(torch.tensor(speakers), 10, seed=0)


def test_measures_do_not_depend_on_the_order_of_a_trial():
    torch.manual_seed(0)
    seconds, magnitudes, means = torch.rand(3, 5)
    a, b = torch.tensor([0, 1, 2]), torch.tensor([3, 4, 0])
    scores = torch.rand(3)
    found = quality_measures(scores, a, b, seconds, magnitudes, means)
    swapped = quality_measures(scores, b, a, seconds, magnitudes, means)
    assert torch.equal(found, swapped)
    first = [scores[0]]
    for measure in (seconds.log(), magnitudes, means):
        first += sorted([measure[0], measure[3]])
    assert found[0].tolist() == pytest.approx([float(m) for m in first])


def trials(number, seed):
    """Scores whose distribution depends on the length of the utterances."""
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.arange(number) % 4 == 0).long()
    short = torch.randint(2, (number,), generator=generator)
    scores = torch.randn(number, generator=generator) + 3 * labels
    return torch.stack([scores + 2 * short, short], 1).double(), labels


def test_calibration_improves_scores():
    pytest.importorskip("sklearn")
    calibrate = Calibration(*trials(4000, seed=0))
    measures, labels = trials(4000, seed=1)
    raw, calibrated = measures[:, 0], calibrate(measures)
    one, two = labels == 1, labels == 0
    # The log likelihood ratio of two normals of distance 3.
    optimal = 3 * (raw - 2 * measures[:, 1]) - 4.5
    found = cllr(calibrated[one], calibrated[two])
    assert found < cllr(optimal[one], optimal[two]) + 0.01
    assert found < 0.6 * cllr(raw[one], raw[two])
    before = DetectionErrors.of(raw[one], raw[two]).eer()
    after = DetectionErrors.of(calibrated[one], calibrated[two]).eer()
    assert after < 0.6 * before


def test_scikit_learn_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match=r"sb_memeff\[calibration\]"):
        Calibration(*trials(10, seed=0))
