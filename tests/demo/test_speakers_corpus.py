"""The demo's corpus of speakers, with two training and two test speakers.

Authors
 * The sb_memeff authors 2026
"""

import json

import numpy as np
import pytest

pytest.importorskip("espeakng_loader", reason="pip install sb_memeff[demo]")
pytest.importorskip("scipy")

import soundfile
from speakers_corpus import Speakers

SMALL = Speakers(
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
    return out, SMALL.make(out, workers=2, progress=False)


def read_trials(out):
    lines = (out / "veri_test.txt").read_text().splitlines()
    return [line.split() for line in lines]


def test_same_options_make_the_same_bytes(made, tmp_path):
    out, manifest = made
    again = SMALL.make(tmp_path / "again", workers=1, progress=False)
    assert not manifest["cached"] and not again["cached"]
    assert manifest == again
    for path in out.rglob("*.*"):
        other = tmp_path / "again" / path.relative_to(out)
        assert path.read_bytes() == other.read_bytes(), path


def test_second_run_takes_the_first_ones_files(made):
    out, manifest = made
    stamps = {p: p.stat().st_mtime_ns for p in out.rglob("*.wav")}
    again = SMALL.make(out, progress=False)
    assert again["cached"]
    assert again["audio_sha256"] == manifest["audio_sha256"]
    assert stamps == {p: p.stat().st_mtime_ns for p in out.rglob("*.wav")}


def test_other_options_or_a_lost_file_make_it_anew(made, tmp_path):
    one = Speakers(1, 1, 1, 1, 1, 1)
    out = tmp_path / "voices"
    first = one.make(out, workers=1, progress=False)
    seeded = Speakers(1, 1, 1, 1, 1, 1, seed=1)
    other = seeded.make(out, workers=1, progress=False)
    assert not other["cached"]
    assert other["audio_sha256"] != first["audio_sha256"]
    next(out.rglob("*.wav")).unlink()
    repaired = seeded.make(out, workers=1, progress=False)
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
    speakers = Speakers().plan()
    texts = [
        sentence
        for speaker in speakers
        for session in speaker.sessions
        for pair in session.values()
        for sentence in pair
    ]
    assert len(set(texts)) == len(texts)
    variants = [speaker.voice.split("+")[1] for speaker in speakers]
    assert len(set(variants)) == len(variants)


def test_a_line_about_the_corpus(made):
    out, manifest = made
    assert SMALL.describe(manifest).startswith(
        "2 training and 2 unseen test speakers, 12 utterances, "
        "24 trials (8 target), "
    )


def test_manifest_names_every_voice(made):
    out, manifest = made
    stored = json.loads((out / "manifest.json").read_text())
    assert stored.items() <= manifest.items()
    speakers = {p.name for p in (out / "wav").iterdir()}
    assert set(stored["voices"]) == speakers
