"""Checkpoints that survive a kill.

Authors
 * The sb_memeff authors 2026
"""

import errno
import os
import shutil
from pathlib import Path

import pytest
import torch
from speechbrain.utils.checkpoints import (
    Checkpointer,
    mark_as_saver,
    register_checkpoint_hooks,
)

from sb_memeff.utils.atomic_checkpoints import (
    AtomicCheckpointer,
    best_checkpoint,
    trained_weights,
)


@register_checkpoint_hooks
class DiesWhileSaving:
    """A recoverable that stands for a power cut."""

    dies = False

    @mark_as_saver
    def save(self, path):
        """Writes, or dies."""
        if self.dies:
            raise KeyboardInterrupt
        Path(path).write_text("complete")


def test_half_written_checkpoint_is_none(tmp_path):
    found = {}
    for kind in (AtomicCheckpointer, Checkpointer):
        folder = tmp_path / kind.__name__
        dies = DiesWhileSaving()
        checkpointer = kind(folder, {"net": torch.nn.Linear(1, 1), "d": dies})
        good = checkpointer.save_checkpoint(name="good")
        dies.dies = True
        with pytest.raises(KeyboardInterrupt):
            checkpointer.save_checkpoint(name="bad")
        found[kind] = checkpointer.find_checkpoint().path.name
        assert good.paramfiles["net"].is_file()
    assert found[AtomicCheckpointer] == "CKPT+good"
    # AtomicCheckpointer can go when SpeechBrain's finds the good one.
    assert found[Checkpointer] == "CKPT+bad"


def test_left_overs_are_removed(tmp_path):
    checkpointer = AtomicCheckpointer(tmp_path, {"n": torch.nn.Linear(1, 1)})
    (tmp_path / "partial-CKPT+old").mkdir()
    checkpointer.save_and_keep_only(num_to_keep=1)
    checkpointer.save_and_keep_only(num_to_keep=1)
    (folder,) = tmp_path.iterdir()
    assert folder.name.startswith("CKPT+")


def weight_in(checkpointer):
    """The value from which a training started now would continue."""
    checkpointer.recoverables["net"].weight.data.fill_(-1)
    found = checkpointer.recover_if_possible()
    return checkpointer.recoverables["net"].weight.item(), found


def save(checkpointer, value, name="latest"):
    checkpointer.recoverables["net"].weight.data.fill_(value)
    return checkpointer.save_checkpoint(name=name)


@pytest.fixture
def one_number(tmp_path):
    """A checkpointer of a network with one weight."""
    net = torch.nn.Linear(1, 1, bias=False)
    return AtomicCheckpointer(tmp_path, {"net": net})


def test_second_checkpoint_of_a_name_replaces_the_first(one_number, tmp_path):
    save(one_number, 1.0)
    # Of something that is not saved any more.
    (tmp_path / "CKPT+latest" / "gone.ckpt").write_text("")
    for value in (2.0, 3.0):
        saved = save(one_number, value)
        assert saved.path.name == "CKPT+latest"
        assert saved.paramfiles["net"].is_file()
        weight, found = weight_in(one_number)
        assert weight == value and set(found.paramfiles) == {"net"}
        assert [p.name for p in tmp_path.iterdir()] == ["CKPT+latest"]


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


@pytest.mark.parametrize("first", ["latest", "other"])
@pytest.mark.parametrize("step", range(6))
def test_killed_at_any_moment_of_replacing(step, first, tmp_path, monkeypatch):
    """Before each change of the folder: one complete checkpoint is found.

    Both checkpointers find it, and the next one saved is the only one left.
    """

    def build(kind=AtomicCheckpointer):
        return kind(tmp_path, {"net": torch.nn.Linear(1, 1, bias=False)})

    checkpointer = build()
    save(checkpointer, 1.0, first)
    calls = []

    def counted(function):
        def call(*args, **kwargs):
            calls.append(function)
            if len(calls) > step:
                raise Killed
            return function(*args, **kwargs)

        return call

    complete = []
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", counted(os.replace))
        patch.setattr(shutil, "rmtree", counted(shutil.rmtree))
        try:
            save(checkpointer, 2.0)
            complete.append(True)
        except Killed:
            pass
    # Put aside, in place, set apart for removal, removed: 4 changes.
    assert bool(complete) == (step >= (4 if first == "latest" else 1))
    for kind in (AtomicCheckpointer, Checkpointer):
        weight, found = weight_in(build(kind))
        assert weight in (1.0, 2.0) and "net" in found.paramfiles
    assert (weight == 2.0) == (step >= (2 if first == "latest" else 1))
    names = [c.path.name for c in build().list_checkpoints()]
    assert len(names) == len({n.removesuffix(".replaced") for n in names})
    save(build(), 3.0)
    assert weight_in(build())[0] == 3.0
    left = {p.name for p in tmp_path.iterdir()}
    assert left == {f"CKPT+{first}", "CKPT+latest"}


def test_replaced_one_does_not_come_back(one_number, tmp_path):
    """Nor is it averaged, or found by its error rate."""
    save(one_number, 1.0)
    shutil.copytree(tmp_path / "CKPT+latest", tmp_path / "CKPT+latest.replaced")
    save(one_number, 2.0, "other")
    assert {c.path.name for c in one_number.list_checkpoints()} == {
        "CKPT+latest",
        "CKPT+other",
    }
    assert not (tmp_path / "CKPT+latest.replaced").exists()


@pytest.mark.parametrize("keep_recent", [True, False])
def test_keeping_checkpoints_works_as_in_speechbrain(keep_recent, tmp_path):
    """With names and without, the best, the newest, and what is deleted."""
    found = []
    for kind in (AtomicCheckpointer, Checkpointer):
        checkpointer = kind(
            tmp_path / kind.__name__, {"net": torch.nn.Linear(1, 1)}
        )
        for n, rate in enumerate([3.0, 1.0, 2.0, 5.0, 6.0]):
            checkpointer.save_and_keep_only(
                meta={"rate": rate},
                name="same" if n in (1, 3) else f"n{n}",
                num_to_keep=2,
                keep_recent=keep_recent,
                # Checkpointer's default is what it was last asked for.
                importance_keys=[],
                min_keys=["rate"],
            )
        checkpoints = checkpointer.find_checkpoints(min_key="rate")
        found.append([(c.path.name, c.meta["rate"]) for c in checkpoints])
        checkpointer.delete_checkpoints(num_to_keep=1)
        found[-1] += [c.path.name for c in checkpointer.list_checkpoints()]
    assert found[0] == found[1]
    assert len(found[0]) > 2
    # The newest is not among the two best.
    assert (("CKPT+n4", 6.0) in found[0]) == keep_recent


def test_importance_keys_do_not_carry_over_to_the_next_call(
    tmp_path, monkeypatch
):
    """save_and_keep_only can go when Checkpointer's list does not grow."""
    found = {}
    for kind in (AtomicCheckpointer, Checkpointer):
        checkpointer = kind(tmp_path / kind.__name__)
        calls = []
        monkeypatch.setattr(
            kind,
            "list_checkpoints",
            lambda self: calls.append(1) or [],  # noqa: B023
        )
        counts = []
        for _ in range(4):
            calls.clear()
            checkpointer.save_and_keep_only()
            counts.append(len(calls))
        keys = [len]
        checkpointer.save_and_keep_only(importance_keys=keys)
        found[kind] = len(set(counts)), len(keys)
        monkeypatch.undo()
    assert found[AtomicCheckpointer] == (1, 1)
    assert found[Checkpointer] == (4, 2)


def test_the_best_checkpoint_has_the_lowest_error_rate(tmp_path):
    checkpointer = Checkpointer(tmp_path, {"net": torch.nn.Linear(1, 1)})
    assert best_checkpoint(tmp_path) is None
    for rate in (0.3, 0.1, 0.2):
        checkpointer.save_checkpoint({"ErrorRate": rate}, name=str(rate))
    assert best_checkpoint(tmp_path).meta["ErrorRate"] == 0.1
    assert best_checkpoint(tmp_path / "none") is None
    assert not (tmp_path / "none").exists()


def test_the_mean_of_checkpoints_comes_first(tmp_path):
    assert trained_weights(tmp_path / "none") is None
    net = torch.nn.Linear(1, 1)
    checkpointer = AtomicCheckpointer(tmp_path, {"embedding_model": net})
    for rate in (0.3, 0.1, 0.2):
        checkpointer.save_checkpoint({"ErrorRate": rate})
    assert trained_weights(tmp_path) == best_checkpoint(tmp_path).path
    torch.save(net.state_dict(), tmp_path / "embedding_model.ckpt")
    assert trained_weights(tmp_path) == tmp_path


def full_disk(monkeypatch, error):
    """Fails after some of the files are written."""

    def save(value, file, *args, **kwargs):
        Path(file).write_bytes(b"half")
        raise error

    monkeypatch.setattr(torch, "save", save)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("PytorchStreamWriter failed writing file data.pkl"),
    ],
)
def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch, error):
    net = torch.nn.Linear(2, 2)
    checkpointer = AtomicCheckpointer(tmp_path, {"net": net})
    first = checkpointer.save_checkpoint()
    weight = net.weight.detach().clone()
    net.weight.data.zero_()
    with monkeypatch.context() as patch:
        full_disk(patch, error)
        for save in (
            checkpointer.save_checkpoint,
            checkpointer.save_and_keep_only,
        ):
            with pytest.raises(OSError, match="MB were free.*same command"):
                save()
    assert [path.name for path in tmp_path.iterdir()] == [first.path.name]
    assert checkpointer.recover_if_possible().path == first.path
    assert torch.equal(net.weight, weight)
    assert checkpointer.save_checkpoint() is not None
