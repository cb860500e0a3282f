"""The flags under which forward and replay run."""

import pytest
import torch
from torch import nn

from sb_memeff.nnet.recompute import recompute_blocks
from sb_memeff.nnet.replay import backends
from sb_memeff.nnet.replay.backends import BackendFlags
from sb_memeff.nnet.reversible import AdditiveCoupling, ReversibleSequence

cudnn = torch.backends.cudnn


@pytest.fixture(autouse=True)
def flags():
    """Puts back what the tests change."""
    with cudnn.flags(enabled=True, benchmark=True, allow_tf32=True):
        with torch.backends.mkldnn.flags(enabled=True):
            yield


# Outside the module: its own list would be put back after the replay.
SEEN = []


class Looking(nn.Module):
    """Notes the flags that it runs under."""

    def forward(self, x):
        SEEN.append((cudnn.benchmark, cudnn.conv.fp32_precision))
        return torch.tanh(x)


def reversible(look):
    return ReversibleSequence([AdditiveCoupling(look, nn.Tanh())])


def recomputed(look):
    net = nn.Sequential(look)
    recompute_blocks(net, "*")
    return net


@pytest.mark.parametrize("build", [reversible, recomputed])
def test_benchmark_is_off_and_other_flags_are_those_of_forward(build):
    SEEN.clear()
    net = build(Looking())
    y = net(torch.randn(2, 4, 3, requires_grad=True))
    assert cudnn.benchmark
    before = cudnn.conv.fp32_precision
    cudnn.conv.fp32_precision = "ieee"
    try:
        y.sum().backward()
        assert cudnn.conv.fp32_precision == "ieee"
    finally:
        cudnn.conv.fp32_precision = before
    assert cudnn.benchmark
    assert SEEN == [(False, before)] * 2


def test_flags_come_back_after_an_error():
    with pytest.raises(ZeroDivisionError):
        with BackendFlags().applied():
            assert not cudnn.benchmark
            raise ZeroDivisionError
    assert cudnn.benchmark


def test_flags_that_an_older_torch_lacks(monkeypatch):
    """With torch 2.8, cudnn.conv and the attribute of cuda.matmul."""
    lacking = ["cudnn.attention.fp32_precision", "cudnn.fp32_rounding"]
    monkeypatch.setattr(backends, "_TF32", lacking)
    backends._known_flags.cache_clear()
    try:
        with BackendFlags().applied():
            assert not cudnn.benchmark
        assert not set(lacking).intersection(backends._known_flags())
    finally:
        backends._known_flags.cache_clear()


def test_both_interfaces_of_tf32_may_have_been_used():
    """torch raises an error if the older one is read after the newer."""
    before = cudnn.rnn.fp32_precision
    cudnn.rnn.fp32_precision = "ieee"
    try:
        with BackendFlags().applied():
            pass
    finally:
        cudnn.rnn.fp32_precision = before


OTHERS = {
    "cudnn.enabled": False,
    "cudnn.deterministic": True,
    "cudnn.allow_tf32": False,
    "mkldnn.enabled": False,
    "mkldnn.deterministic": True,
    "cuda.matmul.allow_fp16_reduced_precision_reduction": False,
    "cuda.matmul.allow_bf16_reduced_precision_reduction": False,
    "cuda.matmul.fp32_precision": "ieee",
    "cudnn.conv.fp32_precision": "ieee",
    "cudnn.rnn.fp32_precision": "ieee",
    "mkldnn.matmul.fp32_precision": "bf16",
    "mkldnn.conv.fp32_precision": "bf16",
    "mkldnn.rnn.fp32_precision": "bf16",
    "float32_matmul_precision": "medium",
}


@pytest.mark.parametrize("name", OTHERS)
def test_each_flag_is_that_of_forward_inside_and_the_callers_outside(name):
    if name in backends._TF32 and name not in backends._known_flags():
        pytest.skip("this torch has the older interface alone")
    before, everything = backends._read(name), backends._read_all()
    assert before != OTHERS[name]
    flags = BackendFlags()
    try:
        backends._write({name: OTHERS[name]})
        callers = backends._read_all()
        with flags.applied():
            assert backends._read(name) == before
        assert backends._read(name) == OTHERS[name]
        # Nor do other flags stay as they were set on the way.
        assert backends._read_all() == callers
    finally:
        # Writing one flag may change the value of another.
        backends._write({name: before, **everything})
    assert backends._read_all() == everything
