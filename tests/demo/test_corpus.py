"""The demo's corpora: made once, found again, nothing else deleted.

Authors
 * The sb_memeff authors 2026
"""

import dataclasses
import itertools

import pytest

pytest.importorskip("espeakng_loader", reason="pip install sb_memeff[demo]")
pytest.importorskip("scipy")

import corpus
import numpy as np
from voices import CorpusError


class Noise:
    """Says seconds of noise instead of words, in the place of eSpeak NG."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)

    def say(self, text, *_):
        return self.rng.standard_normal(4000)


TINY = corpus.Corpus(
    name="tiny",
    audio="{split}/{speaker}/{utterance}.wav",
    lists=lambda speakers: {"speakers.txt": str(len(speakers))},
    digits=(1, 1),
    train_speakers=1,
    train_sessions=(("train", 2),),
    test_speakers=1,
    test_sessions=(("test", 1),),
    seed=0,
)


def speak_here(folder, speakers, workers):
    """speak_all, without other processes."""
    assert not list(folder.iterdir())
    return sum(corpus.speak_one((folder, one)) for one in speakers)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No eSpeak NG and no processes."""
    monkeypatch.setattr(corpus, "Espeak", Noise)
    monkeypatch.setattr(corpus, "speak_all", speak_here)


def test_made_once_and_found_again(tmp_path):
    folder, first = TINY.make(tmp_path)
    assert not first.pop("cached")
    again, second = TINY.make(tmp_path)
    assert again == folder and second.pop("cached")
    assert first == second
    assert first["train_speakers"] == first["test_speakers"] == 1
    assert first["utterances"] == 3
    assert (folder / "speakers.txt").read_text() == "2"
    assert {p.name for p in folder.rglob("*.wav")} == {"0.wav", "1.wav"}


@pytest.mark.parametrize("change", [{"seed": 1}, {"digits": (2, 2)}, "format"])
def test_another_corpus_gets_another_folder(tmp_path, monkeypatch, change):
    folder, _ = TINY.make(tmp_path)
    other = TINY
    if change == "format":
        monkeypatch.setattr(corpus, "FORMAT", corpus.FORMAT + 1)
    else:
        other = dataclasses.replace(TINY, **change)
    made, found = other.make(tmp_path)
    assert made != folder and not found["cached"]
    for tiny in (folder, made):
        assert (tiny / "test/201/0.wav").exists()
    assert (folder / "test/201/0.wav").read_bytes() != (
        made / "test/201/0.wav"
    ).read_bytes()


@pytest.mark.parametrize("lost", ["train/101/0.wav", "speakers.txt"])
def test_lost_file_makes_it_anew(tmp_path, lost):
    folder, _ = TINY.make(tmp_path)
    (folder / lost).unlink()
    _, found = TINY.make(tmp_path)
    assert not found["cached"]
    assert (folder / lost).exists()


def test_interrupted_run_leaves_no_corpus(tmp_path, monkeypatch):
    def crash(folder, *_):
        (folder / "half.wav").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(corpus, "speak_all", crash)
    with pytest.raises(KeyboardInterrupt):
        TINY.make(tmp_path)
    monkeypatch.setattr(corpus, "speak_all", speak_here)
    folder, found = TINY.make(tmp_path)
    assert not found["cached"]
    assert list(tmp_path.iterdir()) == [folder]
    assert not (folder / "half.wav").exists()


def test_what_else_is_in_the_folder_stays(tmp_path):
    thesis = tmp_path / "thesis.tex"
    thesis.write_text("all of it")
    TINY.make(tmp_path)
    assert thesis.read_text() == "all of it"


def test_too_many_speakers_are_an_error_before_anything_is_written(tmp_path):
    many = dataclasses.replace(TINY, test_speakers=17)
    with pytest.raises(CorpusError, match="are 16 voices, not 17"):
        many.make(tmp_path)
    assert not list(tmp_path.iterdir())


def test_distinct_leaves_out_what_was_drawn():
    letters = itertools.cycle("abbac")
    texts = corpus.distinct(lambda: next(letters))
    assert [next(texts) for _ in range(3)] == ["a", "b", "c"]


def test_no_text_is_given_to_two_speakers():
    all_digits = dataclasses.replace(TINY, train_sessions=(("train", 9),))
    texts = [
        text
        for speaker in all_digits.plan()
        for session in speaker.sessions
        for text in session.values()
    ]
    assert sorted(texts) == sorted((word,) for word in corpus.WORDS)


def test_a_line_about_the_corpus():
    found = {
        "train_speakers": 30,
        "test_speakers": 16,
        "utterances": 1088,
        "minutes": 40.4,
        "cached": False,
    }
    line = "30 training and 16 unseen test speakers, 1088 utterances, 40 min"
    assert corpus.describe(found) == line
    assert corpus.describe({**found, "cached": True}) == f"{line}, cached"
