"""A replay repeats the call and leaves no trace."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from sb_memeff.nnet.replay import random_states
from sb_memeff.nnet.replay.recorder import (
    Recorder,
    check_fingerprint,
    fingerprint,
    without_trace,
)


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


@pytest.mark.parametrize("where", ["recording", "replay"])
def test_the_callers_cache_of_weights_comes_back_after_an_error(where):
    layer = parametrizations.weight_norm(nn.Linear(3, 3))
    recorder = Recorder(torch.device("cpu"))
    _, recording = recorder.record(layer, torch.ones(2, 3))
    context = (
        recorder.recording(layer)
        if where == "recording"
        else recorder.replay(layer, recording)
    )
    with parametrize.cached():
        weight = layer.weight
        with pytest.raises(ZeroDivisionError):
            with context:
                raise ZeroDivisionError
        assert layer.weight is weight


def test_generators_come_back_if_one_cannot_be_written():
    dropout = nn.Dropout(0.5)
    recorder = Recorder(torch.device("cpu"))
    _, recording = recorder.record(dropout, torch.ones(4))

    def fail(state):
        if state == "before":
            raise ZeroDivisionError

    broken = random_states.Source(lambda: "now", fail)
    recording.random_states.append((broken, "before"))
    state = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError):
        with recorder.replay(dropout, recording):
            pass
    assert torch.equal(torch.get_rng_state(), state)


def test_arguments_by_name():
    def scaled(x, *, scale):
        return x * scale

    recorder = Recorder(torch.device("cpu"))
    y, _ = recorder.record(scaled, torch.ones(2), scale=3.0)
    assert y.tolist() == [3, 3]


@pytest.mark.parametrize("follow", [True, False])
def test_generators_of_torch_are_followed_if_so_wished(follow):
    """Those of modules too."""
    generator = torch.Generator()

    class Drawing(nn.Module):
        def __init__(self):
            super().__init__()
            self.own = generator

        def forward(self):
            return torch.rand(2) + torch.rand(2, generator=self.own)

    drawing = Drawing()
    recorder = Recorder(torch.device("cpu"), follow_random=follow)
    first, recording = recorder.record(drawing)
    assert (recording.random_states is not None) == follow
    with recorder.replay(drawing, recording):
        assert torch.equal(drawing(), first) == follow


def test_a_layer_without_a_bias_has_a_fingerprint():
    layer = nn.Linear(3, 3, bias=False)
    assert layer._parameters["bias"] is None
    check_fingerprint(fingerprint(layer), layer, "owner")


def test_functions_without_random_numbers_store_no_state():
    recorder = Recorder(torch.device("cpu"))
    _, recording = recorder.record(nn.ReLU(), torch.ones(4))
    assert recording.random_states is None
    assert recording.changes.buffers == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_replay_restores_the_autocast_state_of_the_forward_pass(dtype):
    linear = nn.Linear(4, 4)
    x = torch.ones(2, 4)
    with torch.autocast("cpu", dtype):
        recorder = Recorder(x.device)
        _, recording = recorder.record(linear, x)
    with recorder.replay(linear, recording):
        assert linear(x).dtype == dtype
    assert linear(x).dtype == torch.float32
    recorder = Recorder(x.device)
    _, recording = recorder.record(linear, x)
    with torch.autocast("cpu", dtype):
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


def test_both_passes_run_without_cudnns_benchmark(monkeypatch):
    """And with the flags of forward, whatever they are in backward."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    found = []

    def look():
        cudnn = torch.backends.cudnn
        found.append((cudnn.benchmark, cudnn.deterministic))

    recorder = Recorder(torch.device("cpu"))
    _, recording = recorder.record(look)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    with recorder.replay(look, recording):
        look()
    assert found == [(False, False), (False, False)]
    assert torch.backends.cudnn.benchmark
    assert torch.backends.cudnn.deterministic


def test_cached_weights_of_the_caller_are_not_used():
    """They have a graph of their own, which a replay cannot repeat."""
    layer = parametrizations.weight_norm(nn.Linear(3, 3))
    recorder = Recorder(torch.device("cpu"))
    with parametrize.cached():
        weight = layer.weight
        inside, recording = recorder.record(lambda: layer.weight)
        with recorder.replay(layer, recording):
            again = layer.weight
        # Nor where the call has a cache of its own.
        with recorder.recording(layer), parametrize.cached():
            assert layer.weight is not weight
            assert layer.weight is layer.weight
        assert layer.weight is weight
    assert layer.weight is not weight
    assert inside is not weight and again is not weight
    assert torch.equal(inside, again)


def network():
    return nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Dropout()))


def step_back(p):
    """The old address becomes free, and is what is allocated next."""
    values = p.data.clone()
    p.data = torch.empty(0)
    p.data = torch.empty_like(values)


CHANGES = {
    "0.weight was": [
        lambda net: net[0].weight.detach().add_(0),
        lambda net: setattr(net[0].weight, "data", torch.ones(3, 3)),
        lambda net: step_back(net[0].weight),
    ],
    "0.bias was": [
        lambda net: net[0].bias.requires_grad_(False),
        # Another part of the same memory.
        lambda net: setattr(
            net[0].bias, "data", net[0].bias.data.as_strided((2,), (1,), 1)
        ),
    ],
    r"eval\(\) of 1 was": [lambda net: net[1].train(False)],
    r"eval\(\) of 1.0 was": [lambda net: net[1][0].eval()],
    r"eval\(\) of it was": [lambda net: setattr(net, "training", False)],
    "the set of parameters was": [lambda net: net.append(nn.Linear(3, 3))],
    "a module was": [lambda net: net.append(nn.Dropout())],
}


@pytest.mark.parametrize(
    "message, change", [(m, c) for m, cs in CHANGES.items() for c in cs]
)
def test_changes_between_forward_and_backward(message, change):
    net = network()
    before = fingerprint(net)
    check_fingerprint(before, net, "owner")
    change(net)
    with pytest.raises(RuntimeError, match=message):
        check_fingerprint(before, net, "owner")


def test_weights_that_may_change():
    net = network()
    before = fingerprint(net, {id(net[0].weight)})
    with torch.no_grad():
        net[0].weight.add_(1)
    check_fingerprint(before, net, "owner")
    with torch.no_grad():
        net[0].bias.add_(1)
    with pytest.raises(RuntimeError, match="owner: block.0.bias was changed"):
        check_fingerprint(before, net, "owner", "block.")


def test_a_weight_in_place_of_one_that_may_change():
    layer = nn.Linear(2, 2)
    before = fingerprint(layer, frozenset({id(layer.weight)}))
    layer.weight = nn.Parameter(torch.ones(2, 2))
    with pytest.raises(RuntimeError, match="weight was changed"):
        check_fingerprint(before, layer, "test")
