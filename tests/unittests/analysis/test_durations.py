"""Durations of a data set: reading them, and the batches of a sampler."""

import gzip
import json

import pytest

from sb_memeff.analysis.durations import (
    LoaderBatch,
    loader_batches,
    read_durations,
)
from sb_memeff.analysis.recipe import read_recipe
from tests.unittests.analysis.recognition_yaml import CTC, SEQ2SEQ, TRANSFORMER
from tests.unittests.analysis.yaml_files import UPSTREAM_SPEAKERS

# --- files -------------------------------------------------------------------

CUTS = [
    {"id": "a", "start": 0, "duration": 2.5, "type": "MonoCut"},
    {"id": "b", "start": 1.5, "duration": 162, "supervisions": [{"id": "x"}]},
]


def test_csv(tmp_path):
    path = tmp_path / "train.csv"
    path.write_text(
        "ID, duration, wav, wrd\na, 2.5, a.wav, HELLO\n"
        'b, 162.0, b.wav, "YES, NO"\n'
    )
    assert read_durations(path) == {"a": 2.5, "b": 162.0}


@pytest.mark.parametrize("compressed", [False, True])
def test_cuts(compressed, tmp_path):
    text = "\n".join(map(json.dumps, CUTS)) + "\n\n"
    path = tmp_path / ("cuts.jsonl.gz" if compressed else "cuts.jsonl")
    path.write_bytes(
        gzip.compress(text.encode()) if compressed else text.encode()
    )
    assert read_durations(path) == {"a": 2.5, "b": 162.0}


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("a.csv", "", "no utterances"),
        ("a.csv", "ID,wav\na,a.wav\n", "line 2: an utterance needs a name"),
        ("a.csv", "duration\n3\n", "line 2: an utterance needs a name"),
        ("a.csv", "ID,duration\na,long\n", "line 2"),
        ("a.jsonl", '{"id": "a", "duration": 1}\n{"id": "b"}\n', "line 2"),
        ("a.jsonl", '{"id": "a", "duration": -1}\n', "line 1"),
        ("a.jsonl", "ID,duration\n", "neither csv nor jsonl"),
        ("a.jsonl.gz", "no gzip", "neither csv nor jsonl"),
    ],
)
def test_other_files_are_refused(name, text, words, tmp_path):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError, match=words) as caught:
        read_durations(path)
    assert "\n" not in str(caught.value) and name in str(caught.value)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file .* of durations"):
        read_durations(tmp_path / "none.csv")


# --- batches -----------------------------------------------------------------


@pytest.fixture
def read(tmp_path):
    def read_text(text, **overrides):
        path = tmp_path / "train.yaml"
        path.write_text(text)
        return read_recipe(path, overrides)

    return read_text


DURATIONS = {"a": 1.0, "b": 90.0, "c": 3.0, "d": 2.5, "e": 5.0, "f": 1.5}
SAMPLER = """
dynamic_batch_sampler_train:
    max_batch_length: !ref <max_batch_length_train>
    num_buckets: {buckets}
"""


def test_batches_of_a_size(read):
    """The longest come together: any order may bring that about."""
    recipe = read(CTC, batch_size=4)
    assert loader_batches(recipe, DURATIONS) == [
        LoaderBatch(4, 90.0, "b"),
        LoaderBatch(2, 1.5, "f"),
    ]


def test_dynamic_batches(read):
    text = TRANSFORMER + SAMPLER.format(buckets=2)
    found = loader_batches(read(text, max_batch_length_train=6), DURATIONS)
    # 90 s is alone though it exceeds a batch, and 5 s too.
    assert found[:2] == [LoaderBatch(1, 90.0, "b"), LoaderBatch(1, 5.0, "e")]
    assert sum(batch.utterances for batch in found) == 6
    for batch in found[1:]:
        assert batch.utterances * batch.seconds <= 6


def test_dynamic_batches_in_frames(read):
    text = SEQ2SEQ + SAMPLER.format(buckets=2)
    text = text.replace("<max_batch_length_train>", "<max_batch_length>")
    options = {"dynamic_batching": True, "max_batch_length": 600}
    found = loader_batches(read(text, **options), DURATIONS)
    seconds = TRANSFORMER + SAMPLER.format(buckets=2)
    assert found == loader_batches(
        read(seconds, max_batch_length_train=6), DURATIONS
    )


def test_utterances_that_the_recipe_leaves_out(read):
    text = CTC + "avoid_if_longer_than: 10.0\n"
    found = loader_batches(read(text), DURATIONS)
    assert found == [LoaderBatch(5, 5.0, "e")]
    with pytest.raises(ValueError, match="all utterances are longer than"):
        loader_batches(read(text), {"b": 90.0})


def test_recipes_without_such_batches(read):
    with pytest.raises(ValueError, match="cuts all utterances to sentence_len"):
        loader_batches(read(UPSTREAM_SPEAKERS["xvector"]), DURATIONS)
    with pytest.raises(ValueError, match="no dynamic_batch_sampler with num_b"):
        loader_batches(read(TRANSFORMER), DURATIONS)
