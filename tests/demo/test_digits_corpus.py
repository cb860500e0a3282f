"""The demo's corpus of digits, with two training and two test speakers.

Authors
 * The sb_memeff authors 2026
"""

import dataclasses

import numpy as np
import pytest

pytest.importorskip("espeakng_loader", reason="pip install sb_memeff[demo]")
pytest.importorskip("scipy")

import corpus
import soundfile
from digits_corpus import DIGITS
from librispeech_prepare import list_split

SMALL = dataclasses.replace(
    DIGITS,
    train_speakers=2,
    train_sessions=(("train", 2), ("train", 2), ("dev", 1)),
    test_speakers=2,
    test_sessions=(("test", 3),),
)
SIZES = {"train": 8, "dev": 2, "test": 6}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A small corpus: its folder and its numbers."""
    return SMALL.make(tmp_path_factory.mktemp("corpus"), workers=2)


def speakers_of(out, split):
    return {p.name for p in (out / split).iterdir()}


def test_same_options_make_the_same_bytes(made, tmp_path):
    out, found = made
    other, again = SMALL.make(tmp_path, workers=1)
    assert not found["cached"] and found == again
    files = [p for p in out.rglob("*") if p.is_file()]
    # A transcript for each chapter, and the manifest.
    assert len(files) == sum(SIZES.values()) + 2 * 3 + 2 + 1
    for path in files:
        other_path = other / path.relative_to(out)
        assert path.read_bytes() == other_path.read_bytes(), path


def test_the_recipe_takes_the_layout(made):
    out, found = made
    assert found["utterances"] == sum(SIZES.values())
    for split, size in SIZES.items():
        rows = list_split(out, split, None, 16000)
        assert len(rows) == size
        for name, _, place, speaker, _ in rows:
            assert place.endswith(
                f"{split}/{speaker.replace('-', '/')}/{name}.flac"
            )


def test_audio(made):
    out, found = made
    contents, seconds = set(), 0
    for path in out.rglob("*.flac"):
        samples, rate = soundfile.read(path)
        assert rate == 16000 and samples.ndim == 1
        assert 0.01 < np.sqrt(np.mean(samples**2)) and np.abs(samples).max() < 1
        # 3 to 6 digits.
        assert 0.8 < len(samples) / rate < 6
        contents.add(path.read_bytes())
        seconds += len(samples) / rate
    assert len(contents) == sum(SIZES.values())
    assert found["minutes"] == pytest.approx(seconds / 60, abs=0.01)


def test_the_transcript_is_what_was_said(tmp_path, monkeypatch):
    said = []

    class Listener:
        def __init__(self, seed):
            pass

        def say(self, text, *how):
            said.append(text)
            return np.ones(16000)

    monkeypatch.setattr(corpus, "Espeak", Listener)
    for speaker in SMALL.plan():
        said.clear()
        corpus.speak_one((tmp_path, speaker))
        transcripts = "".join(SMALL.lists([speaker]).values())
        heard = [text.replace(",", "").upper() for text in said]
        audio = [
            path.rpartition("/")[2].removesuffix(".flac")
            for path in corpus.audio_files([speaker])
        ]
        assert transcripts.splitlines() == [
            f"{name} {text}" for name, text in zip(audio, heard, strict=True)
        ]


def test_speakers_of_test_are_unseen(made):
    out, _ = made
    assert speakers_of(out, "dev") == speakers_of(out, "train")
    assert not speakers_of(out, "test") & speakers_of(out, "train")


def test_no_text_twice_and_no_voice_twice():
    speakers = DIGITS.plan()
    chapters = [c for s in speakers for c in s.sessions]
    texts = [text for c in chapters for text in c.values()]
    assert len(set(texts)) == len(texts)
    assert {len(text) for text in texts} == {3, 4, 5, 6}
    assert {word for text in texts for word in text} == set(corpus.WORDS)
    variants = [speaker.voice.split("+")[1] for speaker in speakers]
    assert len(set(variants)) == len(variants)
