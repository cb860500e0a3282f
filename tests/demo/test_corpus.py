"""The demo's corpora: made once, found again, nothing else deleted.

Authors
 * The sb_memeff authors 2026
"""

import dataclasses
import itertools
import json

import pytest

pytest.importorskip("espeakng_loader", reason="pip install sb_memeff[demo]")
pytest.importorskip("scipy")

import corpus
import numpy as np
from voices import CorpusError


class Silent:
    """Says seconds of noise instead of words, in the place of eSpeak NG."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)

    def say(self, text, *_):
        return self.rng.standard_normal(16000 * len(text))


@dataclasses.dataclass(frozen=True)
class Letters(corpus.Corpus):
    """A letter for each speaker, who takes a second for it."""

    FORMAT = 1
    SPEAKER = "s{}"
    AUDIO = "{split}/{speaker}/{utterance}.wav"
    FIRST_SESSION = 0
    WORDS_PER_MINUTE = (100, 200)

    speakers: int = 1
    seed: int = 0

    def groups(self):
        return [(["a", "b", "c"], 1, self.speakers, [("all", 1)])]

    def draw_text(self, rng):
        return ("abc"[rng.integers(3)],)

    def speak(self, rng, say, pitch, text):
        return say(text[0], pitch)

    def lists(self, speakers):
        return {"letters.txt": str(len(speakers))}

    def counts(self, speakers):
        return {"letters": len(speakers)}


@dataclasses.dataclass(frozen=True)
class NewFormat(Letters):
    """The same, written by changed code."""

    FORMAT = 2


def speak_here(made, folder, speakers, workers, progress):
    """speak_all, without other processes."""
    assert not list(folder.iterdir())
    return sum(corpus.speak_one((made, folder, one)) for one in speakers)


def crash(made, folder, *_):
    (folder / "half.wav").touch()
    raise KeyboardInterrupt


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No eSpeak NG and no processes."""
    monkeypatch.setattr(corpus, "Espeak", Silent)
    monkeypatch.setattr(corpus, "speak_all", speak_here)


def make(out, options=Letters()):
    return options.make(out)["cached"]


def test_made_once_and_found_again(tmp_path):
    out = tmp_path / "corpus"
    assert not make(out)
    assert make(out)
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["options"] == {"speakers": 1, "seed": 0}
    assert manifest["letters"] == 1


@pytest.mark.parametrize("options", [Letters(seed=1), NewFormat()])
def test_other_options_or_another_format_make_it_anew(tmp_path, options):
    make(tmp_path)
    assert not make(tmp_path, options)
    assert make(tmp_path, options)


@pytest.mark.parametrize("lost", ["all/s1/0.wav", "letters.txt"])
def test_lost_file_makes_it_anew(tmp_path, lost):
    make(tmp_path)
    (tmp_path / lost).unlink()
    assert not make(tmp_path)
    assert (tmp_path / lost).exists()


def test_interrupted_run_leaves_the_earlier_corpus(tmp_path, monkeypatch):
    out = tmp_path / "corpus"
    make(out)
    monkeypatch.setattr(corpus, "speak_all", crash)
    with pytest.raises(KeyboardInterrupt):
        make(out, Letters(seed=1))
    assert make(out)
    monkeypatch.setattr(corpus, "speak_all", speak_here)
    assert not make(out, Letters(seed=1))
    assert [p.name for p in tmp_path.iterdir()] == ["corpus"]


@pytest.mark.parametrize(
    "manifest",
    [
        None,
        "not json",
        "5",
        '{"name": "a browser extension"}',
        '{"options_sha256": "0", "options": {"files": 1, "seed": 0}}',
    ],
)
def test_refuses_a_folder_of_something_else(tmp_path, manifest):
    (tmp_path / "thesis.tex").write_text("all of it")
    if manifest is not None:
        (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(CorpusError, match="something else"):
        make(tmp_path)
    assert (tmp_path / "thesis.tex").exists()


def test_refuses_a_file(tmp_path):
    file = tmp_path / "thesis.tex"
    file.write_text("all of it")
    with pytest.raises(CorpusError, match="something else"):
        make(file)
    assert file.read_text() == "all of it"


def test_distinct_leaves_out_what_was_drawn():
    letters = itertools.cycle("abbac")
    texts = corpus.distinct(lambda: next(letters))
    assert [next(texts) for _ in range(3)] == ["a", "b", "c"]


def test_no_text_is_given_to_two_speakers():
    texts = [
        text
        for speaker in Letters(speakers=3).plan()
        for session in speaker.sessions
        for text in session.values()
    ]
    assert sorted(texts) == [("a",), ("b",), ("c",)]
