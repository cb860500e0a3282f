"""The verification script of the VoxCeleb recipe.

Authors
 * The sb_memeff authors 2026
"""

import csv
import doctest
import itertools
import json
import math
from fractions import Fraction
from pathlib import Path

import pytest
import soundfile
import speaker_verification_cosine as verification
import torch
from speechbrain.lobes.features import Fbank
from speechbrain.processing.features import InputNormalization
from speechbrain.utils.metric_stats import EER, minDCF
from torch import nn

from sb_memeff.lobes.models.WeSpeakerResNet import ResNet
from tests.unittests.weights import without_zeros

FOLDER = (
    Path(__file__).parents[3] / "recipes" / "VoxCeleb" / "SpeakerRec_memeff"
)


RATE = 16000
SECONDS = [1.0, 0.71, 0.93, 0.52]
MELS = 24


class WithDropout(nn.Module):
    """Batch norm and dropout: both differ between the modes."""

    def __init__(self):
        super().__init__()
        net = ResNet.from_preset("ResNet34", base_channels=2, input_size=MELS)
        self.net = without_zeros(net)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x, lengths):
        return self.net(self.dropout(x), lengths)


@pytest.fixture
def place(tmp_path):
    """Four utterances of noise of two colours, and lists of them."""
    torch.manual_seed(0)
    rows = []
    for number, seconds in enumerate(SECONDS):
        path = tmp_path / f"{number}.wav"
        wav = 0.1 * torch.randn(int(seconds * RATE))
        wav[::2] *= 1 + number
        soundfile.write(path, wav.numpy(), RATE)
        rows.append([f"u{number}", seconds, str(path), 0, len(wav), number % 2])
    for name, part in (
        ("enrol", rows[:2]),
        ("test", rows[2:]),
        ("train", rows),
    ):
        with open(tmp_path / f"{name}.csv", "w", newline="") as f:
            writer = csv.writer(f)
            writer.writerow(
                ["ID", "duration", "wav", "start", "stop", "spk_id"]
            )
            writer.writerows(part)
    return tmp_path


def params_of(place, **changes):
    """A loaded yaml file; the modules come as they were left by a training."""
    torch.manual_seed(1)
    params = {
        "data_folder": str(place),
        "enrol_data": str(place / "enrol.csv"),
        "test_data": str(place / "test.csv"),
        "train_data": str(place / "train.csv"),
        "output_folder": str(place),
        "verification_file": "list.txt",
        "batch_size": 1,
        "num_workers": 0,
        "score_norm": None,
        "n_train_snts": 3,
        "cohort_size": 2,
        "seed": 5,
        "compute_features": Fbank(n_mels=MELS, sample_rate=RATE),
        "mean_var_norm": InputNormalization(
            norm_type="sentence", std_norm=False
        ),
        "embedding_model": WithDropout(),
        **changes,
    }
    for _ in range(3):  # running statistics that matter
        params["embedding_model"](torch.randn(8, 60, MELS), torch.ones(8))
    return params


TRIALS = [
    (int((a + b) % 2 == 0), f"u{a}", f"u{b}")
    for a, b in itertools.combinations(range(4), 2)
]


def embedding(params, place, number):
    """By hand: one utterance alone, in eval mode."""
    wav, _ = soundfile.read(place / f"{number}.wav", dtype="float32")
    with torch.no_grad():
        feats = params["compute_features"](torch.from_numpy(wav)[None])
        feats = params["mean_var_norm"](feats, torch.ones(1))
        return params["embedding_model"](feats, torch.ones(1))[0]


def scores_of(params):
    """Runs verify; the scores that it writes."""
    verification.verify(params, TRIALS, None, "cpu")
    lines = (Path(params["output_folder"]) / "scores.txt").read_text()
    found = [line.split() for line in lines.splitlines()]
    assert [(int(n), a, b) for a, b, n, _ in found] == TRIALS
    return torch.tensor([float(score) for *_, score in found])


def expected_scores(params, place):
    for key in ("compute_features", "mean_var_norm", "embedding_model"):
        params[key].eval()
    by_hand = [embedding(params, place, n) for n in range(4)]
    return torch.stack(
        [
            torch.cosine_similarity(by_hand[int(a[1])], by_hand[int(b[1])], 0)
            for _, a, b in TRIALS
        ]
    )


def test_scores_are_those_of_the_network_in_eval_mode(place):
    params = params_of(place)
    assert params["embedding_model"].training
    scores = scores_of(params)
    expected = expected_scores(params, place)
    torch.testing.assert_close(scores, expected, rtol=0, atol=2e-6)
    assert scores.std() > 0.01


@pytest.mark.parametrize(
    "key", ["compute_features", "mean_var_norm", "embedding_model"]
)
@pytest.mark.parametrize("score_norm", [None, "s-norm"])
def test_every_module_is_in_eval_mode(place, key, score_norm):
    params = params_of(place, score_norm=score_norm)
    params[key].train()
    modes = []
    params[key].register_forward_pre_hook(
        lambda module, args: modes.append(
            [m.training for m in module.modules()]
        )
    )
    scores_of(params)
    assert len(modes) == (4 if score_norm is None else 7)
    assert not any(itertools.chain(*modes))


def test_verification_does_not_change_statistics(place):
    params = params_of(place)
    before = {
        key: value.clone()
        for key, value in params["embedding_model"].state_dict().items()
    }
    scores_of(params)
    for key, value in params["embedding_model"].state_dict().items():
        assert torch.equal(value, before[key]), key


def test_lengths_are_respected(place):
    """In a batch an utterance is padded; a frame at its end may differ."""
    alone = scores_of(params_of(place))
    together = scores_of(params_of(place, batch_size=4))
    torch.testing.assert_close(together, alone, rtol=0, atol=0.03)


def test_results(place):
    weights = place / "embedding_model.ckpt"
    trained = params_of(place)
    torch.save(trained["embedding_model"].state_dict(), weights)
    params = params_of(place)
    without_zeros(params["embedding_model"].apply(_zero))
    results = verification.verify(params, TRIALS, weights, "cpu")
    expected = expected_scores(trained, place)
    labels = torch.tensor([label for label, _, _ in TRIALS])
    eer, cost, _ = brute_force(expected[labels == 1], expected[labels == 0])
    assert results["eer"] == pytest.approx(100 * eer, abs=1e-3)
    assert results["min_dcf"] == pytest.approx(cost / 0.01, abs=1e-3)
    assert results["trials"] == 6 and results["utterances"] == 4
    assert results["model"] == str(weights)
    assert json.loads((place / "results.json").read_text()) == results


def _zero(module):
    for parameter in module.parameters(recurse=False):
        nn.init.zeros_(parameter)


def test_a_diverged_network_gives_no_rates(place):
    params = params_of(place)
    nn.init.constant_(params["embedding_model"].net.conv1.weight, math.nan)
    with pytest.raises(ValueError, match="6 of 6 scores are not finite"):
        verification.verify(params, TRIALS, None, "cpu")


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
        found = verification.error_rates(positive, negative)
        eer, cost, equally_good = brute_force(positive, negative)
        assert found == pytest.approx((eer, cost), abs=1e-9)
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
    eer, min_dcf = verification.error_rates(positive, negative)
    assert eer == pytest.approx(EER(positive, negative)[0], abs=1e-6)
    assert min_dcf == pytest.approx(minDCF(positive, negative)[0], abs=1e-7)


def test_error_rates_of_what_cannot_be_ordered():
    some = torch.tensor([0.5, 0.7])
    broken = torch.tensor([0.5, math.nan, math.inf])
    with pytest.raises(ValueError, match="2 of 5 scores are not finite"):
        verification.error_rates(broken, some)
    with pytest.raises(ValueError, match="2 of 5 scores are not finite"):
        verification.error_rates(some, broken)
    with pytest.raises(ValueError, match="2 trials with one speaker and 0"):
        verification.error_rates(some, torch.tensor([]))


def test_weights_of_another_network(tmp_path):
    path = tmp_path / "embedding_model.ckpt"
    torch.save(torch.nn.Linear(2, 3).state_dict(), path)
    assert verification.find_weights(tmp_path) == path
    verification.load_weights(torch.nn.Linear(2, 3), path)
    with pytest.raises(ValueError, match="does not fit the network"):
        verification.load_weights(torch.nn.Linear(2, 4), path)


def test_score_norm_is_that_of_a_loop():
    torch.manual_seed(0)
    normalize = torch.nn.functional.normalize
    embeddings = normalize(torch.randn(6, 8), dim=1)
    cohort = normalize(torch.randn(20, 8), dim=1)
    enrol, test = torch.tensor([0, 1, 2]), torch.tensor([3, 4, 5])
    statistics = verification.cohort_statistics(embeddings, cohort, 7)
    cosine = torch.nn.CosineSimilarity(dim=-1)
    for norm in (None, *verification.SCORE_NORMS):
        scores = verification.score_trials(
            embeddings, enrol, test, norm, statistics
        )
        for n in range(3):
            a, b = embeddings[enrol[n]], embeddings[test[n]]
            score = cosine(a, b)
            parts = {}
            for key, x in (("z", a), ("t", b)):
                best = cosine(x[None], cohort).sort().values[-7:]
                parts[key] = (score - best.mean()) / best.std()
            expected = {
                None: score,
                "z-norm": parts["z"],
                "t-norm": parts["t"],
                "s-norm": (parts["z"] + parts["t"]) / 2,
            }[norm]
            assert scores[n] == pytest.approx(expected.item(), rel=1e-4)


def test_examples():
    """The recipe's files lie outside what pytest collects doctests from."""
    result = doctest.testmod(verification, optionflags=doctest.ELLIPSIS)
    assert result.attempted and not result.failed
