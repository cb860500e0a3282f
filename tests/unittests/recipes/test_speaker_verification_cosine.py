"""The verification script of the VoxCeleb recipe.

Authors
 * The sb_memeff authors 2026
"""

import csv
import functools
import itertools
import json
import math
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
from tests.unittests.two_processes import run_in_two_processes
from tests.unittests.weights import without_zeros

FOLDER = (
    Path(__file__).parents[3] / "recipes" / "VoxCeleb" / "SpeakerRec_memeff"
)


RATE = 16000
SECONDS = [1.0, 0.71, 0.93, 0.52]
# Of six training utterances of three speakers.
TRAINING = [0.5, 0.75, 0.6, 0.55, 0.8, 0.65]
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
    """Utterances of noise of some colours, and lists of them."""
    torch.manual_seed(0)
    rows, segments = [], []
    for number, seconds in enumerate(SECONDS + TRAINING):
        path = tmp_path / f"{number}.wav"
        wav = 0.1 * torch.randn(int(seconds * RATE))
        wav[::2] *= 1 + number % 4
        soundfile.write(path, wav.numpy(), RATE)
        rows.append([f"u{number}", seconds, str(path), 0, len(wav), number % 2])
        half = RATE // 4
        for start in (0, half):
            segments.append(
                [
                    f"{number}_{start}",
                    seconds,
                    str(path),
                    start,
                    start + half,
                    f"train{number % 3}",
                ]
            )
    for name, part in (
        ("enrol", rows[:2]),
        ("test", rows[2:4]),
        ("train", segments[8:]),
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
        "embeddings_folder": str(place / "embeddings"),
        "sample_rate": RATE,
        "score_norm": None,
        "n_train_snts": None,
        "cohort_size": 2,
        "calibration_trials": 0,
        "det_curve": None,
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


def verify(params, weights=None):
    """Runs verify with the training utterances that the yaml file asks for."""
    training = []
    if params["score_norm"] is not None:
        training = verification.training_utterances(params, tested=set())
    return verification.verify(params, TRIALS, weights, training, "cpu")


def scores_of(params):
    """Runs verify; the scores that it writes."""
    verify(params)
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
    assert len(modes) == (4 if score_norm is None else 10)
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
    results = verify(params, weights)
    expected = expected_scores(trained, place)
    labels = torch.tensor([label for label, _, _ in TRIALS])
    scores = expected[labels == 1], expected[labels == 0]
    eer, cost = EER(*scores)[0], minDCF(*scores)[0]
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
        verify(params)


def test_weights_of_another_network(tmp_path):
    path = tmp_path / "embedding_model.ckpt"
    torch.save(torch.nn.Linear(2, 3).state_dict(), path)
    assert verification.find_weights(tmp_path) == path
    verification.load_weights(torch.nn.Linear(2, 3), path)
    with pytest.raises(ValueError, match="does not fit the network"):
        verification.load_weights(torch.nn.Linear(2, 4), path)


def test_whole_training_utterances(place):
    found = verification.training_utterances(params_of(place), tested={"x"})
    assert [row["start"] for row in found] == ["0"] * 6
    lengths = sorted(int(row["stop"]) for row in found)
    assert lengths == sorted(int(s * RATE) for s in TRAINING)
    some = params_of(place, n_train_snts=4)
    found = verification.training_utterances(some, tested=set())
    assert len(found) == 4


def test_every_utterance_is_embedded_once(place):
    """Also by a run with another list, and not with other weights."""
    computed = []

    def embedded(params):
        params["compute_features"].register_forward_hook(
            lambda *_: computed.append(1)
        )
        scores = scores_of(params)
        count = len(computed)
        computed.clear()
        return scores, count

    first, count = embedded(params_of(place))
    assert count == 4
    second, count = embedded(params_of(place))
    assert count == 0 and torch.equal(second, first)
    _, count = embedded(params_of(place, score_norm="s-norm"))
    assert count == 6
    other = params_of(place)
    nn.init.ones_(other["embedding_model"].net.bn1.weight)
    with torch.no_grad():
        other["embedding_model"].net.bn1.weight *= 2
    assert embedded(other)[1] == 4


def test_normalized_and_calibrated(place):
    """By hand: AS-Norm with the speakers' means of whole utterances."""
    pytest.importorskip("sklearn")
    params = params_of(
        place,
        score_norm="s-norm",
        calibration_trials=200,
        det_curve=str(place / "det.png"),
    )
    results = verify(params)
    assert (place / "det.png").is_file()
    normalize = nn.functional.normalize
    rows = normalize(
        torch.stack([embedding(params, place, n) for n in range(10)]), dim=1
    )
    # Utterance 4 is of train1, 5 of train2, 6 of train0.
    means = [rows[[n, n + 3]].mean(0) for n in (4, 5, 6)]
    cohort = normalize(torch.stack(means), dim=1)
    expected = []
    for _, *pair in TRIALS:
        a, b = (rows[int(name[1])] for name in pair)
        best = [(cohort @ x).sort().values[-2:] for x in (a, b)]
        expected.append(
            sum(float((a @ b - x.mean()) / x.std()) for x in best) / 2
        )
    labels = torch.tensor([label for label, _, _ in TRIALS])
    assert list(results["stages"]) == ["cosine", "s-norm", "qmf"]
    figures = verification.evaluate(torch.tensor(expected), labels)
    for key, value in results["stages"]["s-norm"].items():
        assert value == pytest.approx(figures[key], rel=1e-2, abs=1e-2), key
    last = results["stages"]["qmf"]
    assert {key: results[key] for key in last} == last
    assert last["cllr"] != results["stages"]["s-norm"]["cllr"]


def verify_in_one_of_two(folder, rank):
    """The results, and the number of utterances that this process embedded."""
    params = params_of(
        Path(folder), score_norm="s-norm", n_train_snts=5, batch_size=2
    )
    computed = []
    params["compute_features"].register_forward_hook(
        lambda module, wavs, feats: computed.append(len(feats))
    )
    return verify(params), sum(computed)


def test_two_processes(place, tmp_path_factory):
    """The figures of one, with the padding of its batches; written once."""
    (results, first), (nothing, second) = run_in_two_processes(
        functools.partial(verify_in_one_of_two, str(place)),
        tmp_path_factory.mktemp("two"),
    )
    # Two of the trials' four, and two and three of the cohort's five.
    assert nothing is None and sorted((first, second)) == [4, 5]
    assert json.loads((place / "results.json").read_text()) == results
    alone = verify(
        params_of(
            place,
            score_norm="s-norm",
            n_train_snts=5,
            batch_size=2,
            embeddings_folder=str(place / "alone"),
        )
    )
    stages, expected = results.pop("stages"), alone.pop("stages")
    assert results == alone and stages.keys() == expected.keys()
    for stage, figures in stages.items():
        # Scores of a network like this one, normalised, magnify rounding.
        assert figures == pytest.approx(expected[stage], rel=1e-2)


@pytest.mark.parametrize(
    ("changes", "tested"),
    [
        ({"cohort_size": 1}, set()),
        ({"n_train_snts": 1}, set()),
        ({}, {"train0"}),
    ],
)
def test_a_cohort_that_is_too_small(place, changes, tested):
    params = params_of(place, **changes)
    with pytest.raises(ValueError, match="a cohort of three speakers and"):
        verification.training_utterances(params, tested)


def test_csv_files_of_another_list():
    with pytest.raises(ValueError, match="lack no.wav of the list of trials"):
        verification.rows_of({"u0": {}}, ["u0.wav", "no.wav"])
