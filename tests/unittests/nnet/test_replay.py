"""A replay repeats the call and leaves no trace."""

import pytest
import torch
from torch import nn

from sb_memeff.nnet.replay import Recorder, without_trace


def test_replay_repeats_random_numbers_and_gives_the_stream_back():
    dropout = nn.Dropout(0.5)
    x = torch.ones(64)
    recorder = Recorder(x.device)
    first, recording = recorder.record(dropout, x)
    other = dropout(x)
    state = torch.get_rng_state()
    with recorder.replay(dropout, recording):
        second = dropout(x)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_generators_come_back_after_an_error():
    dropout = nn.Dropout(0.5)
    recorder = Recorder(torch.device("cpu"))
    _, recording = recorder.record(dropout, torch.ones(4))
    state = torch.get_rng_state()
    norm = nn.BatchNorm1d(4)
    with pytest.raises(ZeroDivisionError):
        with recorder.replay(norm, recording):
            raise ZeroDivisionError
    assert torch.equal(torch.get_rng_state(), state)
    assert norm.track_running_stats


def test_nothing_is_stored_for_functions_that_draw_nothing():
    recorder = Recorder(torch.device("cpu"))
    _, recording = recorder.record(nn.ReLU(), torch.ones(4))
    assert recording.random_states is None
    assert recording.changes.buffers == {}


def test_replay_restores_the_autocast_state_of_the_forward_pass():
    linear = nn.Linear(4, 4)
    x = torch.ones(2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        recorder = Recorder(x.device)
        _, recording = recorder.record(linear, x)
    with recorder.replay(linear, recording):
        assert linear(x).dtype == torch.bfloat16
    assert linear(x).dtype == torch.float32
    recorder = Recorder(x.device)
    _, recording = recorder.record(linear, x)
    with torch.autocast("cpu", torch.bfloat16):
        with recorder.replay(linear, recording):
            assert linear(x).dtype == torch.float32


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "kind, momentum",
    [
        (nn.BatchNorm1d, 0.1),
        (nn.BatchNorm1d, None),
        (nn.SyncBatchNorm, 0.1),
        (nn.SyncBatchNorm, None),
        (nn.InstanceNorm1d, 0.1),
    ],
)
def test_without_trace(kind, momentum, training):
    norm = kind(4, momentum=momentum, track_running_stats=True)
    norm.train(training)
    x = 3 * torch.randn(8, 4, 5) + 1
    before = {k: v.clone() for k, v in norm.state_dict().items()}
    with without_trace(norm):
        y = norm(x)
    for key, value in norm.state_dict().items():
        assert torch.equal(value, before[key]), key
    # The same values as a call that does count.
    assert torch.equal(y, norm(x))
    if training:
        assert not torch.equal(norm.running_mean, before["running_mean"])


def test_a_replay_finds_the_buffers_of_its_call():
    """Twice, as backward with retain_graph does."""

    class Step(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x):
            self.count += 1
            return x * self.count

    step = Step()
    recorder = Recorder(torch.device("cpu"))
    x = torch.ones(3)
    _, first = recorder.record(step, x)
    y, second = recorder.record(step, x)
    for _ in range(2):
        with recorder.replay(step, second):
            assert torch.equal(step(x), y)
        with recorder.replay(step, first):
            assert torch.equal(step(x), x)
    assert step.count == 2


def test_buffers_that_do_not_change_are_not_kept():
    step = nn.Sequential(nn.InstanceNorm1d(4, track_running_stats=True))
    step.register_buffer("table", torch.ones(1000))
    recorder = Recorder(torch.device("cpu"))
    with recorder.recording(step) as recording:
        step(torch.randn(3, 4, 5))
    names = [name for _, name in recording.changes.buffers]
    assert names == ["running_mean", "running_var"]
