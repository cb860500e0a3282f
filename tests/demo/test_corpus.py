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

from corpus import CorpusOptions, make_once, speak_all, unrepeated
from voices import CorpusError


@dataclasses.dataclass(frozen=True)
class Options(CorpusOptions):
    """One file."""

    FORMAT = 1

    files: int = 1
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class NewFormat(Options):
    """The same, written by changed code."""

    FORMAT = 2


def complete(folder, manifest):
    return (folder / "a.txt").exists() and manifest["letters"] == 1


def write(folder):
    assert not list(folder.iterdir())
    (folder / "a.txt").write_text("a")
    return {"letters": 1}


def crash(folder):
    write(folder)
    raise KeyboardInterrupt


def make(out, options=Options(), how=write):
    return make_once(out, options, complete, how)["cached"]


def test_made_once_and_found_again(tmp_path):
    out = tmp_path / "corpus"
    assert not make(out)
    assert make(out)
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["options"] == {"files": 1, "seed": 0}
    assert manifest["letters"] == 1


@pytest.mark.parametrize("options", [Options(seed=1), NewFormat()])
def test_other_options_or_another_format_make_it_anew(tmp_path, options):
    make(tmp_path)
    assert not make(tmp_path, options)
    assert make(tmp_path, options)


def test_lost_file_makes_it_anew(tmp_path):
    make(tmp_path)
    (tmp_path / "a.txt").unlink()
    assert not make(tmp_path)
    assert (tmp_path / "a.txt").exists()


def test_interrupted_run_leaves_the_earlier_corpus(tmp_path):
    out = tmp_path / "corpus"
    make(out)
    with pytest.raises(KeyboardInterrupt):
        make(out, Options(seed=1), crash)
    assert make(out)
    assert not make(out, Options(seed=1))
    assert [p.name for p in tmp_path.iterdir()] == ["corpus"]


@pytest.mark.parametrize(
    "manifest",
    [
        None,
        "not json",
        "5",
        '{"name": "a browser extension"}',
        '{"options_sha256": "0", "options": {"speakers": 1, "seed": 0}}',
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


def test_options_out_of_range():
    for files in (0, 1001):
        with pytest.raises(CorpusError, match=f"files .* 1..1000: {files}"):
            Options(files=files)


def test_unrepeated_ends_when_all_is_drawn():
    letters = itertools.cycle("abcab")
    texts = unrepeated(lambda: next(letters))
    assert [next(texts) for _ in range(3)] == ["a", "b", "c"]
    with pytest.raises(CorpusError, match="only 3 different"):
        next(texts)


def double(job):
    return 2 * job


def test_minutes_are_those_of_all_speakers():
    jobs = [16000 * 30] * 3
    assert speak_all(double, jobs, workers=2, progress=False) == 3.0
