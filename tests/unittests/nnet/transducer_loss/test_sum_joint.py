"""The usual joint network by kernels against its modules.

Authors
 * The sb_memeff authors 2026
"""

import copy

import pytest
import speechbrain.nnet.linear
import torch
from speechbrain.nnet.transducer.transducer_joint import Transducer_joint
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sb_memeff.nnet.transducer_loss import sum_joint
from sb_memeff.nnet.transducer_loss.cells import CellLogits
from sb_memeff.nnet.transducer_loss.joint_loss import TransducerJointLoss
from sb_memeff.nnet.transducer_loss.sum_joint import SumJoint
from sb_memeff.ops import logit_rows as rows
from sb_memeff.ops.triton import (
    joint as joint_kernels,
    logit_rows,
)
from tests.unittests.ops.kernel import DEVICE, error, poison
from tests.unittests.ops.transducer_kernels import ACTIVATIONS, slope_of

B, T, U, H, V = 3, 7, 4, 33, 11
# The interpreter cuts bfloat16 off, where a GPU rounds.
BOUNDS = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}


@pytest.fixture
def kernels(monkeypatch):
    """A function that chooses kernels or modules for what follows."""

    def choose(fused):
        def runs(*tensors):
            return fused and tensors[0].dtype != torch.float64

        monkeypatch.setattr(sum_joint, "runs_fused", runs)
        monkeypatch.setattr(rows, "runs_fused", runs)

    # SpeechBrain allows TensorFloat-32 when it is imported.
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield choose
    torch.backends.cuda.matmul.allow_tf32 = allowed


def modules(activation="leaky_relu", bias=True, classifier=nn.Linear):
    torch.manual_seed(0)
    if classifier is nn.Linear:
        classifier = nn.Linear(H, V, bias=bias)
    else:
        classifier = speechbrain.nnet.linear.Linear(V, input_size=H, bias=bias)
    joint = Transducer_joint(nonlinearity=ACTIVATIONS[activation])
    return joint.to(DEVICE), classifier.to(DEVICE)


def batch(dtype=torch.float32, targets=U):
    torch.manual_seed(1)
    enc, pred = torch.randn(B, T, H), torch.randn(B, targets + 1, H)
    symbols = torch.randint(1, V, (B, targets))
    lengths = torch.tensor([1, 0.6, 0.3]), torch.tensor([0.5, 1, 0.0])
    return (
        enc.to(DEVICE, dtype),
        pred.to(DEVICE, dtype),
        symbols.to(DEVICE),
        *(x.to(DEVICE) for x in lengths),
    )


def results(nets, inputs, weigh=False, **options):
    """Loss and gradients of encoder, predictor and weights."""
    net, classifier = copy.deepcopy(nets)
    enc, pred, *others = inputs
    enc = enc.detach().requires_grad_()
    pred = pred.detach().requires_grad_()
    options = {"reduction": "nll" if weigh else "nll_sum", **options}
    loss = TransducerJointLoss(net, classifier, **{"max_rows": 20, **options})(
        enc, pred, *others
    )
    value = loss
    if weigh:
        value = loss @ torch.tensor([1.0, 0.0, -2.0]).to(loss)
    value.backward()
    found = [loss.detach(), enc.grad, pred.grad]
    return found + [p.grad for p in classifier.parameters()]


def wide(nets, inputs, **options):
    """The same by the modules in float64."""
    nets = [copy.deepcopy(net).double() for net in nets]
    inputs = [x.double() if x.is_floating_point() else x for x in inputs]
    return results(nets, inputs, **options)


def test_every_activation_of_the_kernels_is_tested():
    assert set(ACTIVATIONS) == set(joint_kernels.ACTIVATIONS)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", BOUNDS)
def test_close_to_float64(kernels, monkeypatch, activation, dtype):
    nets = [net.to(dtype) for net in modules(activation)]
    inputs = batch(dtype)
    kernels(False)
    exact = wide(nets, inputs)
    plain = results(nets, inputs)
    kernels(True)
    poison(monkeypatch)
    found = results(nets, inputs)
    for ours, theirs, right in zip(found, plain, exact, strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        bound = max(BOUNDS[dtype], 1.2 * error(theirs, right))
        assert error(ours, right) < bound


def test_float16_is_rounded_where_torch_rounds():
    """The sum, and then what the activation makes of it."""
    from sb_memeff.ops.triton.joint import join

    enc, pred, *_ = batch(torch.float16)
    indices = torch.arange(B * T * (U + 1), device=DEVICE)
    found = join(enc, pred, indices, "leaky_relu", 0.2, torch.float16)
    expected = nn.functional.leaky_relu(enc[:, :, None] + pred[:, None], 0.2)
    assert torch.equal(found, expected.flatten(0, 2))


@pytest.mark.parametrize(
    "options",
    [
        {"weigh": True},
        {"clamp": 0.05},
        {"fastemit_lambda": 0.3},
        {"occupancy_floor": 0.2},
        {"weigh": True, "clamp": 0.05, "fastemit_lambda": 0.3},
    ],
    ids=str,
)
def test_settings(kernels, options):
    nets, inputs = modules(), batch()
    kernels(False)
    exact = wide(nets, inputs, **options)
    kernels(True)
    for ours, right in zip(
        results(nets, inputs, **options), exact, strict=True
    ):
        assert error(ours, right) < 2e-6


@pytest.mark.parametrize("weigh", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(kernels, dtype, weigh):
    """Forward under autocast, backward outside of it, as users do it."""
    nets, found = modules(), []
    inputs = batch()
    kernels(False)
    exact = wide(nets, inputs, weigh=weigh)
    for fused in (False, True):
        kernels(fused)
        with torch.autocast(DEVICE, dtype):
            found.append(results(nets, inputs, weigh=weigh))
    for theirs, ours, right in zip(*found, exact, strict=True):
        assert ours.dtype == theirs.dtype == torch.float32
        bound = max(BOUNDS[dtype], 1.2 * error(theirs, right))
        assert error(ours, right) < bound


def test_float16_bias_gradient_does_not_overflow(kernels):
    """A sum over rows may be larger than float16 can hold."""
    nets, inputs, found = modules(), [x[:1] for x in batch()], []
    for fused in (False, True):
        kernels(fused)
        loss = TransducerJointLoss(*nets, reduction="nll")
        with torch.autocast(DEVICE, torch.float16, enabled=fused):
            value = 2**14 * loss(*inputs).sum()
        found += torch.autograd.grad(value, nets[1].bias)
    exact, ours = found
    assert exact.abs().max() > torch.finfo(torch.float16).max
    assert error(ours, exact) < 1e-3


def test_any_strides(kernels):
    nets, inputs = modules(), batch()
    kernels(False)
    exact = wide(nets, inputs)
    enc, pred, *others = inputs
    buffer = torch.zeros(T, 2 * H, B, device=DEVICE)
    strided = buffer[:, ::2].permute(2, 0, 1)
    strided.copy_(enc)
    kernels(True)
    transposed = pred.transpose(0, 1).contiguous().transpose(0, 1)
    for pair in ((strided, pred), (enc, transposed)):
        found = results(nets, (*pair, *others))
        for ours, right in zip(found, exact, strict=True):
            assert error(ours, right) < 2e-6


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_small_inputs_keep_their_digits(activation):
    """Near 0, where a difference of exponentials would lose them."""
    nonlinearity = ACTIVATIONS[activation]()
    enc = torch.logspace(-6, -1, 60, device=DEVICE).view(1, 2, 30)
    pred = torch.zeros(1, 1, 30, device=DEVICE)
    found = joint_kernels.join(
        enc,
        pred,
        torch.arange(2, device=DEVICE),
        activation,
        slope_of(activation),
        torch.float32,
    )
    exact = nonlinearity(enc[0].double())
    torch.testing.assert_close(found.double(), exact, rtol=2e-6, atol=0)


@pytest.mark.parametrize("frames, targets", [(1, U), (T, 0), (1, 0)])
def test_one_row_or_column(kernels, frames, targets):
    nets = modules()
    enc, pred, symbols, _, _ = batch(targets=targets)
    ones = torch.ones(B, device=DEVICE)
    inputs = enc[:, :frames], pred, symbols, ones, ones
    kernels(False)
    exact = wide(nets, inputs)
    kernels(True)
    for ours, right in zip(results(nets, inputs), exact, strict=True):
        assert error(ours, right) < 2e-6


@pytest.mark.parametrize("classifier", ["torch", "speechbrain"])
@pytest.mark.parametrize("frozen", ["weight", "bias", "none", "no bias"])
def test_weights_that_need_no_gradient(kernels, classifier, frozen):
    nets = modules(
        bias=frozen != "no bias",
        classifier=nn.Linear if classifier == "torch" else None,
    )
    for name, p in nets[1].named_parameters():
        p.requires_grad_(not name.endswith(frozen))
    inputs = batch()
    kernels(False)
    exact = wide(nets, inputs)
    kernels(True)
    for ours, right in zip(results(nets, inputs), exact, strict=True):
        assert (ours is None) == (right is None)
        assert ours is None or error(ours, right) < 2e-6


def test_runs_of_samples(kernels, monkeypatch):
    """Cells of the second run are in other rows than their places say."""
    from sb_memeff.nnet.transducer_loss import joint_loss

    nets, inputs = modules(), batch()
    kernels(False)
    exact = wide(nets, inputs)
    kernels(True)
    for size in (T * (U + 1), 2 * T * (U + 1)):
        monkeypatch.setattr(joint_loss, "GROUP_CELLS", size)
        for ours, right in zip(results(nets, inputs), exact, strict=True):
            assert error(ours, right) < 2e-6


def test_nan_stays_in_its_sample(kernels):
    nets, inputs = modules(), batch()
    inputs[0][1, 0, 3] = torch.nan
    kernels(True)
    loss, enc, pred, *_ = results(nets, inputs)
    assert loss.isnan()
    assert enc[1].isnan().any() and pred[1].isnan().any()
    for x in (enc, pred):
        assert x[[0, 2]].isfinite().all()


def test_backward_twice(kernels):
    nets, found = modules(), []
    enc, pred, *others = batch()
    for fused in (False, True):
        kernels(fused)
        enc = enc.detach().requires_grad_()
        loss = TransducerJointLoss(*nets, reduction="nll", max_rows=20)
        value = loss(enc, pred, *others).sum()
        value.backward(retain_graph=True)
        value.backward()
        found.append(enc.grad)
    assert error(found[1], found[0]) < 2e-6


class Shifted(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


def changed(kind, joint, classifier):
    """Modules that compute, or might compute, something else."""
    if kind == "another class":
        classifier = Shifted(H, V).to(DEVICE)
    if kind == "sequence":
        classifier = nn.Sequential(classifier)
    if kind == "weight norm":
        nn.utils.parametrizations.weight_norm(classifier)
    if kind.startswith("register"):
        getattr(classifier, kind)(lambda *args: None)
    if kind == "hook of the activation":
        joint.nonlinearity.register_forward_pre_hook(lambda *args: None)
    if kind == "replaced forward":
        classifier.forward = lambda x: nn.Linear.forward(classifier, x) + 1
    if kind == "concatenation":
        joint = Transducer_joint(nn.Linear(2 * H, H), "concat").to(DEVICE)
    if kind == "another activation":
        joint.nonlinearity = nn.Softplus()
    if kind == "max_norm":
        classifier = speechbrain.nnet.linear.Linear(
            V, input_size=H, max_norm=1.0
        ).to(DEVICE)
    if kind == "other dtype":
        classifier = classifier.half()
    return joint, classifier


@pytest.mark.parametrize(
    "kind",
    [
        "another class",
        "sequence",
        "weight norm",
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
        "hook of the activation",
        "replaced forward",
        "concatenation",
        "another activation",
        "max_norm",
        "other dtype",
    ],
)
def test_other_modules_are_called(kernels, kind):
    kernels(True)
    enc, pred, *_ = batch()
    assert SumJoint.of(CellLogits(*modules()), enc, pred) is not None
    nets = changed(kind, *modules())
    assert SumJoint.of(CellLogits(*nets), enc, pred) is None


@pytest.mark.parametrize("widths", [(H, 1), (1, H), (H + 1, H + 1)])
def test_widths_that_are_broadcast_or_do_not_fit(kernels, widths):
    kernels(True)
    enc, pred = (
        torch.randn(B, n, width, device=DEVICE)
        for n, width in zip((T, U + 1), widths)
    )
    assert SumJoint.of(CellLogits(*modules()), enc, pred) is None


def test_a_forward_that_is_replaced_in_the_class(kernels, monkeypatch):
    kernels(True)
    enc, pred, *_ = batch()
    monkeypatch.setattr(nn.Linear, "forward", Shifted.forward)
    assert SumJoint.of(CellLogits(*modules()), enc, pred) is None


def test_hooks_on_all_modules_are_called(kernels):
    kernels(True)
    enc, pred, *_ = batch()
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        assert SumJoint.of(CellLogits(*modules()), enc, pred) is None
    finally:
        handle.remove()


class Launches(TorchDispatchMode):
    """Counts what a GPU would launch: torch's operations, Triton's kernels.

    Views and empty tensors are not among them.
    """

    def __init__(self, monkeypatch):
        super().__init__()
        self.count = self.passes = 0
        self.interpreting = False
        for module, name in (
            (joint_kernels, "_join"),
            (joint_kernels, "_add_rows"),
            (logit_rows, "_scores"),
            (logit_rows, "_gradient"),
        ):
            kernel = getattr(module, name)
            monkeypatch.setattr(kernel, "run", self._counted(kernel.run, name))

    def _counted(self, run, name):
        def launch(*args, **kwargs):
            self.count += 1
            self.passes += name == "_join"
            self.interpreting = True
            try:
                return run(*args, **kwargs)
            finally:
                self.interpreting = False

        return launch

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not self.interpreting:
            free = func.is_view or "empty" in func.__name__
            self.count += not free and "detach" not in func.__name__
        return func(*args, **(kwargs or {}))


def test_launches_of_a_tile(kernels, monkeypatch):
    """One more tile costs no index arithmetic, casts or copies."""
    kernels(True)
    counts = []
    for max_rows in (10, 20):
        with monkeypatch.context() as patch, Launches(patch) as launches:
            results(modules(), batch(), max_rows=max_rows)
        counts.append((launches.count, launches.passes))
    (more, many), (fewer, few) = counts
    assert many > few > 0
    assert (more - fewer) / (many - few) <= 6
