"""The command sb-memeff on networks with SpeechBrain's rotary positions.

SpeechBrain memoises them for the whole process, so each command must find and
leave real tensors there.
"""

import json

import pytest
import torch
from speechbrain.nnet.attention import _get_precomputed_values

from sb_memeff.cli import main
from tests.unittests.analysis.yaml_files import (
    SMALL_TRANSDUCER,
    upstream_transducer,
)


@pytest.fixture
def rotary(tmp_path):
    """SpeechBrain's conformer transducer, and overrides that make it small."""
    path = upstream_transducer(tmp_path)
    small = {**SMALL_TRANSDUCER, "num_encoder_layers": 1}
    return [str(path), *(f"--{k}={v}" for k, v in small.items())]


@pytest.fixture
def memo():
    """SpeechBrain's memo: empty before, without fake tensors after."""
    memo = _get_precomputed_values.memo
    memo.clear()
    yield memo
    assert all(type(x.sines) is torch.Tensor for _, x in memo.values())


def test_profile_compares_rotary_transducers(rotary, memo, tmp_path, capsys):
    path = tmp_path / "a.json"
    arguments = ["profile", *rotary, "--batch=2", "--seconds=1", "--compare"]
    assert main([*arguments, f"--json={path}"]) == 0
    found = json.loads(path.read_text())
    assert [row["label"] for row in found] == [
        "SpeechBrain's loss",
        "batched",
        "samplewise",
        "tiled",
        "tiled, encoder recomputed",
        "tiled, CNN and encoder recomputed",
        "tiled, CNN and encoder in 8 pieces",
    ]
    assert not memo
    # Alone, or after a real step, they are the same.
    assert main(["check", *rotary, "--batch=2", "--seconds=1"]) == 0
    assert memo
    assert main([*arguments[:-1], f"--json={path}"]) == 0
    (again,) = json.loads(path.read_text())
    peaks = [row["memory"]["peak_bytes"] for row in (again, found[0])]
    assert peaks[0] == pytest.approx(peaks[1], abs=16)


def test_profile_runs_rotary_transducers(rotary, memo, tmp_path, capsys):
    arguments = ["profile", *rotary, "--batch=2", "--seconds=1"]
    path = tmp_path / "a.json"
    arguments += ["--device=cpu", f"--json={path}"]
    peaks = []
    for _ in range(2):
        assert main(arguments) == 0
        (found,) = json.loads(path.read_text())
        peaks.append(found["memory"]["peak_bytes"])
        measured = found["measured_bytes"]
        assert measured == pytest.approx(peaks[-1], rel=0.05)
    # A scalar more or less: the second step finds what the first memoised.
    assert peaks[0] == pytest.approx(peaks[1], abs=16)


def test_fit_of_rotary_transducers(rotary, memo, capsys):
    budget = ["--budget=14MB", "--margin=1MB"]
    assert main(["fit", *rotary, "--seconds=2", *budget]) == 0
    first = capsys.readouterr().out
    assert "--max_batch_len=" in first
    assert not memo
    assert main(["check", *rotary, "--seconds=1"]) == 0
    capsys.readouterr()
    assert main(["fit", *rotary, "--seconds=2", *budget]) == 0
    assert capsys.readouterr().out == first
