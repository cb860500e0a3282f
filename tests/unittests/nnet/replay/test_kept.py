"""Small results that replays take over from forward."""

import pytest
import torch
from torch import nn

from sb_memeff.nnet.replay.kept import keep, keeping, replaying
from sb_memeff.nnet.replay.recorder import Recorder


class Drawing(nn.Module):
    """Adds a number that is another one whenever it is computed."""

    count = 0

    def draw(self):
        Drawing.count += 1
        return torch.tensor(float(Drawing.count))

    def forward(self, x):
        return 10 * x + keep(self, self.draw)


def test_outside_of_calls_it_is_computed():
    assert [keep("a", lambda n=n: n) for n in range(2)] == [0, 1]


def test_replays_take_what_forward_computed():
    module = nn.Sequential(Drawing(), Drawing())
    recorder = Recorder(torch.device("cpu"))
    first, recording = recorder.record(module, torch.zeros(()))
    second, other = recorder.record(module, torch.zeros(()))
    assert first != second
    count = Drawing.count
    for expected, of_call in ((first, recording), (second, other)) * 2:
        with recorder.replay(module, of_call):
            assert module(torch.zeros(())) == expected
    assert Drawing.count == count


def test_each_owner_has_its_own():
    """In any order, with more and fewer of them than in forward."""
    results = {}
    with keeping(results):
        for owner, value in (("a", 1), ("b", False), ("a", None)):
            keep(owner, lambda value=value: value)
    with replaying(results):
        assert keep("b", lambda: 9) is False
        assert keep("new", lambda: 7) == 7
        assert keep("a", lambda: 9) == 1
        assert keep("a", lambda: 9) is None
        assert keep("a", lambda: 9) == 9


def test_the_innermost_call_keeps():
    results, inner = {}, {}
    with keeping(results):
        keep("a", lambda: 1)
        with keeping(inner):
            keep("a", lambda: 2)
        keep("a", lambda: 3)
    assert results == {"a": [1, 3]} and inner == {"a": [2]}
    with replaying(results):
        assert keep("a", lambda: 9) == 1
        with keeping({}):
            assert keep("a", lambda: 8) == 8
        assert keep("a", lambda: 9) == 3
    assert keep("a", lambda: 7) == 7


def test_an_error_ends_it():
    results = {}
    with pytest.raises(KeyError), keeping(results):
        raise KeyError
    keep("a", lambda: 1)
    assert not results
