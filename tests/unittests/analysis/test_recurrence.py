"""Recurrences over time in few steps."""

import pytest
import torch
from speechbrain.nnet import RNN

from sb_memeff.analysis.recurrence import STEPS, few_steps
from sb_memeff.memory.fake import fake_tensors
from sb_memeff.memory.step import training_step_memory
from tests.unittests.one_analysis import one_analysis  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_analysis")


def build(name):
    return getattr(RNN, name)(64, (4, 34, 16), dropout=0.1, bidirectional=True)


@pytest.mark.parametrize("name", ["LiGRU", "SLiGRU"])
def test_few_steps_take_the_memory_of_all(name):
    def step(net):
        return net(torch.zeros(40, 34, 16))[0].square().mean()

    def memory():
        return training_step_memory(lambda: build(name), step, torch.optim.Adam)

    expected = memory()
    with few_steps():
        found = memory()
    # The state before the first frame stands for those before the first frames.
    assert found.saved_bytes == pytest.approx(expected.saved_bytes, rel=0.02)
    assert found.peak_bytes == pytest.approx(expected.peak_bytes, rel=0.01)


@pytest.mark.parametrize("frames", [1, STEPS, STEPS + 1, 100])
def test_shapes(frames):
    with fake_tensors(), few_steps():
        output, state = build("LiGRU")(torch.zeros(4, frames, 16))
    assert output.shape == (4, frames, 128)
    assert state.shape == (2, 4, 64)


def test_real_tensors_are_computed_as_before():
    x = torch.randn(4, 40, 16)
    net = build("LiGRU").eval()
    expected = net(x)
    cell = RNN.LiGRU_Layer._ligru_cell
    with few_steps():
        found = net(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert RNN.LiGRU_Layer._ligru_cell is cell
