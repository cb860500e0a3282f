"""The demo's corpus of speakers, with two training and two test speakers.

Authors
 * The sb_memeff authors 2026
"""

import dataclasses

import numpy as np
import pytest

pytest.importorskip("espeakng_loader", reason="pip install sb_memeff[demo]")
pytest.importorskip("scipy")

import soundfile
from speakers_corpus import SPEAKERS

SMALL = dataclasses.replace(
    SPEAKERS,
    train_speakers=2,
    train_sessions=(("train", 1),) * 2,
    test_speakers=2,
    test_sessions=(("test", 2),) * 2,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A small corpus: its folder and its numbers."""
    return SMALL.make(tmp_path_factory.mktemp("corpus"), workers=2)


def test_layout_and_audio(made):
    out, found = made
    files = sorted(out.glob("wav/*/*/*.wav"))
    assert len(files) == found["utterances"] == 2 * 2 + 2 * 2 * 2
    contents = set()
    for path in files:
        samples, rate = soundfile.read(path)
        assert rate == 16000 and samples.ndim == 1
        assert 2 <= len(samples) / rate <= 6
        assert 0.01 < np.sqrt(np.mean(samples**2)) and np.abs(samples).max() < 1
        contents.add(path.read_bytes())
    assert len(contents) == len(files)


def test_trials_are_of_unseen_speakers_and_two_sessions(made):
    out, _ = made
    lines = (out / "veri_test.txt").read_text().splitlines()
    trials = [line.split() for line in lines]
    # 8 utterances of 4 sessions, without pairs of one session.
    assert len({frozenset(pair) for _, *pair in trials}) == len(trials) == 24
    assert [label for label, _, _ in trials].count("1") == 8
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
    speakers = SPEAKERS.plan()
    texts = [
        text
        for speaker in speakers
        for session in speaker.sessions
        for text in session.values()
    ]
    assert len(set(texts)) == len(texts)
    variants = [speaker.voice.split("+")[1] for speaker in speakers]
    assert len(set(variants)) == len(variants)
