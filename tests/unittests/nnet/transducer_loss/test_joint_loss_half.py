"""The joint loss in half precision, against all logits at once.

Authors
 * The sb_memeff authors 2026
"""

import functools

import pytest
import torch
from speechbrain.nnet.transducer.transducer_joint import Transducer_joint
from torch import nn

from sb_memeff.nnet.transducer_loss.joint_loss import TransducerJointLoss

METHODS = ("tiled", "samplewise")
every_method = pytest.mark.parametrize("method", METHODS)
every_reduction = pytest.mark.parametrize(
    "reduction", ["mean", "nll_mean", "nll_sum", "nll"]
)


@functools.cache
def steps_taken(method, reduction, frames, targets, steps):
    """How many steps GradScaler lets through, in fp16 from its usual scale."""
    torch.manual_seed(0)
    encoder, classifier = nn.Linear(64, 64), nn.Linear(64, 100)
    loss = TransducerJointLoss(
        Transducer_joint(), classifier, reduction=reduction, method=method
    )
    params = [*encoder.parameters(), *classifier.parameters()]
    optimizer = torch.optim.SGD(params, lr=1e-4)
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    x = torch.randn(2, frames, 64)
    pred = torch.randn(2, targets + 1, 64).half()
    labels = torch.randint(1, 100, (2, targets))
    # Samples that weigh differently, where the user sees them one by one.
    weights = torch.tensor([1.0, 0.25]) if reduction == "nll" else 1.0
    taken = 0
    for _ in range(steps):
        with torch.autocast("cpu", torch.float16):
            value = loss(encoder(x), pred, labels, torch.ones(2), torch.ones(2))
        scaler.scale((value * weights).mean()).backward()
        before = classifier.weight.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        taken += not torch.equal(before, classifier.weight)
    return taken


@every_reduction
@every_method
def test_grad_scaler_does_not_skip_steps(method, reduction):
    taken = steps_taken(method, reduction, 30, 8, 40)
    assert taken >= steps_taken("batched", reduction, 30, 8, 40)
    assert taken >= 30


@pytest.mark.parametrize("reduction", ["mean", "nll"])
@every_method
def test_grad_scaler_with_long_samples(method, reduction):
    taken = steps_taken(method, reduction, 250, 50, 10)
    assert taken >= max(3, steps_taken("batched", reduction, 250, 50, 10))


FRAMES, COUNTS = torch.tensor([40, 23, 31]) / 40, torch.tensor([9, 9, 4]) / 9


def gradients(dtype, method, reduction, scale, half_modules=False):
    """Of encoder, predictor and weights; dtype float64 is the truth."""
    torch.manual_seed(0)
    hidden, vocabulary = 32, 60
    joint = Transducer_joint(nn.Linear(2 * hidden, 24), "concat", nn.Tanh)
    classifier = nn.Linear(24, vocabulary)
    enc, pred = torch.randn(3, 40, hidden), torch.randn(3, 10, hidden)
    targets = torch.randint(1, vocabulary, (3, 9))
    exact = dtype == torch.float64
    low = torch.bfloat16 if half_modules else torch.float32
    given = [enc, pred]
    for part in (joint, classifier):
        given += [p.detach() for p in part.parameters()]
    # Weights that half precision has, so that it begins with no error.
    given = [x.to(low).to(torch.float64 if exact else low) for x in given]
    enc, pred, *weights = (x.requires_grad_() for x in given)
    for part in (joint, classifier):
        for module in part.modules():
            for name in list(module._parameters):
                module._parameters[name] = nn.Parameter(weights.pop(0).detach())
    loss = TransducerJointLoss(
        joint, classifier, reduction=reduction, method=method, max_rows=40,
        occupancy_floor=0.0,
    )  # fmt: skip
    with torch.autocast("cpu", dtype, enabled=not (exact or half_modules)):
        value = loss(enc, pred, targets, FRAMES, COUNTS)
    if reduction == "nll":
        value = (value * torch.tensor([1.0, 0.5, -2.0])).sum()
    found = torch.autograd.grad(scale * value, [enc, pred, *loss.parameters()])
    return [g.double() / scale for g in found]


def errors(found, truth):
    return [((a - b).norm() / b.norm()).item() for a, b in zip(found, truth)]


def assert_no_worse(ours, theirs):
    """Rounding errors are random: a tenth for one part, none for all."""
    assert all(a < 1.1 * b for a, b in zip(ours, theirs))
    assert sum(ours) < 1.01 * sum(theirs)


@pytest.mark.parametrize("reduction", ["nll_sum", "nll"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@every_method
def test_gradients_are_as_close_as_batched(method, dtype, reduction):
    """Under autocast, at a scale of the loss that suits batched."""
    truth = gradients(torch.float64, "batched", reduction, 1.0)
    theirs = errors(gradients(dtype, "batched", reduction, 256.0), truth)
    ours = errors(gradients(dtype, method, reduction, 256.0), truth)
    assert all(0 < b < 0.05 for b in theirs)
    assert_no_worse(ours, theirs)


@pytest.mark.parametrize("reduction", ["nll_sum", "nll"])
@every_method
def test_bfloat16_modules_are_as_close_as_batched(method, reduction):
    """88 tiles: a sum of them in bfloat16 would be off by per cents."""
    dtype = torch.bfloat16
    truth = gradients(torch.float64, "batched", reduction, 1.0, True)
    theirs = errors(gradients(dtype, "batched", reduction, 1.0, True), truth)
    ours = errors(gradients(dtype, method, reduction, 1.0, True), truth)
    assert_no_worse(ours, theirs)


@every_method
def test_float16_without_a_scale(method):
    """Formed in forward, gradients do not depend on the scale of the loss."""
    truth = gradients(torch.float64, "batched", "nll_sum", 1.0)
    for scale in (2.0**-10, 1.0, 2.0**40):
        found = gradients(torch.float16, method, "nll_sum", scale)
        assert max(errors(found, truth)) < 5e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@every_method
def test_backward_inside_autocast(method, dtype):
    """The float32 sums stay float32 there."""
    torch.manual_seed(0)
    classifier = nn.Linear(8, 12)
    loss = TransducerJointLoss(
        Transducer_joint(), classifier, reduction="nll", method=method
    )
    enc, pred = torch.randn(2, 9, 8), torch.randn(2, 5, 8)
    targets, ones = torch.randint(1, 12, (2, 4)), torch.ones(2)
    found = []
    for inside in (True, False):
        with torch.autocast("cpu", dtype):
            value = loss(enc, pred, targets, ones, ones).sum()
            if inside:
                found.append(torch.autograd.grad(value, classifier.weight)[0])
        if not inside:
            found.append(torch.autograd.grad(value, classifier.weight)[0])
    assert torch.equal(*found)
