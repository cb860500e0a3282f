"""Autograd nodes: memory, work, and the order of backward."""

import gc
import weakref

import pytest
import torch
from torch import nn

from sb_memeff.memory.step import training_step_memory
from sb_memeff.nnet.reversible import (
    AdditiveCoupling,
    ReversibleSequence,
    SpaceToDepth,
)
from sb_memeff.nnet.reversible.coupling import Invertible
from sb_memeff.nnet.reversible.nodes import ChainState
from sb_memeff.nnet.reversible.observer import Observer
from tests.unittests.nnet.reversible.chains import (
    Head,
    alive,
    chain,
    gradients,
    images,
    in_backward,
    mixed_chain,
    read,
    relative_error,
    saved_bytes,
    stored,
)
from tests.unittests.one_analysis import one_analysis  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_analysis")


def test_hooks_on_weights_run_once():
    net = chain(2)
    calls = []
    weight = net.blocks[0].g[0].weight
    weight.register_hook(lambda grad: calls.append(1) or 2 * grad)
    _, ours, _ = gradients(net, images())
    assert calls == [1]
    net = chain(2)
    _, plain, _ = gradients(net, images())
    index = [n for n, _ in net.named_parameters()].index("blocks.0.g.0.weight")
    assert torch.equal(ours[1 + index], 2 * plain[1 + index])


@pytest.mark.parametrize("build", [lambda: chain(3), mixed_chain])
def test_backward_twice_with_retain_graph(build):
    net = build().double()
    channels = 3 if build is mixed_chain else 8
    x = images(channels=channels, dtype=torch.float64)
    loss = net(x).square().sum()
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in net.parameters()]
    loss.backward()
    twice = [p.grad for p in net.parameters()]
    assert relative_error(twice, [2 * g for g in once]) < 1e-12
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_saved_bytes_do_not_grow_with_depth():
    x = images()
    shallow, y = saved_bytes(chain(2), x)
    deep, _ = saved_bytes(chain(32), x)
    assert deep == shallow == y.untyped_storage().nbytes()
    plain, _ = saved_bytes(stored(chain(32)), x)
    assert plain > 50 * deep


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_peak_of_forward_and_backward_does_not_grow_with_depth(autocast):
    def activations(depth, save_memory):
        memory = training_step_memory(
            lambda: chain(depth, save_memory=save_memory),
            (16, 8, 64, 64),
            autocast=autocast,
        )
        return memory.activation_bytes

    shallow, deep = activations(2, True), activations(32, True)
    # Of a coupling only two scalars (how far its streams reach) remain.
    assert deep < 1.02 * shallow
    assert activations(32, False) > 5 * deep


def test_peak_is_two_states_and_the_working_set_of_one_function():
    """State and its gradient, and what f itself stores: nothing else."""
    shape = (16, 8, 64, 64)
    state = 4 * 16 * 8 * 64 * 64
    memory = training_step_memory(lambda: chain(8, dropout=0.0), shape)
    # Input, output and its gradient belong to the caller: 3 states. Ours: 2.
    # f stores conv, norm and ReLU outputs of half a state each (4 tensors),
    # and needs gradients of two of them at once; 1 state of slack.
    assert memory.activation_bytes < (3 + 2 + 3 + 1) * state


def widening(channels, inside):
    """conv - tanh - conv, without biases and norms."""
    return nn.Sequential(
        nn.Conv2d(channels, inside, 1, bias=False),
        nn.Tanh(),
        nn.Conv2d(inside, channels, 1, bias=False),
    )


@pytest.mark.parametrize("slices", [1, 2, 8])
def test_a_sum_needs_the_memory_of_one_of_its_members(slices):
    def build():
        f, g = (
            nn.ModuleList(widening(4, 64 // slices) for _ in range(slices))
            for _ in "fg"
        )
        return ReversibleSequence([AdditiveCoupling(f, g)])

    memory = training_step_memory(build, (16, 8, 64, 64))
    state = 4 * 16 * 8 * 64 * 64
    # 5 states, and of 64 channels (8 states) what the tanh saved and the
    # gradients of its output and input.
    assert memory.activation_bytes <= (5 + 3 * 8 / slices) * state


def test_streams_that_down_sampling_has_copied_are_freed():
    """Also those that the module after it had for its input."""

    def build():
        coupling = AdditiveCoupling(widening(4, 64), widening(4, 64))
        return ReversibleSequence([coupling, SpaceToDepth(2), Head(32)])

    memory = training_step_memory(build, (16, 8, 64, 64))
    state = 4 * 16 * 8 * 64 * 64
    # The input, the state, its gradient, and what tanh needs (see above).
    assert memory.activation_bytes <= (3 + 3 * 8 + 0.5) * state


def test_exactly_one_extra_forward_of_each_f_and_g():
    # Counted outside: an attribute would be put back after the replay.
    calls = []

    class Counted(nn.Conv2d):
        def forward(self, x):
            calls.append(self)
            return super().forward(x)

    net = ReversibleSequence(
        [AdditiveCoupling(Counted(4, 4, 1), Counted(4, 4, 1)) for _ in range(3)]
    )
    y = net(images())
    halves = [half for block in net.blocks for half in (block.f, block.g)]
    assert [calls.count(half) for half in halves] == [1] * 6
    y.sum().backward()
    assert [calls.count(half) for half in halves] == [2] * 6


def test_graph_is_freed_after_backward():
    net = chain(2)
    y = net(images())
    node = weakref.ref(y)
    y.sum().backward()
    del y
    assert node() is None


@pytest.mark.parametrize("first", ["coupling", "tap"])
def test_streams_are_freed_after_backward_whatever_needs_a_gradient_first(
    first,
):
    """The loss may live on, in a list of losses for example."""
    net = chain(3, dropout=0.0)
    if first == "tap":
        net.blocks[0].requires_grad_(False)
        net.blocks.insert(1, read(8))
    rebuilt = []

    class Watch(Observer):
        def input_reconstructed(self, name, streams):
            rebuilt.extend(map(weakref.ref, streams))

    net._observer_factories.append(Watch)
    y = net(images())
    total = sum(part.sum() for part in (y if first == "tap" else (y,)))
    total.backward()
    gc.collect()
    assert rebuilt and all(stream() is None for stream in rebuilt)


def test_double_backward_names_the_cause():
    net = chain(1)
    x = images().requires_grad_()
    with pytest.raises(RuntimeError, match="double backward.*save_memory"):
        torch.autograd.grad(net(x).sum(), x, create_graph=True)
    # The remedy works.
    net.save_memory = False
    torch.autograd.grad(net(x).sum(), x, create_graph=True)


def test_streams_are_not_kept_after_an_error_in_backward():
    net = chain(2, dropout=0.0)
    before = alive(ChainState)
    y = net(1e4 * images())
    with pytest.raises(RuntimeError, match="reached"):
        y.sum().backward()
    states = [o for o in alive(ChainState) if o not in before]
    assert states and all(not s.streams and not s.extra_tensors for s in states)


def test_parameter_gradients_are_ready_while_the_chain_is_walked_back():
    net = chain(4, dropout=0.0)
    order = []
    for index, block in enumerate(net.blocks):
        weight = block.f[0].weight
        weight.register_hook(lambda _, i=index: order.append(("ready", i)))
        block.f[0].register_forward_pre_hook(
            lambda m, a, i=index: (
                order.append(("replay", i)) if in_backward() else None
            )
        )
    net(images()).sum().backward()
    assert order == [
        (what, i) for i in (3, 2, 1, 0) for what in ("replay", "ready")
    ]


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_twice_through_one_graph(dtype, exact):
    """The graph holds the streams themselves, which backward may not change."""
    found = []
    for save_memory in (True, False):
        torch.manual_seed(0)
        net = ReversibleSequence(
            [
                AdditiveCoupling(nn.Linear(4, 4), nn.Linear(4, 4))
                for _ in range(3)
            ],
            exact=exact,
            save_memory=save_memory,
        ).to(dtype)
        x = torch.randn(5, 8).to(dtype).requires_grad_()
        y = net(x)
        y[:, :4].float().sum().backward(retain_graph=True)
        y[:, 4:].float().sum().backward()
        found.append([x.grad, *(p.grad for p in net.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)


class Twice(Invertible):
    """y1 = x1 + f(x2) + h(x2), where h may be f under another name."""

    def __init__(self, f, names):
        super().__init__()
        self.f = self.h = f
        self.names = names

    def forward_streams(self, x1, x2, evaluator):
        for name in self.names:
            x1 = x1 + evaluator.value(name, x2)
        return x1, x2

    def backward_streams(self, y, dy, evaluator, shape):
        (y1, y2), (d1, d2) = y, dy
        for name in reversed(self.names):
            increment, pullback = evaluator.vjp(name, y2)
            y1, d2 = y1 - increment, d2 + pullback(d1)
        return (y1, y2), (d1, d2)


def test_a_function_that_is_evaluated_twice():
    """Dropout would have the mask of the other call."""
    f = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    x = torch.randn(5, 8, requires_grad=True)
    with pytest.raises(
        RuntimeError, match=r"\.f is evaluated twice.*second name"
    ):
        ReversibleSequence([Twice(f, "ff")])(x)
    found = []
    for save_memory in (True, False):
        torch.manual_seed(0)
        net = ReversibleSequence([Twice(f, "fh")], save_memory=save_memory)
        f.zero_grad()
        x.grad = None
        net(x).square().sum().backward()
        found.append([x.grad, f[0].weight.grad])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
