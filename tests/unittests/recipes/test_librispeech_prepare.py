"""The data preparation of the LibriSpeech recipe.

Authors
 * The sb_memeff authors 2026
"""

import csv

import numpy as np
import pytest
import soundfile
from librispeech_prepare import prepare_librispeech

RATE = 16000


def write_split(root, split, utterances):
    """Utterances as (speaker, chapter, words); each a quarter second longer."""
    chapters = {}
    for number, (speaker, chapter, words) in enumerate(utterances):
        folder = root / split / str(speaker) / str(chapter)
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{speaker}-{chapter}-{number:04d}"
        samples = np.zeros(RATE * (number + 1) // 4)
        soundfile.write(folder / f"{name}.flac", samples, RATE)
        path = folder / f"{speaker}-{chapter}.trans.txt"
        chapters.setdefault(path, []).append(f"{name} {words}")
    for path, lines in chapters.items():
        path.write_text("\n".join(lines) + "\n")


def rows(path):
    with open(path, newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f))


@pytest.fixture
def corpus(tmp_path):
    root = tmp_path / "LibriSpeech"
    write_split(
        root, "train-a", [(7, 1, "IT'S ONE"), (7, 2, "TWO"), (3, 9, "THREE")]
    )
    write_split(root, "train-b", [(8, 1, "FOUR")])
    write_split(root, "dev", [(9, 1, "FIVE")])
    return root


def prepare(corpus, **options):
    save = corpus.parent / "save"
    options = {
        "tr_splits": ["train-a", "train-b"],
        "dev_splits": ["dev"],
        "merge_lst": ["train-a", "train-b"],
        "merge_name": "train.csv",
        **options,
    }
    prepare_librispeech(corpus, save, **options)
    return save


@pytest.mark.parametrize("above", [False, True])
def test_splits_and_merged(corpus, above):
    save = prepare(corpus.parent if above else corpus)
    a, b, merged = (
        rows(save / f"{n}.csv") for n in ("train-a", "train-b", "train")
    )
    assert merged == a + b
    assert a[0] == {
        "ID": "3-9-0002",
        "duration": "0.75",
        "wav": "$data_root/train-a/3/9/3-9-0002.flac",
        "spk_id": "3-9",
        "wrd": "THREE",
    }
    assert [r["wrd"] for r in a] == ["THREE", "IT'S ONE", "TWO"]
    assert [r["wrd"] for r in rows(save / "dev.csv")] == ["FIVE"]


def test_prepared_once(corpus):
    save = prepare(corpus)
    (save / "dev.csv").write_text("kept")
    prepare(corpus)
    assert (save / "dev.csv").read_text() == "kept"
    prepare(corpus, select_n_sentences=1)
    assert len(rows(save / "train-a.csv")) == len(rows(save / "dev.csv")) == 1
    prepare(corpus, select_n_sentences=[2, 1, 1])
    assert len(rows(save / "train.csv")) == 3
    prepare_librispeech("/no/such", "/no/save", skip_prep=True)


def test_one_split_may_be_the_merged_one(corpus):
    options = {"merge_lst": ["train-a"], "merge_name": "train-a.csv"}
    assert len(rows(prepare(corpus, **options) / "train-a.csv")) == 3


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        (
            {"dev_splits": ["dev-clean"]},
            FileNotFoundError,
            "no split dev-clean; it has dev, train-a, train-b",
        ),
        (
            # Before the headers of others are read: they would not fit.
            {"te_splits": ["test-a", "test-b"], "sample_rate": 8000},
            FileNotFoundError,
            "no split test-a, test-b; it has dev, train-a, train-b",
        ),
        ({"merge_lst": ["train-c"]}, ValueError, "names train-c, but the"),
        ({"merge_name": "dev.csv"}, ValueError, "would write the same file"),
        ({"select_n_sentences": [1]}, ValueError, "one number for each of"),
        ({"sample_rate": 8000}, ValueError, "has 16000 Hz and not 8000"),
    ],
)
def test_bad_options(corpus, options, error, sentence):
    with pytest.raises(error, match=sentence):
        prepare(corpus, **options)
    assert not (corpus.parent / "save").exists()


def test_bad_corpus(corpus):
    chapter = corpus / "dev" / "9" / "1"
    transcripts = chapter / "9-1.trans.txt"
    transcripts.write_text("9-1-0000 FIVE\n\n9-1-0001\n")
    with pytest.raises(ValueError, match="Line 3 of .*9-1.trans.txt has no"):
        prepare(corpus)
    transcripts.write_text("9-1-0000 FIVE\n9-1-0001 SIX\n")
    with pytest.raises(FileNotFoundError, match="9-1-0001 has a transcript"):
        prepare(corpus)
    transcripts.unlink()
    with pytest.raises(ValueError, match="does it have LibriSpeech's layout"):
        prepare(corpus)
    with pytest.raises(FileNotFoundError, match="set data_folder"):
        prepare(corpus / "nowhere")
    assert not (corpus.parent / "save").exists()
