"""Which form of an operation runs."""

import pytest
import torch

from sb_memeff.nnet.transducer_loss import transducer_loss
from sb_memeff.ops import dispatch


class OnCuda(torch.Tensor):
    """A tensor of the CPU that says it is on a GPU."""

    is_cuda = True


def on_cuda(x, monkeypatch):
    """A plain tensor would be recognised by its type."""
    monkeypatch.setattr(dispatch.torch, "Tensor", OnCuda)
    return x.as_subclass(OnCuda)


@pytest.fixture(autouse=True)
def forget():
    dispatch._available.cache_clear()
    yield
    dispatch._available.cache_clear()


def test_the_cpu_runs_plain_torch():
    assert not dispatch.runs_fused(torch.zeros(3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float])
def test_a_gpu_runs_kernels(monkeypatch, dtype):
    monkeypatch.delenv(dispatch.SWITCH, raising=False)
    x = on_cuda(torch.zeros(3, dtype=dtype), monkeypatch)
    assert dispatch.runs_fused(x, x)
    assert not dispatch.runs_fused(x, torch.zeros(3))


def test_double_precision_runs_plain_torch(monkeypatch):
    assert not dispatch.runs_fused(
        on_cuda(torch.zeros(3).double(), monkeypatch)
    )


def test_the_switch(monkeypatch, caplog):
    x = on_cuda(torch.zeros(3), monkeypatch)
    monkeypatch.setenv(dispatch.SWITCH, "0")
    with caplog.at_level("INFO"):
        assert not dispatch.runs_fused(x) and not dispatch.runs_fused(x)
    assert caplog.text.count("SB_MEMEFF_KERNELS=0") == 1
    monkeypatch.setenv(dispatch.SWITCH, "1")
    assert dispatch.runs_fused(x)


def test_without_triton(monkeypatch, caplog):
    x = on_cuda(torch.zeros(3), monkeypatch)
    monkeypatch.delenv(dispatch.SWITCH, raising=False)
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: None)
    with caplog.at_level("INFO"):
        assert not dispatch.runs_fused(x)
    assert "Triton is not installed" in caplog.text


def test_fake_tensors_run_plain_torch():
    from sb_memeff.memory.fake import fake_tensors

    with fake_tensors():
        assert not dispatch.runs_fused(torch.zeros(3))


def test_subclasses_run_plain_torch(monkeypatch):
    """On a GPU too: they may have no memory that a kernel could read."""
    monkeypatch.delenv(dispatch.SWITCH, raising=False)
    x = torch.zeros(3).as_subclass(OnCuda)
    assert x.is_cuda and not dispatch.runs_fused(x)


def test_values_that_are_there():
    from sb_memeff.memory.fake import fake_tensors

    assert dispatch.has_values(torch.zeros(3))
    assert not dispatch.has_values(torch.zeros(3, device="meta"))
    with fake_tensors():
        assert not dispatch.has_values(torch.zeros(3))


def test_a_traced_lattice_is_whole():
    """A tracer sees the values: what it records must be all of the steps."""

    def loss(logits):
        lens, targets = torch.ones(1), torch.tensor([[1, 2]])
        return transducer_loss(logits, targets, lens, lens, 0)

    logits = torch.randn(1, 6, 3, 4)
    traced = torch.jit.trace(loss, (logits,), check_trace=False)
    other = torch.randn(1, 6, 3, 4)
    torch.testing.assert_close(traced(other), loss(other))
