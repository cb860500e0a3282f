"""Checkpoints that survive a kill.

Authors
 * The sb_memeff authors 2026
"""

import csv
import logging
import random
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from speechbrain.augment.time_domain import AddNoise, AddReverb
from speechbrain.utils.checkpoints import (
    Checkpointer,
    mark_as_saver,
    register_checkpoint_hooks,
)

from sb_memeff.utils.checkpoints import (
    AtomicCheckpointer,
    NoisePosition,
    RandomState,
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


def draw():
    return [random.random(), np.random.randn(), torch.rand(()).item()]


def test_all_generators_are_recovered(tmp_path):
    # numpy keeps the second of two normal numbers.
    np.random.randn()
    checkpointer = Checkpointer(tmp_path, {"random_state": RandomState()})
    saved = checkpointer.save_checkpoint()
    first = [draw(), draw()]
    checkpointer.load_checkpoint(saved)
    assert [draw(), draw()] == first
    assert draw() not in first


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_generator_is_recovered(tmp_path):
    checkpointer = Checkpointer(tmp_path, {"random_state": RandomState()})
    saved = checkpointer.save_checkpoint()
    first = torch.rand(3, device="cuda")
    checkpointer.load_checkpoint(saved)
    assert torch.equal(first, torch.rand(3, device="cuda"))


def test_another_number_of_processes_is_said(tmp_path, caplog):
    state = RandomState()
    state.save(tmp_path / "states")
    states = torch.load(tmp_path / "states")
    torch.save(states * 2, tmp_path / "states")
    with caplog.at_level(logging.WARNING, "sb_memeff.utils.checkpoints"):
        state.load(tmp_path / "states", end_of_epoch=False)
    assert "2 processes, now there are 1" in caplog.text


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    """A list of seven sounds in csv."""
    folder = tmp_path_factory.mktemp("sounds")
    rng = np.random.default_rng(0)
    with open(folder / "sounds.csv", "w", newline="") as f:
        table = csv.writer(f)
        table.writerow(["ID", "duration", "wav", "wav_format", "wav_opts"])
        for n in range(7):
            path = folder / f"{n}.wav"
            soundfile.write(path, 0.3 * rng.standard_normal(600), 16000)
            table.writerow([n, 600 / 16000, path, "wav", ""])
    return str(folder / "sounds.csv")


@pytest.mark.parametrize("kind", [AddNoise, AddReverb])
@pytest.mark.parametrize("uses", [0, 1, 4, 9])
def test_noises_go_on_where_they_were(kind, uses, sounds, tmp_path):
    waveforms = torch.randn(2, 800)
    lengths = [torch.ones(2)] if kind is AddNoise else []

    def build():
        augmentation = kind(sounds)
        position = NoisePosition(augmentation, "cpu")
        return augmentation, Checkpointer(
            tmp_path / f"{kind.__name__}{uses}",
            {"position": position, "random_state": RandomState()},
        )

    augmentation, checkpointer = build()
    for _ in range(uses):
        augmentation(waveforms, *lengths)
    saved = checkpointer.save_checkpoint()
    expected = [augmentation(waveforms, *lengths) for _ in range(6)]
    resumed, checkpointer = build()
    checkpointer.load_checkpoint(saved)
    assert not hasattr(resumed, "data_loader")
    checkpointer.recoverables["position"].resume()
    for value in expected:
        assert torch.equal(resumed(waveforms, *lengths), value)


def test_noises_start_at_the_beginning_without_it(sounds):
    """AddNoise does not save its position; NoisePosition can go if it does."""
    assert not hasattr(AddNoise, "_speechbrain_saver")
    torch.manual_seed(0)
    augmentation = AddNoise(sounds)
    waveforms = torch.randn(2, 800)
    augmentation(waveforms, torch.ones(2))
    state = torch.get_rng_state()
    expected = augmentation(waveforms, torch.ones(2))
    fresh = AddNoise(sounds)
    torch.set_rng_state(state)
    assert not torch.equal(fresh(waveforms, torch.ones(2)), expected)
