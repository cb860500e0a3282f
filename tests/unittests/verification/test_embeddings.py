"""Embeddings that are computed once.

Authors
 * The sb_memeff authors 2026
"""

import copy
import functools

import pytest
import torch
from speechbrain.lobes.features import Fbank
from torch import nn

from sb_memeff.verification import embeddings
from sb_memeff.verification.embeddings import EmbeddingStore, fingerprint
from tests.unittests.two_processes import run_in_two_processes


class Computer:
    """Embeds the names as numbers, in batches of two, last names first."""

    def __init__(self, fails_at=None):
        self.names, self.fails_at = [], fails_at

    def __call__(self, names):
        names = names[::-1]
        for start in range(0, len(names), 2):
            batch = names[start : start + 2]
            if self.fails_at in batch:
                raise KeyboardInterrupt
            self.names += batch
            yield batch, torch.tensor([[float(n), -float(n)] for n in batch])


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    monkeypatch.setattr(embeddings, "SHARD", 4)


NAMES = [str(n) for n in range(11)]


def test_each_name_is_computed_once(tmp_path):
    compute = Computer()
    found = EmbeddingStore(tmp_path).get(NAMES[:7], compute)
    assert found.tolist() == [[n, -n] for n in range(7)]
    assert sorted(compute.names) == NAMES[:7]
    # Another order, and new names.
    wanted = ["9", "3", "8", "0"]
    compute = Computer()
    found = EmbeddingStore(tmp_path).get(wanted, compute)
    assert found[:, 0].tolist() == [9, 3, 8, 0]
    assert sorted(compute.names) == ["8", "9"]


def test_a_killed_run_continues(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        EmbeddingStore(tmp_path).get(NAMES, Computer(fails_at="1"))
    compute = Computer()
    found = EmbeddingStore(tmp_path).get(NAMES, compute)
    assert found[:, 0].tolist() == list(range(11))
    # The files had the first eight.
    assert set(compute.names) == {"0", "1", "2"}


def test_files_that_disappear(tmp_path):
    class Deleting(Computer):
        def __call__(self, names):
            for path in tmp_path.glob("*.pt"):
                path.unlink()
            yield from super().__call__(names)

    EmbeddingStore(tmp_path).get(NAMES[:3], Computer())
    with pytest.raises(
        RuntimeError, match="lacks 3 embeddings that were there"
    ):
        EmbeddingStore(tmp_path).get(NAMES[:5], Deleting())


def embed_in_one_of_two(folder, rank):
    """Some are there; each process computes half of the others."""
    found = []
    for names in (NAMES[:3], NAMES):
        compute = Computer()
        result = EmbeddingStore(folder).get(names, compute)
        found.append((result, compute.names))
    return found


def test_two_processes_share_the_work(tmp_path):
    folder = tmp_path / "embeddings"
    first, second = run_in_two_processes(
        functools.partial(embed_in_one_of_two, str(folder)), tmp_path
    )
    for number, names in enumerate((NAMES[:3], NAMES)):
        for result, _ in (first[number], second[number]):
            assert result[:, 0].tolist() == [float(n) for n in names]
        mine, others = first[number][1], second[number][1]
        assert not set(mine) & set(others)
        assert abs(len(mine) - len(others)) <= 1
        assert len(mine) + len(others) == (3, 8)[number]


def test_fingerprint_is_that_of_weights_and_settings():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4))
    prints = {fingerprint([net])}
    assert prints == {fingerprint([copy.deepcopy(net).eval()])}
    with torch.no_grad():
        net[0].weight[0, 0, 0] += 1e-6
    prints.add(fingerprint([net]))
    net[1].running_mean[0] += 1e-6
    prints.add(fingerprint([net]))
    net[0].stride = (2,)
    prints.add(fingerprint([net]))
    assert len(prints) == 4
    settings = ({}, {}, {"n_mels": 24}, {"f_max": 7000})
    digests = [fingerprint([Fbank(**options)]) for options in settings]
    assert digests[0] == digests[1] and len(set(digests)) == 3
