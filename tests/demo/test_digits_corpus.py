"""The demo's corpus of digits, with two training and two test speakers.

Authors
 * The sb_memeff authors 2026
"""

import numpy as np
import pytest

pytest.importorskip("espeakng_loader", reason="pip install sb_memeff[demo]")
pytest.importorskip("scipy")

import corpus
import soundfile
from digits_corpus import WORDS, Digits
from librispeech_prepare import list_split

SMALL = Digits(
    train_speakers=2,
    train_chapters=2,
    train_utterances=2,
    dev_utterances=1,
    test_speakers=2,
    test_chapters=1,
    test_utterances=3,
)
SIZES = {"train": 8, "dev": 2, "test": 6}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A small corpus: its folder and its manifest."""
    out = tmp_path_factory.mktemp("corpus") / "digits"
    return out, SMALL.make(out, workers=2, progress=False)


def speakers_of(out, split):
    return {p.name for p in (out / split).iterdir()}


def test_same_options_make_the_same_bytes(made, tmp_path):
    out, manifest = made
    again = SMALL.make(tmp_path / "again", workers=1, progress=False)
    assert not manifest["cached"] and not again["cached"]
    assert manifest == again
    files = [p for p in out.rglob("*") if p.is_file()]
    assert len(files) == sum(SIZES.values()) + manifest["chapters"] + 1
    for path in files:
        other = tmp_path / "again" / path.relative_to(out)
        assert path.read_bytes() == other.read_bytes(), path


def test_another_seed_makes_other_audio(made, tmp_path):
    one = Digits(1, 1, 1, 1, 1, 1, 1)
    other = Digits(1, 1, 1, 1, 1, 1, 1, seed=1)
    digests = {
        o.make(tmp_path, workers=1, progress=False)["audio_sha256"]
        for o in (one, other)
    }
    assert len(digests) == 2


def test_found_again_unless_a_file_is_lost(made, tmp_path):
    out, manifest = made
    assert SMALL.make(out, progress=False)["cached"]
    one = Digits(1, 1, 1, 1, 1, 1, 1)
    one.make(tmp_path, workers=1, progress=False)
    for ending in ("dev/*/*/*.flac", "test/*/*/*.trans.txt"):
        next(tmp_path.glob(ending)).unlink()
        again = one.make(tmp_path, workers=1, progress=False)
        assert not again["cached"]
    assert one.make(tmp_path, progress=False)["cached"]


def test_the_recipe_takes_the_layout(made):
    out, manifest = made
    assert manifest["utterances"] == SIZES
    for split, size in SIZES.items():
        rows = list_split(out, split, None, 16000)
        assert len(rows) == size
        for name, _, place, speaker, _ in rows:
            assert place.endswith(
                f"{split}/{speaker.replace('-', '/')}/{name}.flac"
            )


def test_audio(made):
    out, manifest = made
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
    assert manifest["minutes"] == pytest.approx(seconds / 60, abs=0.01)


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
        corpus.speak_one((SMALL, tmp_path, speaker))
        transcripts = "".join(SMALL.lists([speaker]).values())
        heard = [text.replace(",", "").upper() for text in said]
        audio = sorted(p.stem for p in tmp_path.rglob(f"{speaker.name}-*.flac"))
        assert transcripts.splitlines() == [
            f"{name} {text}" for name, text in zip(audio, heard, strict=True)
        ]


def test_voices_of_test_are_unseen(made):
    out, manifest = made
    assert speakers_of(out, "dev") == speakers_of(out, "train")
    assert not speakers_of(out, "test") & speakers_of(out, "train")
    everyone = speakers_of(out, "train") | speakers_of(out, "test")
    assert set(manifest["voices"]) == everyone
    voices = manifest["voices"].values()
    assert len({voice.split("+")[1] for voice in voices}) == len(everyone)


def test_no_text_twice_and_no_voice_twice():
    speakers = Digits().plan()
    chapters = [c for s in speakers for c in s.sessions]
    texts = [text for c in chapters for text in c.values()]
    assert len(set(texts)) == len(texts)
    assert {len(text) for text in texts} == {3, 4, 5, 6}
    assert {word for text in texts for word in text} == set(WORDS)
    variants = [speaker.voice.split("+")[1] for speaker in speakers]
    assert len(set(variants)) == len(variants)


def test_a_line_about_the_corpus(made):
    out, manifest = made
    assert SMALL.describe({**manifest, "minutes": 40.4}) == (
        "2 training and 2 unseen test speakers, 8 + 2 + 6 utterances "
        "(train, dev, test), 40 min"
    )
    assert SMALL.describe({**manifest, "cached": True}).endswith(", cached")
