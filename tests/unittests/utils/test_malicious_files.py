"""Files of a model or a checkpoint that would run code when they are loaded.

Authors
 * The sb_memeff authors 2026
"""

import ast
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from sb_memeff.dataio.recoverables import RandomState
from sb_memeff.export.wespeaker import convert_wespeaker
from sb_memeff.optim import Adam8bit
from sb_memeff.utils.atomic_checkpoints import (
    AtomicCheckpointer,
    best_checkpoint,
)
from sb_memeff.verification.embeddings import EmbeddingStore

ROOT = Path(__file__).resolve().parents[3]


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


def test_a_published_network_unpickles_no_code(tmp_path, marker):
    write(tmp_path / "model.pt", marker)
    with pytest.raises(Exception, match="[Ww]eights.only"):
        convert_wespeaker(tmp_path / "model.pt", tmp_path / "out", "ResNet34")


def test_everything_is_loaded_with_weights_only():
    """In the package and the scripts, whatever the default of torch is."""
    found = 0
    for folder in ("sb_memeff", "recipes", "demo"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            text = path.read_text("utf-8")
            if "torch.load" not in text and "pickle" not in text:
                continue
            for node in ast.walk(ast.parse(text)):
                if not isinstance(node, ast.Call):
                    continue
                called = ast.unparse(node.func)
                where = f"{path}:{node.lineno}"
                assert called not in ("pickle.load", "pickle.loads"), where
                if called == "torch.load":
                    found += 1
                    given = {k.arg: ast.unparse(k.value) for k in node.keywords}
                    assert given.get("weights_only") == "True", where
    assert found >= 7
