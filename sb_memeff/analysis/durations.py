"""Durations of a data set's utterances, and the batches that a recipe makes.

Authors
 * The sb_memeff authors 2026
"""

import csv
import gzip
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speechbrain.dataio.sampler import DynamicBatchSampler

from sb_memeff.analysis.families.batching import sampler_options
from sb_memeff.analysis.recipe import Recipe

__all__ = ["LoaderBatch", "loader_batches", "read_durations"]

# Where lists of utterances have their names.
NAMES = ("ID", "id", "audio_filepath")


@dataclass(frozen=True)
class LoaderBatch:
    """A batch of the data loader.

    Arguments
    ---------
    utterances : int
        Number of utterances.
    seconds : float
        Length of the longest, to which the others are padded.
    longest : str
        Name of the longest.
    """

    utterances: int
    seconds: float
    longest: str


def read_durations(path: str | Path) -> dict[str, float]:
    """Reads the durations of utterances.

    Arguments
    ---------
    path : str or Path
        A csv file as SpeechBrain's, with columns ID and duration; or a jsonl
        file as lhotse's cuts or NeMo's manifests, with id (or audio_filepath)
        and duration in each line, possibly compressed (.gz).

    Returns
    -------
    dict
        Maps names to seconds.

    Raises
    ------
    ValueError
        If the file has another form; the message names the line.

    Example
    -------
    >>> folder = getfixture("tmp_path")
    >>> file = folder / "cuts.jsonl"
    >>> _ = file.write_text('{"id": "a-1", "duration": 162.5}')
    >>> read_durations(file)
    {'a-1': 162.5}
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path} of durations.")
    durations = {}
    for number, row in _rows(path):
        name = next((str(row[key]) for key in NAMES if key in row), None)
        try:
            seconds = float(row["duration"])
        except (KeyError, TypeError, ValueError):
            seconds = math.nan
        if name is None or not 0 < seconds < math.inf:
            raise ValueError(
                f"{path}, line {number}: an utterance needs a name (ID or id) "
                f"and a duration in seconds."
            )
        durations[name] = seconds
    if not durations:
        raise ValueError(f"{path} has no utterances.")
    return durations


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Line numbers and contents."""
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8", newline="") as file:
            if ".csv" in path.suffixes:
                # As SpeechBrain reads it.
                reader = csv.DictReader(file, skipinitialspace=True)
                for row in reader:
                    yield reader.line_num, row
                return
            for number, line in enumerate(file, 1):
                row = json.loads(line) if line.strip() else None
                if isinstance(row, dict):
                    yield number, row
    except (OSError, UnicodeDecodeError, csv.Error, json.JSONDecodeError) as e:
        raise ValueError(
            f"{path} is neither csv nor jsonl: {' '.join(str(e).split())}."
        ) from e


def loader_batches(
    recipe: Recipe, durations: Mapping[str, float]
) -> list[LoaderBatch]:
    """Makes the batches of a recipe's data loader, the longest first.

    A shuffled order makes other batches in each epoch. These are the extreme
    ones: the longest utterances of the data set, or of each bucket of dynamic
    batching, come together.

    Arguments
    ---------
    recipe : Recipe
        The recipe.
    durations : dict
        Maps names of utterances to seconds.

    Returns
    -------
    list of LoaderBatch
        The batches.

    Raises
    ------
    ValueError
        If the recipe cuts its utterances to one length, or a key that its
        sampler needs is missing.

    Example
    -------
    >>> from sb_memeff.analysis.recipe import read_recipe
    >>> path = "recipes/LibriSpeech/ASR/transducer_memeff/hparams/digits_transducer.yaml"
    >>> recipe = read_recipe(path, {"dynamic_batching": False, "batch_size": 2})
    >>> loader_batches(recipe, {"a": 2.0, "b": 16.0, "c": 5.0})[0]
    LoaderBatch(utterances=2, seconds=16.0, longest='b')
    """
    settings = recipe.settings
    if "sentence_len" in settings:
        raise ValueError(
            f"{recipe.path} cuts all utterances to sentence_len: durations do "
            f"not matter."
        )
    most = settings.get("avoid_if_longer_than", math.inf)
    names = sorted(
        (name for name, seconds in durations.items() if seconds <= most),
        key=lambda name: (-durations[name], name),
    )
    if not names:
        raise ValueError(
            f"{recipe.path}: all utterances are longer than "
            f"avoid_if_longer_than={most}."
        )
    lengths = [durations[name] for name in names]
    return [
        LoaderBatch(len(batch), lengths[batch[0]], names[batch[0]])
        for batch in _indices(recipe, lengths)
    ]


def _indices(recipe: Recipe, lengths: list[float]) -> list[list[int]]:
    """Batches of indices of lengths, which descend."""
    batching = recipe.dynamic_batching
    if batching is None:
        size = recipe.number("batch_size")
        whole = list(range(len(lengths)))
        return [whole[i : i + size] for i in range(0, len(whole), size)]
    options = sampler_options(recipe.settings)
    if "num_buckets" not in options:
        raise ValueError(
            f"{recipe.path} has no dynamic_batch_sampler with num_buckets."
        )
    sampler = DynamicBatchSampler(
        lengths,
        recipe.number(batching.key),
        options["num_buckets"],
        lengths_list=[length / batching.unit for length in lengths],
        shuffle=False,
        batch_ordering="descending",
        max_batch_ex=batching.most,
    )
    return list(sampler)
