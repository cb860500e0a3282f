"""The transducer loss, against other people's figures and programs.

tests/data/transducer_cases.json holds cases from the test suites of other
projects; each names its source.

Authors
 * The sb_memeff authors 2026
"""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchaudio
from speechbrain.nnet.losses import transducer_loss as speechbrain_loss

from sb_memeff.memory.tracker import StorageTracker
from sb_memeff.nnet.transducer_loss import TransducerJointLoss, logits_loss
from sb_memeff.nnet.transducer_loss.batch import REDUCTIONS
from sb_memeff.nnet.transducer_loss.logits_loss import transducer_loss

DATA = Path(__file__).resolve().parents[3] / "data"
CASES = json.loads((DATA / "transducer_cases.json").read_text())
FRAMES, TARGETS = (
    torch.tensor([20, 1, 7, 13, 20]),
    torch.tensor([8, 0, 3, 8, 1]),
)


def batch(dtype=torch.float64, vocabulary=11, blank=0):
    """Ragged: one frame, no target, fewer frames than targets."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 20, 9, vocabulary, generator=generator)
    targets = torch.randint(vocabulary - 1, (5, 8), generator=generator)
    targets += targets >= blank
    return logits.to(dtype).requires_grad_(), targets


def ours(logits, targets, blank=0, reduction="nll", **options):
    return transducer_loss(
        logits, targets, FRAMES / 20, TARGETS / 8, blank, reduction, **options
    )


@pytest.mark.parametrize("case", CASES, ids=[c["name"] for c in CASES])
def test_figures_of_other_projects(case):
    logits = torch.tensor(
        case["logits"], dtype=torch.float64, requires_grad=True
    )
    targets = torch.tensor(case["targets"])
    loss = transducer_loss(
        logits,
        targets,
        torch.tensor(case["logit_lengths"]) / logits.shape[1],
        torch.tensor(case["target_lengths"]) / targets.shape[1],
        case["blank"],
        reduction="nll",
        fastemit_lambda=case.get("fastemit_lambda", 0.0),
        clamp=case.get("clamp"),
    )
    expected = torch.tensor(case["expected_costs"], dtype=torch.float64)
    assert torch.allclose(loss, expected, rtol=0, atol=case["cost_tol"])
    if case.get("expected_grads") is None:
        return
    loss.sum().backward()
    expected = torch.tensor(case["expected_grads"], dtype=torch.float64)
    if case["grads_wrt"] == "log_probs":
        p = logits.detach().softmax(-1)
        expected = expected - p * expected.sum(-1, keepdim=True)
    assert torch.allclose(logits.grad, expected, rtol=0, atol=case["grad_tol"])


@pytest.mark.parametrize("blank", [0, 4, 10])
def test_torchaudio(blank):
    """On a ragged batch, with weights that differ in size and sign."""
    logits, targets = batch(torch.float32, blank=blank)
    weights = torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0])
    found = ours(logits, targets, blank)
    theirs = torchaudio.functional.rnnt_loss(
        logits,
        targets.int(),
        FRAMES.int(),
        TARGETS.int(),
        blank,
        reduction="none",
    )
    assert torch.allclose(found, theirs, rtol=1e-6)
    gradients = [
        torch.autograd.grad((loss * weights).sum(), logits)[0]
        for loss in (found, theirs)
    ]
    assert torch.allclose(*gradients, atol=3e-5)


def test_gradcheck():
    logits, targets = batch(vocabulary=4)
    logits = logits[:, :4, :3].detach().requires_grad_()
    frames, counts = (
        torch.tensor([4, 1, 2, 3, 4]),
        torch.tensor([2, 0, 2, 1, 0]),
    )

    def loss(x):
        return transducer_loss(
            x, targets[:, :2] % 3 + 1, frames / 4, counts / 2, 0, "nll"
        )

    assert torch.autograd.gradcheck(loss, logits)


SPEECHBRAIN = """
import torch, sys
from speechbrain.integrations.numba.transducer_loss import Transducer
data = torch.load(sys.argv[1])
logits = data["logits"].requires_grad_()
found = {}
for reduction in ("mean", "sum", "none"):
    loss = Transducer.apply(
        logits.log_softmax(-1), data["targets"].int(), data["frames"].int(),
        data["counts"].int(), 0, reduction)
    found[reduction] = loss.detach(), torch.autograd.grad(
        (data["weights"] * loss).sum() if loss.dim() else 2.5 * loss, logits)[0]
torch.save(found, sys.argv[1])
"""


def test_speechbrain(tmp_path):
    """SpeechBrain's own kernels, on numba's simulator of CUDA."""
    pytest.importorskip("numba")
    logits, targets = batch(torch.float32)
    logits = logits[:3, :5, :6].detach().clone().requires_grad_()
    targets = targets[:3, :5]
    frames, counts = torch.tensor([5, 2, 4]), torch.tensor([5, 1, 3])
    weights = torch.tensor([1.0, -2.0, 0.5])
    data = {"logits": logits.detach(), "targets": targets, "weights": weights}
    torch.save({**data, "frames": frames, "counts": counts}, tmp_path / "data")
    subprocess.run(
        [sys.executable, "-c", SPEECHBRAIN, str(tmp_path / "data")],
        env={**os.environ, "NUMBA_ENABLE_CUDASIM": "1"},
        check=True,
    )
    theirs = torch.load(tmp_path / "data")
    for reduction, (value, gradient) in theirs.items():
        loss = transducer_loss(
            logits, targets, frames / 5, counts / 5, 0, reduction
        )
        assert torch.allclose(loss, value, rtol=1e-5)
        total = (weights * loss).sum() if loss.dim() else 2.5 * loss
        found = torch.autograd.grad(total, logits)[0]
        assert torch.allclose(found, gradient, atol=2e-5)


def test_speechbrains_default():
    """Neither loss may have another default than SpeechBrain's function."""
    for function in (speechbrain_loss, transducer_loss, TransducerJointLoss):
        default = inspect.signature(function).parameters["reduction"].default
        assert default == "mean"


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_plain_reductions_are_torchaudios(reduction):
    logits, targets = batch(torch.float32)
    theirs = torchaudio.functional.rnnt_loss(
        logits,
        targets.int(),
        FRAMES.int(),
        TARGETS.int(),
        0,
        reduction=reduction,
    )
    found = ours(logits, targets, reduction=f"nll_{reduction}")
    assert torch.allclose(found, theirs, rtol=1e-6)
    gradients = [torch.autograd.grad(x, logits)[0] for x in (found, theirs)]
    assert torch.allclose(*gradients, atol=1e-5)


def test_reductions():
    logits, targets = batch()
    nll = ours(logits, targets)
    total = torch.autograd.grad(nll.sum(), logits, retain_graph=True)[0]
    values = {
        "mean": ((nll / FRAMES).mean(), 1),
        "sum": ((nll / FRAMES).sum(), 1),
        "none": (nll / FRAMES, 1),
        "nll_mean": (nll.mean(), 0.2),
        "nll_sum": (nll.sum(), 1),
        "nll": (nll, 1),
    }
    assert values.keys() == REDUCTIONS.keys()
    for reduction, (value, scale) in values.items():
        loss = ours(logits, targets, reduction=reduction)
        assert torch.allclose(loss, value)
        gradient = torch.autograd.grad(loss.sum(), logits)[0]
        assert torch.allclose(gradient, scale * total)


def test_clamp_comes_before_the_scale():
    logits, targets = batch()
    plain = torch.autograd.grad(ours(logits, targets).sum(), logits)[0]
    loss = 100 * ours(logits, targets, clamp=0.05).mean()
    gradient = torch.autograd.grad(loss, logits)[0]
    assert plain.abs().max() > 0.2
    assert torch.allclose(gradient, 20 * plain.clamp(-0.05, 0.05))


def test_half_precision_is_computed_in_float32():
    logits, targets = batch(torch.bfloat16)
    wide = logits.detach().float().requires_grad_()
    assert torch.equal(ours(logits, targets), ours(wide, targets))
    gradient = torch.autograd.grad(ours(logits, targets).sum(), logits)[0]
    exact = torch.autograd.grad(ours(wide, targets).sum(), wide)[0]
    assert gradient.dtype == torch.bfloat16
    assert torch.equal(gradient, exact.bfloat16())


def test_padding_is_not_looked_at():
    logits, targets = batch()
    loss = ours(logits, targets)
    dirty = logits.detach().clone()
    odd = targets.clone()
    for b, (t, u) in enumerate(zip(FRAMES, TARGETS)):
        dirty[b, t:] = torch.nan
        dirty[b, :, u + 1 :] = torch.inf
        odd[b, u:] = -1
    dirty.requires_grad_()
    assert torch.equal(ours(dirty, odd), loss)
    gradients = [
        torch.autograd.grad(value.sum(), x)[0]
        for value, x in ((ours(dirty, odd), dirty), (loss, logits))
    ]
    assert torch.equal(*gradients)


def test_one_sample_that_is_not_finite_does_not_touch_the_others():
    logits, targets = batch()
    bad = logits.detach().clone()
    bad[2, 3, 1, 4] = torch.nan
    bad.requires_grad_()
    loss = ours(bad, targets)
    assert loss.isnan().tolist() == [False, False, True, False, False]
    weights = torch.tensor([1.0, 1, 0, 1, 1])
    kept = torch.where(weights > 0, loss, 0)
    gradient = torch.autograd.grad(kept.sum(), bad)[0]
    clean = torch.autograd.grad(
        (ours(logits, targets) * weights).sum(), logits
    )[0]
    rest = [0, 1, 3, 4]
    assert torch.equal(gradient[rest], clean[rest])


def test_chunks_are_one_computation(monkeypatch):
    logits, targets = batch()
    whole = torch.autograd.grad(ours(logits, targets).sum(), logits)[0]
    # 13 rows at a time: of no lattice's size.
    monkeypatch.setattr(logits_loss, "CHUNK", 13 * 11)
    parts = torch.autograd.grad(ours(logits, targets).sum(), logits)[0]
    assert torch.allclose(whole, parts, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("overwrite", [False, True])
def test_memory(overwrite):
    """One more tensor of the logits' size, or none."""
    logits = torch.randn(4, 60, 21, 500, requires_grad=True)
    targets = torch.randint(1, 500, (4, 20))
    full = torch.ones(4)
    with StorageTracker() as tracker:
        transducer_loss(
            logits, targets, full, full, 0, overwrite_logits=overwrite
        ).backward()
    # The rest are chunks and planes. (The last gradient is kept as .grad.)
    size = logits.nbytes
    assert tracker.peak < ((0 if overwrite else 1) + 0.25) * size + 60e6


def test_overwriting_gives_the_same_gradient():
    logits, targets = batch()
    expected = torch.autograd.grad(ours(logits, targets).sum(), logits)[0]
    made = logits * 1.0
    loss = ours(made, targets, overwrite_logits=True)
    gradient = torch.autograd.grad(loss.sum(), logits)[0]
    assert torch.allclose(gradient, expected)
    assert made.data_ptr() and torch.allclose(made, expected)


def swapped(x, a, b):
    return x.transpose(a, b).contiguous().transpose(a, b)


# The same logits with other strides.
LAYOUTS = {
    "transposed": lambda x: swapped(x, 0, 1),
    "channels_first": lambda x: swapped(x, 1, 3),
    "sliced": lambda x: torch.nn.functional.pad(x, (1, 2, 1, 0))[
        :, :, 1:, 1:-2
    ],
    "every_second": lambda x: x.repeat_interleave(2, 3)[..., ::2],
}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_of_any_strides(layout, overwrite):
    logits, targets = batch()
    weights = torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0])
    value = ours(logits, targets)
    expected = torch.autograd.grad((value * weights).sum(), logits)[0]
    strided = LAYOUTS[layout](logits.detach())
    assert not strided.is_contiguous()
    leaf = strided.clone(memory_format=torch.preserve_format)
    for x in (strided.requires_grad_(), leaf.requires_grad_()):
        found = ours(x, targets, overwrite_logits=overwrite)
        assert torch.equal(found, value)
        gradient = torch.autograd.grad((found * weights).sum(), x)[0]
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("axis", range(4))
def test_expanded_logits(axis, overwrite):
    """Elements that share memory must not share a gradient."""
    logits, targets = batch()
    small = logits.detach().narrow(axis, 0, 1).requires_grad_()
    full = small.expand(logits.shape)
    whole = full.detach().clone().requires_grad_()
    expected = torch.autograd.grad(ours(whole, targets).sum(), whole)[0]
    expected = expected.sum(axis, keepdim=True)
    loss = ours(full, targets, overwrite_logits=overwrite)
    before = small.detach().clone()
    gradient = torch.autograd.grad(loss.sum(), small)[0]
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(small, before)


@pytest.mark.parametrize(
    "dtype",
    [
        torch.int8,
        torch.int16,
        torch.int32,
        torch.uint8,
        torch.uint16,
        torch.uint32,
        torch.uint64,
    ],
)
def test_targets_of_any_integer_dtype_and_strides(dtype):
    logits, targets = batch()
    value = ours(logits, targets)
    expected = torch.autograd.grad(value.sum(), logits)[0]
    for some in (targets.to(dtype), swapped(targets, 0, 1).to(dtype)):
        found = ours(logits, some)
        gradient = torch.autograd.grad(found.sum(), logits)[0]
        assert torch.equal(found, value) and torch.equal(gradient, expected)


def test_without_gradients_no_tensor_is_kept():
    logits, targets = batch()
    with torch.no_grad():
        assert not ours(logits, targets).requires_grad


def test_second_backward():
    logits, targets = batch()
    loss = ours(logits, targets).sum()
    first = torch.autograd.grad(loss, logits, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, logits)[0])
    # Beside another term the missing derivative would not be noticed.
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(
            ours(logits, targets).sum(), logits, create_graph=True
        )


def call(**changes):
    arguments = {
        "logits": torch.zeros(2, 3, 3, 5),
        "targets": torch.tensor([[1, 2], [3, 4]]),
        "input_lens": torch.ones(2),
        "target_lens": torch.ones(2),
        "blank_index": 0,
    }
    return transducer_loss(**{**arguments, **changes})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"logits": torch.zeros(2, 3, 5)}, r"\[B, T, U\+1, V\]"),
        ({"logits": torch.zeros(0, 3, 3, 5)}, "not empty"),
        ({"logits": torch.zeros(2, 3, 3, 5).long()}, "int64"),
        ({"logits": torch.zeros(2, 3, 2, 5)}, r"\[B, U\] = \[2, 1\]"),
        ({"targets": torch.ones(2, 2)}, "integers, not torch.float32"),
        ({"targets": torch.ones(2, 2).bool()}, "integers, not torch.bool"),
        (
            {"targets": torch.tensor([[1, 2], [3, 0]])},
            "Sample 1: target 1 is 0",
        ),
        (
            {"targets": torch.tensor([[1, 5], [3, 4]])},
            "Sample 0: target 1 is 5",
        ),
        (
            {"targets": torch.tensor([[1, 2], [-1, 4]])},
            "Sample 1: target 0 is -1",
        ),
        ({"blank_index": 5}, "blank_index=5"),
        ({"blank_index": -1}, "blank_index=-1"),
        ({"input_lens": torch.tensor([1.0, 1.4])}, "Sample 1.*frames, 1.4"),
        ({"input_lens": torch.tensor([3.0, 2.0])}, "Sample 0.*relative"),
        ({"input_lens": torch.tensor([1.0, 0.0])}, "Sample 1 has no frame"),
        ({"target_lens": torch.tensor([-1.0, 1.0])}, "Sample 0.*targets, -1"),
        ({"target_lens": torch.tensor([torch.nan, 1])}, "Sample 0.*nan"),
        ({"target_lens": torch.ones(3)}, r"target_lens must be \[B\]"),
        (
            {"reduction": "batchmean"},
            "reduction='batchmean'.*nll_mean: mean of",
        ),
        ({"fastemit_lambda": -0.1}, "fastemit_lambda=-0.1"),
        ({"clamp": 0.0}, "clamp=0.0"),
        ({"fastemit_lambda": torch.nan}, "fastemit_lambda=nan"),
        ({"clamp": torch.nan}, "clamp=nan"),
        ({"targets": torch.ones(2, 2).long().to("meta")}, "one device"),
    ],
)
def test_clear_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        call(**changes)
