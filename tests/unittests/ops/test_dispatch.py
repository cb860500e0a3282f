"""Which form of an operation runs."""

import sys

import numba
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sb_memeff.memory.fake import fake_tensors
from sb_memeff.nnet.transducer_loss import transducer_loss
from sb_memeff.ops import dispatch
from sb_memeff.optim import SGD8bit


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
    with fake_tensors():
        assert not dispatch.runs_fused(torch.zeros(3))


def test_subclasses_run_plain_torch(monkeypatch):
    """On a GPU too: they may have no memory that a kernel could read."""
    monkeypatch.delenv(dispatch.SWITCH, raising=False)
    x = torch.zeros(3).as_subclass(OnCuda)
    assert x.is_cuda and not dispatch.runs_fused(x)


def test_the_package_of_kernels(monkeypatch):
    monkeypatch.delenv(dispatch.SWITCH, raising=False)
    x = torch.zeros(3)
    assert dispatch.package_of_kernels(x, torch.nn.Parameter(x)) == "numba"
    for other in (x.double(), x.half(), x.to("meta"), x.as_subclass(OnCuda)):
        assert dispatch.package_of_kernels(x, other) is None
    with fake_tensors():
        assert dispatch.package_of_kernels(torch.zeros(3)) is None
    x = on_cuda(x, monkeypatch)
    assert dispatch.package_of_kernels(x, x) == "triton"


def no_switch(monkeypatch, folder):
    monkeypatch.setenv(dispatch.SWITCH, "0")


def no_numba(monkeypatch, folder):
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: None)


def broken_numba(monkeypatch, folder):
    (folder / "numba.py").write_text("raise AttributeError('row_stack')")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "numba", raising=False)


def no_compiler(monkeypatch, folder):
    monkeypatch.setattr(numba.config, "DISABLE_JIT", 1)


@pytest.mark.parametrize(
    "change, reason",
    [
        (no_switch, "SB_MEMEFF_KERNELS=0"),
        (no_numba, "numba is not installed"),
        (broken_numba, "numba cannot be imported: row_stack"),
        (no_compiler, "NUMBA_DISABLE_JIT"),
    ],
)
def test_optimizers_without_numba(
    monkeypatch, caplog, tmp_path, change, reason
):
    """The plain form runs, and the reason is logged once."""
    monkeypatch.delenv(dispatch.SWITCH, raising=False)
    change(monkeypatch, tmp_path)
    weight = torch.nn.Parameter(torch.zeros(80, 80))
    weight.grad = torch.ones(80, 80)
    optimizer = SGD8bit([weight], lr=1.0, momentum=0.5)
    with caplog.at_level("INFO"):
        for _ in range(3):
            optimizer.step()
    assert caplog.text.count(reason) == 1
    assert (weight == -(1 + 1.5 + 1.75)).all()


def test_values_that_are_there():
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


@pytest.mark.parametrize(
    "x", [torch._efficientzerotensor(3), torch._neg_view(torch.ones(3))]
)
def test_kernels_do_not_read_memory_without_the_values(monkeypatch, x):
    monkeypatch.setattr(dispatch, "is_on_gpu", lambda x: True)
    assert dispatch.runs_fused(torch.ones(3))
    assert not dispatch.runs_fused(torch.ones(3), x)
    monkeypatch.undo()
    assert dispatch.package_of_kernels(torch.ones(3)) == "numba"
    assert dispatch.package_of_kernels(torch.ones(3), x) is None


def test_real_parameters_among_fake_tensors():
    """No kernel updates them while results are fake."""
    weight = torch.nn.Parameter(torch.zeros(80, 80))
    optimizer = SGD8bit([weight], lr=1.0, momentum=0.5)
    for _ in range(2):
        weight.grad = torch.ones(80, 80)
        optimizer.step()
    before = weight.detach().clone()
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert not dispatch.has_values(weight)
        assert dispatch.package_of_kernels(weight) is None
        optimizer.step()
    assert torch.equal(weight, before)
