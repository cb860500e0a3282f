"""Random states and positions are recovered with a checkpoint.

Authors
 * The sb_memeff authors 2026
"""

import csv
import logging
import random

import numpy as np
import pytest
import soundfile
import torch
from speechbrain.augment.time_domain import AddNoise, AddReverb
from speechbrain.utils.checkpoints import Checkpointer

from sb_memeff.dataio.recoverables import NoisePosition, RandomState


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


def test_another_number_of_processes_logs_a_warning(tmp_path, caplog):
    state = RandomState()
    state.save(tmp_path / "states")
    states = torch.load(tmp_path / "states")
    torch.save(states * 2, tmp_path / "states")
    with caplog.at_level(logging.WARNING, "sb_memeff.dataio.recoverables"):
        state.load(tmp_path / "states", end_of_epoch=False)
    assert "saved by 2 processes, but now there are 1" in caplog.text


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


@pytest.mark.parametrize("kind", [AddNoise, AddReverb])
def test_a_position_loaded_but_not_resumed_is_saved(kind, sounds, tmp_path):
    """Loaded and saved again, it is still where it was."""
    lengths = [torch.ones(2)] if kind is AddNoise else []
    augmentation = kind(sounds)
    for _ in range(3):
        augmentation(torch.randn(2, 800), *lengths)
    NoisePosition(augmentation, "cpu").save(tmp_path / "first")
    other = NoisePosition(kind(sounds), "cpu")
    other.load(tmp_path / "first", end_of_epoch=False)
    other.save(tmp_path / "second")
    first, second = (
        torch.load(tmp_path / name) for name in ("first", "second")
    )
    assert first == second and first[0] is not None


@pytest.mark.parametrize("kind", [AddNoise, AddReverb])
def test_resuming_draws_no_numbers_and_happens_once(kind, sounds, tmp_path):
    """Though the sounds were in use before, in batches of another size."""
    waveforms = torch.randn(2, 800)
    lengths = [torch.ones(2)] if kind is AddNoise else []
    augmentation, other = kind(sounds), kind(sounds)
    for _ in range(3):
        augmentation(waveforms, *lengths)
    NoisePosition(augmentation, "cpu").save(tmp_path / "first")
    other(torch.randn(5, 800), *([torch.ones(5)] if lengths else []))
    position = NoisePosition(other, "cpu")
    position.load(tmp_path / "first", end_of_epoch=False)
    states = random.getstate(), torch.get_rng_state()
    position.resume()
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    for _ in range(2):
        expected = augmentation(waveforms, *lengths)
        torch.set_rng_state(states[1])
        found = other(waveforms, *lengths)
        torch.set_rng_state(states[1])
        assert torch.equal(found, expected)
        # Nothing is left to go to.
        position.resume()
    for some, name in ((augmentation, "expected"), (other, "found")):
        NoisePosition(some, "cpu").save(tmp_path / name)
    position.save(tmp_path / "same")
    first, *others = (
        torch.load(tmp_path / name) for name in ("expected", "found", "same")
    )
    assert others == [first, first] != [[None]] * 2


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
