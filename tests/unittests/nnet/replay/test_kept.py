"""Small results that replays take over from forward."""

import torch
from torch import nn

from sb_memeff.nnet.replay.kept import keep, keeping, replaying
from sb_memeff.nnet.replay.recorder import Recorder


class Counted(nn.Module):
    """Adds a number that is drawn anew whenever it is computed."""

    def __init__(self, inner=None):
        super().__init__()
        self.inner = inner
        self.calls = 0

    def forward(self, x):
        def draw():
            self.calls += 1
            return torch.tensor(10.0 ** len(drawn))

        def compute():
            value = draw()
            drawn.append(value)
            return value

        x = x + keep(compute)
        return x if self.inner is None else self.inner(x)


drawn = []


def test_outside_of_calls_it_is_computed():
    assert [keep(lambda n=n: n) for n in range(2)] == [0, 1]


def test_replays_take_what_forward_computed():
    drawn.clear()
    module = nn.Sequential(Counted(), Counted())
    recorder = Recorder(torch.device("cpu"))
    first, recording = recorder.record(module, torch.zeros(()))
    second, other = recorder.record(module, torch.zeros(()))
    assert first != second
    for expected, of_call in ((first, recording), (second, other)) * 2:
        with recorder.replay(module, of_call):
            assert module(torch.zeros(())) == expected
    assert len(drawn) == 4


def test_the_innermost_call_keeps():
    results, inner = [], []
    with keeping(results):
        keep(lambda: "a")
        with keeping(inner):
            keep(lambda: "b")
        keep(lambda: "c")
    assert results == ["a", "c"] and inner == ["b"]
    with replaying(results):
        assert keep(lambda: "x") == "a"
        with keeping([]):
            assert keep(lambda: "new") == "new"
        assert keep(lambda: "x") == "c"
        # More than forward: what follows finds out.
        assert keep(lambda: "x") == "x"
    assert keep(lambda: "outside") == "outside"


def test_an_error_ends_it():
    results = []
    try:
        with keeping(results):
            raise KeyError
    except KeyError:
        pass
    keep(lambda: 1)
    assert not results
