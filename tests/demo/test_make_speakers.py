"""The demo's corpus of speakers, with two training and two test speakers.

Authors
 * The sb_memeff authors 2026
"""

import json
import sys

import numpy as np
import pytest

pytest.importorskip("espeakng_loader", reason="pip install sb_memeff[demo]")
pytest.importorskip("scipy")

import make_speakers as corpus
import soundfile
from voices import CorpusError

SMALL = corpus.Options(
    train_speakers=2,
    train_sessions=2,
    train_utterances=1,
    test_speakers=2,
    test_sessions=2,
    test_utterances=2,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A small corpus: its folder and its manifest."""
    out = tmp_path_factory.mktemp("corpus") / "voices"
    return out, corpus.make_speakers(out, SMALL, workers=2, progress=False)


def read_trials(out):
    lines = (out / "veri_test.txt").read_text().splitlines()
    return [line.split() for line in lines]


def test_same_options_make_the_same_bytes(made, tmp_path):
    out, manifest = made
    again = corpus.make_speakers(
        tmp_path / "again", SMALL, workers=1, progress=False
    )
    assert not manifest["cached"] and not again["cached"]
    assert manifest == again
    for path in out.rglob("*.*"):
        other = tmp_path / "again" / path.relative_to(out)
        assert path.read_bytes() == other.read_bytes(), path


def test_second_run_takes_the_first_ones_files(made):
    out, manifest = made
    stamps = {p: p.stat().st_mtime_ns for p in out.rglob("*.wav")}
    again = corpus.make_speakers(out, SMALL, progress=False)
    assert again["cached"]
    assert again["audio_sha256"] == manifest["audio_sha256"]
    assert stamps == {p: p.stat().st_mtime_ns for p in out.rglob("*.wav")}


def test_other_options_or_a_lost_file_make_it_anew(made, tmp_path):
    one = corpus.Options(1, 1, 1, 1, 1, 1)
    out = tmp_path / "voices"
    first = corpus.make_speakers(out, one, workers=1, progress=False)
    seeded = corpus.Options(1, 1, 1, 1, 1, 1, seed=1)
    other = corpus.make_speakers(out, seeded, workers=1, progress=False)
    assert not other["cached"]
    assert other["audio_sha256"] != first["audio_sha256"]
    next(out.rglob("*.wav")).unlink()
    repaired = corpus.make_speakers(out, seeded, workers=1, progress=False)
    assert not repaired["cached"]
    assert repaired["audio_sha256"] == other["audio_sha256"]


def test_layout_and_audio(made):
    out, manifest = made
    files = sorted(out.glob("wav/*/*/*.wav"))
    assert len(files) == manifest["utterances"] == 2 * 2 + 2 * 2 * 2
    contents = set()
    for path in files:
        samples, rate = soundfile.read(path)
        assert rate == 16000 and samples.ndim == 1
        assert 3 <= len(samples) / rate <= 4
        assert 0.01 < np.sqrt(np.mean(samples**2)) and np.abs(samples).max() < 1
        contents.add(path.read_bytes())
    assert len(contents) == len(files)


def test_trials_are_of_unseen_speakers_and_two_sessions(made):
    out, manifest = made
    trials = read_trials(out)
    assert len(trials) == manifest["trials"]
    test_speakers = set()
    for label, a, b in trials:
        assert (out / "wav" / a).exists() and (out / "wav" / b).exists()
        assert (label == "1") == (a.split("/")[0] == b.split("/")[0])
        assert a.rsplit("/", 1)[0] != b.rsplit("/", 1)[0]
        test_speakers |= {a.split("/")[0], b.split("/")[0]}
    assert len(test_speakers) == SMALL.test_speakers
    everyone = {p.name for p in (out / "wav").iterdir()}
    assert len(everyone - test_speakers) == SMALL.train_speakers


def test_no_text_twice_and_no_voice_twice():
    train, test = corpus.plan_speakers(corpus.Options())
    texts = [
        sentence
        for speaker in train + test
        for session in speaker.texts
        for pair in session
        for sentence in pair
    ]
    assert len(set(texts)) == len(texts)
    variants = [speaker.voice.split("+")[1] for speaker in train + test]
    assert len(set(variants)) == len(variants)


def test_missing_library_is_said_in_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    assert corpus.main([str(tmp_path / "out")]) == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "pip install 'sb_memeff[demo]'" in message
    assert not (tmp_path / "out").exists()


def test_options_out_of_range():
    with pytest.raises(CorpusError, match="train_speakers must lie in"):
        corpus.Options(train_speakers=1000)


def test_manifest_names_every_voice(made):
    out, manifest = made
    stored = json.loads((out / "manifest.json").read_text())
    assert stored.items() <= manifest.items()
    speakers = {p.name for p in (out / "wav").iterdir()}
    assert set(stored["voices"]) == speakers
