"""Error rates of speaker verification.

Authors
 * The sb_memeff authors 2026
"""

import math
from fractions import Fraction

import pytest
import torch
from speechbrain.utils.metric_stats import EER, minDCF

from sb_memeff.verification.errors import DetectionErrors, cllr, evaluate


def brute_force(positive, negative):
    """EER, minDCF and the EERs at all thresholds where the rates differ least.

    A trial is accepted above a threshold; of equally good ones the lowest is
    taken.
    """
    positive, negative = positive.tolist(), negative.tolist()
    levels = sorted({*positive, *negative})
    levels += [(a + b) / 2 for a, b in zip(levels, levels[1:])]
    rates = []
    for threshold in sorted(levels):
        missed = sum(p <= threshold for p in positive)
        accepted = sum(n > threshold for n in negative)
        rates.append(
            (Fraction(missed, len(positive)), Fraction(accepted, len(negative)))
        )
    gap = min(abs(miss - alarm) for miss, alarm in rates)
    best = [float(m + a) / 2 for m, a in rates if abs(m - a) == gap]
    cost = min(float(miss + 99 * alarm) / 100 for miss, alarm in rates)
    return best[0], cost, best


def cases():
    """Few levels, so that ties, swaps and gaps of every kind occur."""
    generator = torch.Generator().manual_seed(0)

    def whole(high):
        return int(torch.randint(1, high, (), generator=generator))

    for number in range(400):
        levels = whole(8)
        positive, negative = (
            torch.randint(levels, (whole(7),), generator=generator).float()
            for _ in "pn"
        )
        positive += number % 5 - 2  # apart, mixed, or the wrong way round
        yield positive / 8, negative / 8


def test_error_rates_are_those_of_every_threshold():
    seen = set()
    for positive, negative in cases():
        found = DetectionErrors.of(positive, negative)
        eer, cost, equally_good = brute_force(positive, negative)
        assert found.eer() == pytest.approx(eer, abs=1e-9)
        assert found.min_dcf() == pytest.approx(cost, abs=1e-9)
        theirs = EER(positive, negative)[0]
        assert min(abs(theirs - e) for e in equally_good) < 1e-6
        theirs = minDCF(positive, negative)[0]
        assert cost == pytest.approx(theirs, abs=1e-6)
        seen.add("equally good" if len(set(equally_good)) > 1 else 0)
        seen.add(
            "tie" if set(positive.tolist()) & set(negative.tolist()) else 0
        )
        seen.add("apart" if positive.min() > negative.max() else 0)
        seen.add("swapped" if positive.max() < negative.min() else 0)
        seen.add(
            "one level"
            if len({*positive.tolist(), *negative.tolist()}) == 1
            else 0
        )
    assert seen == {0, "equally good", "tie", "apart", "swapped", "one level"}


@pytest.mark.parametrize("seed", range(4))
def test_error_rates_of_many_scores(seed):
    torch.manual_seed(seed)
    positive, negative = torch.randn(60) + 1, torch.randn(300)
    if seed % 2:  # ties
        positive, negative = (
            positive.round(decimals=1),
            negative.round(decimals=1),
        )
    errors = DetectionErrors.of(positive, negative)
    expected = EER(positive, negative)[0]
    assert errors.eer() == pytest.approx(expected, abs=1e-6)
    for p_target in (0.01, 0.05):
        expected = minDCF(positive, negative, p_target=p_target)[0]
        assert errors.min_dcf(p_target) == pytest.approx(expected, abs=1e-7)


def test_error_rates_of_what_cannot_be_ordered():
    some = torch.tensor([0.5, 0.7])
    broken = torch.tensor([0.5, math.nan, math.inf])
    with pytest.raises(ValueError, match="2 of 5 scores are not finite"):
        DetectionErrors.of(broken, some)
    with pytest.raises(ValueError, match="2 of 5 scores are not finite"):
        DetectionErrors.of(some, broken)
    with pytest.raises(ValueError, match="2 trials with one speaker and 0"):
        DetectionErrors.of(some, torch.tensor([]))


def test_cllr_is_its_definition():
    torch.manual_seed(0)
    positive, negative = torch.randn(50) + 2, torch.randn(70) - 2
    miss = sum(math.log2(1 + math.exp(-s)) for s in positive.tolist()) / 50
    alarm = sum(math.log2(1 + math.exp(s)) for s in negative.tolist()) / 70
    expected = (miss + alarm) / 2
    assert cllr(positive, negative) == pytest.approx(expected, rel=1e-5)
    # Of overflowing scores too.
    assert cllr(torch.tensor([-2000.0]), torch.tensor([-2000.0])) > 1000


def test_figures_are_those_of_papers():
    torch.manual_seed(0)
    labels = torch.arange(300) % 3 == 0
    scores = torch.randn(300) + 2 * labels
    found = evaluate(scores, labels.int())
    positive, negative = scores[labels], scores[~labels]
    assert found["eer"] == pytest.approx(100 * EER(positive, negative)[0], 1e-3)
    for key, p_target in (("min_dcf", 0.01), ("min_dcf_p05", 0.05)):
        cost = minDCF(positive, negative, p_target=p_target)[0]
        assert found[key] == pytest.approx(cost / p_target, abs=1e-3)
    assert found["cllr"] == pytest.approx(cllr(positive, negative), abs=1e-3)
