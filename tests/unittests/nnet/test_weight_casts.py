"""Weights that are converted together against each by itself."""

import copy
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sb_memeff.lobes.reversible_blocks import ResidualBody
from sb_memeff.nnet.norm_relu_conv import one_by_one
from sb_memeff.nnet.recompute import recompute_blocks
from sb_memeff.nnet.reversible import AdditiveCoupling, ReversibleSequence
from sb_memeff.nnet.weight_casts import cast_weights
from tests.unittests.ops.kernel import DEVICE

HALF = torch.bfloat16


def force(monkeypatch, forced=True):
    """As on a GPU, or as on a CPU."""
    monkeypatch.setattr(
        "sb_memeff.nnet.weight_casts.is_on_gpu", lambda x: forced
    )


def body():
    return ResidualBody("bottleneck", 4, 6, 4)


def network():
    torch.manual_seed(0)
    blocks = [AdditiveCoupling(body(), body()) for _ in range(2)]
    return ReversibleSequence(blocks).to(DEVICE)


def batch():
    torch.manual_seed(1)
    return torch.randn(2, 8, 6, 5, device=DEVICE)


def step(net, x):
    """Output, gradients and buffers."""
    x = x.detach().requires_grad_()
    with torch.autocast(DEVICE, HALF):
        y = net(x)
    y.square().sum().backward()
    gradients = [p.grad for p in net.parameters()]
    return [y.detach(), x.grad, *gradients, *net.buffers()]


def plain(net):
    return net


def stored(net):
    net.save_memory = False
    return net


def channels_last(net):
    return net.to(memory_format=torch.channels_last)


def frozen(net):
    for block in net.blocks:
        block.f.layers[1].conv.requires_grad_(False)
        block.g.requires_grad_(False)
    return net


def recomputed(net):
    """A node of its own computes one of the layers."""
    recompute_blocks(net, "blocks.*.f.layers.1")
    return net


def hooked(net):
    net.blocks[0].f.layers[1].conv.register_forward_hook(lambda m, x, y: 2 * y)
    return net


def normalized(net):
    """Each use of the weight changes a buffer."""
    conv = net.blocks[0].f.layers[1].conv
    nn.utils.parametrizations.spectral_norm(conv)
    return stored(net)


def in_half_precision(net):
    net.blocks[0].f.layers[0].conv.to(HALF)
    return net


@pytest.mark.parametrize(
    "change",
    [
        plain,
        stored,
        channels_last,
        frozen,
        recomputed,
        hooked,
        normalized,
        in_half_precision,
    ],
)
def test_the_same_bits(monkeypatch, change):
    results = []
    for forced in (False, True):
        force(monkeypatch, forced)
        results.append(step(change(network()), batch()))
    for a, b in zip(*results, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert torch.equal(a, b) and a.dtype == b.dtype
            assert a.stride() == b.stride()


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names[func._schema.name.partition("::")[2]] += 1
        return func(*args, **(kwargs or {}))


def test_one_conversion_for_a_body_in_each_pass(monkeypatch):
    """Forward, replay and backward of four bodies with three weights each."""
    found = []
    for forced in (False, True):
        force(monkeypatch, forced)
        net = network()
        with Operations() as operations:
            step(net, batch())
        found.append(operations.names)
    before, after = found
    assert before["_foreach_copy_"] == 0
    assert after["_foreach_copy_"] == 3 * 4
    assert before["_to_copy"] - after["_to_copy"] == 3 * 4 * 3


def test_frozen_weights_need_no_gradient(monkeypatch):
    """It would be computed for nothing."""
    force(monkeypatch)
    convs = [nn.Conv2d(3, 3, 1).to(DEVICE) for _ in range(2)]
    convs[1].requires_grad_(False)
    with torch.autocast(DEVICE, HALF):
        weights = cast_weights(convs)
    assert [w.requires_grad for w in weights] == [True, False]
    for weight, conv in zip(weights, convs):
        assert torch.equal(weight, conv.weight.to(HALF))


def test_a_weight_without_a_gradient(monkeypatch):
    force(monkeypatch)
    convs = [nn.Conv2d(3, 3, 1).to(DEVICE) for _ in range(2)]
    with torch.autocast(DEVICE, HALF):
        _, weight = cast_weights(convs)
    weight.sum().backward()
    assert convs[0].weight.grad is None
    assert torch.equal(convs[1].weight.grad, torch.ones_like(convs[1].weight))


def test_what_is_not_converted(monkeypatch):
    force(monkeypatch)
    convs = [nn.Conv2d(3, 3, 1).to(DEVICE) for _ in range(2)]
    assert cast_weights(convs) == [None, None]
    with torch.autocast(DEVICE, HALF):
        assert cast_weights([copy.deepcopy(convs[0]).to(HALF)]) == [None]


@pytest.mark.parametrize("name", ["norm", "activation"])
def test_modules_that_are_called_one_by_one(monkeypatch, name):
    """They convert their weights themselves."""
    force(monkeypatch)
    net = body().to(DEVICE).eval()
    other = nn.SyncBatchNorm(6) if name == "norm" else nn.GELU()
    setattr(net.layers[1], name, other.to(DEVICE).eval())
    with Operations() as operations, torch.autocast(DEVICE, HALF):
        net(batch()[:, :4])
    assert not operations.names["_foreach_copy_"]


def test_function_transforms_and_double_backward(monkeypatch):
    """They do without the node, whose rules would be missing."""
    force(monkeypatch)
    net = body().to(DEVICE).eval()
    x = batch()[:, :4].requires_grad_()
    with torch.autocast(DEVICE, HALF):
        found = torch.func.vmap(net)(x.unsqueeze(1)).squeeze(1)
        expected = net(x).float()
        torch.testing.assert_close(
            found.float(), expected, rtol=1e-2, atol=1e-2
        )
        with one_by_one():
            y = net(x).float().square().sum()
    (dx,) = torch.autograd.grad(y, x, create_graph=True)
    assert dx.requires_grad
