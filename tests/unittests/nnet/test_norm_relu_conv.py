"""Batch norm, ReLU and convolution as one against the three modules."""

import contextlib
import copy

import pytest
import torch
from torch import nn

from sb_memeff.lobes.reversible_blocks import ResidualBody
from sb_memeff.memory.fake import fake_tensors
from sb_memeff.memory.tracker import StorageTracker
from sb_memeff.nnet.norm_relu_conv import (
    norm_relu_conv,
    one_by_one as one_node_off,
)
from sb_memeff.nnet.padding import mask
from sb_memeff.nnet.recompute import recompute_blocks
from sb_memeff.nnet.recompute.segment import Segment
from sb_memeff.nnet.reversible import AdditiveCoupling, ReversibleSequence
from sb_memeff.ops import norm_relu, slices
from sb_memeff.ops.dispatch import fused_on_fake_tensors
from tests.unittests.ops.kernel import DEVICE, error

C, OUT = 4, 6


def layers(seed=0, **conv):
    torch.manual_seed(seed)
    options = {"kernel_size": 3, "padding": 1, "bias": False, **conv}
    norm = nn.BatchNorm2d(C)
    for p in norm.parameters():
        nn.init.normal_(p)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    return nn.ModuleList([norm, nn.ReLU(), nn.Conv2d(C, OUT, **options)])


def batch(memory_format=torch.contiguous_format, dtype=torch.float32):
    torch.manual_seed(1)
    x = 1 + torch.randn(3, C, 8, 5)
    return x.to(dtype).to(memory_format=memory_format)


def some_padding():
    padding = torch.zeros(3, 1, 8, 1, dtype=torch.bool)
    padding[1, :, 5:] = True
    return padding


def one_by_one(x, norm, activation, conv, padding=None):
    return conv(activation(mask(norm(x), padding)))


def results(function, net, x, padding=None):
    """Output, gradients of input and weights, and buffers."""
    net, x = copy.deepcopy(net), x.detach().requires_grad_()
    y = function(x, *net, padding)
    torch.manual_seed(2)
    y.backward(torch.randn(y.shape).to(y))
    gradients = [p.grad for p in net.parameters() if p.requires_grad]
    return [y.detach(), x.grad, *gradients, *net.buffers()]


CONVOLUTIONS = [
    {},
    {"kernel_size": 1, "padding": 0},
    {"stride": 2, "bias": True},
    {"groups": 2, "dilation": 2, "padding": 2},
]


@pytest.mark.parametrize("conv", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("padding", [None, some_padding()], ids=["", "padded"])
@pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last]
)
def test_as_the_modules(conv, training, padding, memory_format):
    net = layers(**conv).train(training)
    x = batch(memory_format)
    found = results(norm_relu_conv, net, x, padding)
    exact = results(one_by_one, net.double(), x.double(), padding)
    for a, b in zip(found, exact, strict=True):
        assert a.stride() == b.stride() or a.dim() != 4
        assert error(a, b) < 2e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("inputs", [torch.float32, "the same"])
def test_autocast_as_the_modules(dtype, inputs):
    """Forward under autocast, backward outside of it."""
    net = layers(bias=True)
    x = batch(dtype=dtype if inputs == "the same" else inputs)
    exact = results(one_by_one, copy.deepcopy(net).double(), x.double())

    def under_autocast(function):
        def call(*args):
            with torch.autocast("cpu", dtype):
                return function(*args)

        return call

    found, theirs = (
        results(under_autocast(f), net, x) for f in (norm_relu_conv, one_by_one)
    )
    for a, b, right in zip(found, theirs, exact, strict=True):
        assert a.dtype == b.dtype
        assert error(a, right) <= max(1e-6, 1.3 * error(b, right))


def test_statistics_that_are_not_tracked():
    for options in ({"track_running_stats": False}, {"momentum": 0.4}):
        net = layers()
        net[0] = nn.BatchNorm2d(C, **options)
        for training in (True, False):
            net.train(training)
            found = results(norm_relu_conv, net, batch())
            for a, b in zip(
                found, results(one_by_one, net, batch()), strict=True
            ):
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "frozen", ["0.weight", "0.bias", "2.weight", "all", "x"]
)
def test_what_needs_no_gradient(frozen):
    net = layers(bias=True)
    for name, p in net.named_parameters():
        p.requires_grad_(name != frozen and frozen != "all")
    x = batch().requires_grad_(frozen != "x")
    found = []
    for function in (norm_relu_conv, one_by_one):
        net.zero_grad()
        x.grad = None
        function(x, *copy.deepcopy(net)).square().sum().backward()
        function(x, *net).square().sum().backward()
        found.append([x.grad, *(p.grad for p in net.parameters())])
    for a, b in zip(*found, strict=True):
        assert (a is None) == (b is None)
        assert a is None or error(a, b) < 2e-6


class Called(Exception):
    pass


def refuse(*args):
    raise Called


def other(kind, net):
    """Modules that must be called one by one."""
    if kind == "norm":
        net[0] = nn.InstanceNorm2d(C)
    if kind == "subclass":
        net[0] = type("Norm", (nn.BatchNorm2d,), {})(C)
    if kind == "SyncBatchNorm":
        net[0] = nn.SyncBatchNorm(C).eval()
    if kind == "not affine":
        net[0] = nn.BatchNorm2d(C, affine=False)
    if kind == "cumulative":
        net[0] = nn.BatchNorm2d(C, momentum=None)
    if kind == "activation":
        net[1] = nn.GELU()
    if kind == "padding mode":
        net[2] = nn.Conv2d(C, OUT, 3, padding=1, padding_mode="circular")
    if kind == "padding by name":
        net[2] = nn.Conv2d(C, OUT, 3, padding="same")
    if kind == "hook":
        net[1].register_forward_hook(lambda module, args, y: 2 * y)
    if kind == "weight norm":
        nn.utils.parametrizations.weight_norm(net[2])
    return net


@pytest.mark.parametrize(
    "kind",
    [
        "norm",
        "subclass",
        "SyncBatchNorm",
        "not affine",
        "cumulative",
        "activation",
        "padding mode",
        "padding by name",
        "hook",
        "weight norm",
    ],
)
def test_other_modules_are_called(monkeypatch, kind):
    net = other(kind, layers())
    exact = one_by_one(batch(), *copy.deepcopy(net))
    monkeypatch.setattr("sb_memeff.nnet.norm_relu_conv.norm_relu", refuse)
    torch.testing.assert_close(norm_relu_conv(batch(), *net), exact)
    with pytest.raises(Called):
        norm_relu_conv(batch(), *layers())


def test_errors_are_those_of_the_modules():
    for x in (torch.ones(2, C + 1, 4, 4), torch.ones(1, C, 1, 1)):
        with pytest.raises((ValueError, RuntimeError)) as found:
            norm_relu_conv(x, *layers())
        with pytest.raises(type(found.value)) as expected:
            one_by_one(x, *layers())
        assert str(found.value) == str(expected.value)


def test_a_replay_takes_over_the_statistics(monkeypatch):
    """They are neither computed nor counted a second time."""
    calls = []
    update = torch.batch_norm_update_stats

    def counted(*args):
        calls.append(args)
        return update(*args)

    monkeypatch.setattr(torch, "batch_norm_update_stats", counted)
    net = layers()

    def forward(x):
        return norm_relu_conv(x, *net)

    x = batch().requires_grad_()
    Segment().call("layer", net, forward, (x,), {}).sum().backward()
    assert len(calls) == 1 and net[0].num_batches_tracked == 1
    exact = layers()
    y = batch().requires_grad_()
    one_by_one(y, *exact).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(net[0].running_var, exact[0].running_var)


@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
def test_with_kernels_as_in_float64(monkeypatch, memory_format):
    net = layers(bias=True).to(DEVICE)
    x = batch(
        torch.channels_last
        if memory_format == "channels_last"
        else torch.contiguous_format
    ).to(DEVICE)
    padding = some_padding().to(DEVICE)
    exact = results(
        one_by_one, copy.deepcopy(net).double(), x.double(), padding
    )
    monkeypatch.setattr(norm_relu, "runs_fused", lambda *tensors: True)
    found = results(norm_relu_conv, net, x, padding)
    for a, b in zip(found, exact, strict=True):
        assert error(a, b) < 3e-6


@pytest.mark.parametrize("fused", [False, True])
def test_memory(fused):
    """Forward keeps the input; backward holds two more, and one with kernels.

    The gradient that comes in is one of those that live all the time.
    """
    size = 4 * 3 * 16 * 40 * 40
    path = fused_on_fake_tensors if fused else contextlib.nullcontext
    with fake_tensors(), StorageTracker() as tracker, path():
        net = nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.Conv2d(16, 16, 1)
        x = torch.zeros(3, 16, 40, 40, requires_grad=True)
        start = tracker.alive
        y = norm_relu_conv(x, *net)
        assert tracker.alive - start < 1.1 * size
        y.sum().backward()
    # The output and, in backward, as many as are allowed.
    assert tracker.peak - start < (2.1 if fused else 3.1) * size


@pytest.fixture
def in_slices(monkeypatch):
    """Makes all activations in slices of two samples and one, or fewer."""
    monkeypatch.setattr(slices, "WHOLE_BYTES", 0)
    size = batch().nbytes * 2 // 3
    monkeypatch.setattr(slices, "SLICE_BYTES", size)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("frozen", [(), ("0.weight", "0.bias"), ("2.weight",)])
@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
def test_slices_of_the_activation(
    monkeypatch, in_slices, memory_format, frozen, training, fused
):
    net = layers(bias=True).to(DEVICE).train(training)
    for name in frozen:
        net.get_parameter(name).requires_grad_(False)
    x = batch(
        torch.channels_last
        if memory_format == "channels_last"
        else torch.contiguous_format
    ).to(DEVICE)
    padding = some_padding().to(DEVICE)
    exact = copy.deepcopy(net).double()
    expected = results(one_by_one, exact, x.double(), padding)
    monkeypatch.setattr(norm_relu, "runs_fused", lambda *tensors: fused)
    sizes = []

    def watched(x, *args):
        sizes.append(len(x))
        return norm_relu.norm_relu(x, *args)

    monkeypatch.setattr("sb_memeff.nnet.norm_relu_conv.norm_relu", watched)
    found = results(norm_relu_conv, net, x, padding)
    assert sizes == [2, 1, 2, 1]
    for a, b in zip(found, expected, strict=True):
        assert error(a, b) < 3e-6
    assert found[0].is_contiguous() == (memory_format == "contiguous")


def test_slices_without_gradient_of_the_input(in_slices):
    net, exact = layers(), layers()
    for n in (net, exact):
        n[0].requires_grad_(False)
    norm_relu_conv(batch(), *net).sum().backward()
    one_by_one(batch(), *exact).sum().backward()
    torch.testing.assert_close(net[2].weight.grad, exact[2].weight.grad)


def test_weight_gradients_of_slices_are_added_in_float32(monkeypatch):
    """In bfloat16 a sum of 300 ones stays at 256."""
    monkeypatch.setattr(slices, "WHOLE_BYTES", 0)
    monkeypatch.setattr(slices, "SLICE_BYTES", 1)
    norm = nn.BatchNorm2d(1).eval().bfloat16()
    conv = nn.Conv2d(1, 1, 1, bias=False).bfloat16()
    x = torch.ones(300, 1, 1, 1, dtype=torch.bfloat16)
    norm_relu_conv(x, norm, nn.ReLU(), conv).sum().backward()
    assert conv.weight.grad.item() == 300


@pytest.mark.parametrize("fused", [False, True])
def test_memory_of_slices(monkeypatch, fused):
    """Forward holds no activation; backward no more than one gradient."""
    size = 4 * 16 * 16 * 40 * 40
    monkeypatch.setattr(slices, "WHOLE_BYTES", 0)
    monkeypatch.setattr(slices, "SLICE_BYTES", size // 16)
    path = fused_on_fake_tensors if fused else contextlib.nullcontext
    with fake_tensors(), StorageTracker() as tracker, path():
        net = nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.Conv2d(16, 16, 1)
        x = torch.zeros(16, 16, 40, 40, requires_grad=True)
        start = tracker.alive
        y = norm_relu_conv(x, *net)
        assert tracker.peak - start < 1.2 * size
        y.sum().backward()
    assert tracker.peak - start < 2.3 * size


@pytest.mark.parametrize("exact", [True, False])
def test_chains_of_sliced_layers(monkeypatch, exact):
    monkeypatch.setattr(slices, "WHOLE_BYTES", 0)
    monkeypatch.setattr(slices, "SLICE_BYTES", 2000)
    found = []
    for save_memory in (True, False):
        torch.manual_seed(0)
        net = ReversibleSequence(
            [
                AdditiveCoupling(
                    *(ResidualBody("basic", 4, 4, 4) for _ in "fg")
                )
                for _ in range(3)
            ],
            save_memory=save_memory,
            exact=exact,
        )
        x = torch.randn(5, 8, 9, 10, requires_grad=True)
        net(x).square().sum().backward()
        found.append([x.grad, *(p.grad for p in net.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def recompute_first(net):
    """One of two layers is recomputed by itself."""
    recompute_blocks(net, "blocks.*.f.layers.0")


def hook_of_forward(net):
    """A hook that removes itself in forward."""
    norm = net.blocks[1].f.layers[0].norm

    def hook(*args):
        handle.remove()

    handle = norm.register_forward_hook(hook)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(
    "change", [recompute_first, hook_of_forward, "hook before backward"]
)
def test_a_replay_takes_each_layers_own_statistics(change, exact):
    found = []
    for save_memory in (True, False):
        torch.manual_seed(0)
        net = ReversibleSequence(
            [
                AdditiveCoupling(
                    *(ResidualBody("basic", 4, 4, 4) for _ in "fg")
                )
                for _ in range(2)
            ],
            exact=exact,
        ).double()
        for p in net.parameters():
            nn.init.normal_(p)
        net.save_memory = save_memory
        if save_memory and callable(change):
            change(net)
        x = torch.randn(2, 8, 6, 5).double().requires_grad_()
        y = net(x)
        if save_memory and not callable(change):
            norm = net.blocks[1].f.layers[0].norm
            norm.register_forward_hook(lambda *args: None)
        y.square().sum().backward()
        found.append([x.grad, *(p.grad for p in net.parameters())])
    for a, b in zip(*found, strict=True):
        assert error(a, b) < 1e-6


def test_double_backward_is_refused_or_right():
    net = layers().double().eval()
    x = batch(dtype=torch.float64).requires_grad_()
    for loss in (lambda y: y.sum(), lambda y: y.square().sum()):
        with pytest.raises(RuntimeError, match=r"create_graph.*one_by_one"):
            torch.autograd.grad(
                loss(norm_relu_conv(x, *net)), x, create_graph=True
            )
        with one_node_off():
            y = loss(norm_relu_conv(x, *net))
        (dx,) = torch.autograd.grad(y, x, create_graph=True)
        (exact,) = torch.autograd.grad(
            loss(one_by_one(x, *net)), x, create_graph=True
        )
        assert torch.equal(dx, exact)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
def test_a_network_in_half_precision(dtype, training):
    net = layers(bias=True).train(training)
    exact = results(
        one_by_one, copy.deepcopy(net).double(), batch(dtype=dtype).double()
    )
    found = results(norm_relu_conv, net.to(dtype), batch(dtype=dtype))
    for a, right in zip(found, exact, strict=True):
        assert error(a, right) < 20 * torch.finfo(dtype).eps


def test_dtypes_that_do_not_fit_are_refused_as_by_the_modules():
    with pytest.raises(RuntimeError):
        norm_relu_conv(batch(dtype=torch.float16), *layers())
    net = layers()
    net[2].double()
    with pytest.raises(RuntimeError):
        norm_relu_conv(batch(), *net)


def test_a_forward_that_is_replaced_in_the_class(monkeypatch):
    calls = []
    forward = nn.Conv2d.forward

    def replaced(module, x):
        calls.append(module)
        return forward(module, x)

    monkeypatch.setattr(nn.Conv2d, "forward", replaced)
    norm_relu_conv(batch(), *layers())
    assert len(calls) == 1


@pytest.mark.parametrize("fused", [False, True])
def test_running_statistics_that_change_before_backward(monkeypatch, fused):
    """A training step in between does not change the gradients of eval mode."""
    monkeypatch.setattr(norm_relu, "runs_fused", lambda *tensors: fused)
    found = []
    for trains in (True, False):
        net = layers().to(DEVICE).eval()
        x = batch().to(DEVICE).requires_grad_()
        y = norm_relu_conv(x, *net)
        if trains:
            norm_relu_conv(batch().to(DEVICE), *net.train())
        y.square().sum().backward()
        found.append([x.grad, *(p.grad for p in net.parameters())])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
