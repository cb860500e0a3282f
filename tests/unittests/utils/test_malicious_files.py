"""Files of a model or a checkpoint that would run code when they are loaded.

Authors
 * The sb_memeff authors 2026
"""

import os

import numpy as np
import pytest
import torch

from sb_memeff.dataio.recoverables import RandomState
from sb_memeff.optim import Adam8bit
from sb_memeff.utils.atomic_checkpoints import (
    AtomicCheckpointer,
    best_checkpoint,
)
from sb_memeff.verification.embeddings import EmbeddingStore


class Malicious:
    """Runs a command when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.fixture
def marker(tmp_path):
    """A file that must not be there at the end."""
    yield tmp_path / "marker"
    assert not (tmp_path / "marker").exists()


def write(path, marker):
    torch.save(Malicious(marker), path)
    torch.load(path, weights_only=False)
    marker.unlink()


def checkpointer(folder):
    net = torch.nn.Linear(80, 80)
    net(torch.ones(1, 80)).sum().backward()
    optimizer = Adam8bit(net.parameters())
    optimizer.step()
    recoverables = {
        "net": net,
        "optimizer": optimizer,
        "random_state": RandomState(),
    }
    return AtomicCheckpointer(folder, recoverables)


@pytest.mark.parametrize("name", ["net", "optimizer", "random_state"])
def test_a_checkpoint_unpickles_no_code(tmp_path, marker, name):
    saved = checkpointer(tmp_path / "save").save_checkpoint()
    write(saved.path / f"{name}.ckpt", marker)
    with pytest.raises(Exception, match="[Ww]eights.only"):
        checkpointer(tmp_path / "save").recover_if_possible()


def test_the_meta_file_of_a_checkpoint_runs_no_code(tmp_path, marker):
    made = checkpointer(tmp_path / "save")
    numbers = {"ErrorRate": np.float64(0.5), "loss": torch.tensor(2.0)}
    saved = made.save_checkpoint(numbers)
    found = best_checkpoint(tmp_path / "save")
    assert found.meta["ErrorRate"] == 0.5 and found.meta["loss"] == 2.0
    with open(saved.path / "CKPT.yaml", "a") as file:
        file.write(f"x: !!python/object/apply:os.system ['touch {marker}']\n")
    for load in (
        made.recover_if_possible,
        made.find_checkpoint,
        lambda: best_checkpoint(tmp_path / "save"),
    ):
        with pytest.raises(ValueError, match="CKPT.yaml.*Python objects"):
            load()


def test_stored_embeddings_unpickle_no_code(tmp_path, marker):
    store = EmbeddingStore(tmp_path)
    write(tmp_path / "000000.pt", marker)
    with pytest.raises(Exception, match="[Ww]eights.only"):
        store.get(["a"], lambda names: [(names, torch.zeros(1, 2))])
