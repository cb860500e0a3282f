"""Counting bytes."""

import pytest
import torch
from torch import nn

from sb_memeff.utils.memory import StorageTracker, training_step_memory


def test_views_and_in_place_results_count_once():
    with StorageTracker() as tracker:
        x = torch.zeros(100)
        y = x.view(10, 10)
        y.add_(1)
        assert tracker.alive == tracker.peak == 400
        del x
        assert tracker.alive == 400
        del y
    assert (tracker.alive, tracker.peak) == (0, 400)


def linear_step(**options):
    """One layer of 1000 x 1000 without bias on a batch of 50."""
    return training_step_memory(
        lambda: nn.Linear(1000, 1000, bias=False), (50, 1000), **options
    )


def test_a_step_whose_peak_can_be_counted_by_hand():
    memory = linear_step()
    weight, activation = 4_000_000, 200_000
    assert memory.parameters == 1_000_000
    assert memory.parameter_bytes == weight
    # The input was there before; the output stays.
    assert memory.saved_bytes == activation
    # Weight and gradient; input, output and its gradient.
    assert memory.peak_bytes == 2 * weight + 3 * activation
    assert memory.activation_bytes == 3 * activation


def test_optimizer_states_are_counted():
    plain = linear_step().peak_bytes
    momentum = linear_step(
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)
    ).peak_bytes
    adam = linear_step(optimizer=torch.optim.Adam).peak_bytes
    assert momentum - plain == pytest.approx(4e6, rel=0.06)
    assert adam - plain >= 8e6


def test_fake_and_real_tensors_agree():
    def build():
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.Flatten(),
            nn.Linear(8 * 16 * 16, 10),
        )

    fake = training_step_memory(build, (4, 3, 16, 16))
    real = training_step_memory(build, (4, 3, 16, 16), fake=False)
    assert fake.parameters == real.parameters
    assert fake.saved_bytes == pytest.approx(real.saved_bytes, rel=0.02)
    assert fake.peak_bytes == pytest.approx(real.peak_bytes, rel=0.02)


def test_autocast_changes_what_is_stored():
    def build():
        return nn.Sequential(*(nn.Conv1d(8, 8, 3) for _ in range(4)))

    full = training_step_memory(build, (4, 8, 1000))
    half = training_step_memory(build, (4, 8, 1000), autocast=torch.bfloat16)
    assert half.saved_bytes < full.saved_bytes
