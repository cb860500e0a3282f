"""Activations dropped by a segment are recomputed when backward needs them."""

import contextlib
import copy
import gc
import random
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from sb_memeff.memory.step import training_step_memory
from sb_memeff.nnet.recompute.segment import Segment, nothing_saved
from sb_memeff.nnet.replay import mismatch
from sb_memeff.nnet.reversible import AdditiveCoupling, ReversibleSequence
from tests.unittests.nnet.reversible.chains import saved_bytes


class Forgetting(nn.Module):
    """Calls each of its blocks in a segment of its own."""

    def __init__(self, *blocks):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, *args, **kwargs):
        for i, block in enumerate(self.blocks):
            result = Segment().call(f"{i}", block, block.forward, args, kwargs)
            args, kwargs = (result,), {}
        return result


def forget(block, *args, **kwargs):
    return Forgetting(block)(*args, **kwargs)


def layers(width=5, depth=3):
    torch.manual_seed(0)
    parts = [(nn.Linear(width, width), nn.Tanh()) for _ in range(depth)]
    return nn.Sequential(*(layer for part in parts for layer in part)).double()


def gradients_of(loss, *tensors):
    return torch.autograd.grad(loss, tensors, allow_unused=True)


def assert_same(ours, reference):
    for a, b in zip(ours, reference, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


X = torch.linspace(-1, 1, 20, dtype=torch.double).view(4, 5)


class Nested(nn.Module):
    """All kinds of arguments and results."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 5)
        self.unused = nn.Linear(5, 5)

    def forward(self, x, pair, *, options, mask=None, scale=1.0):
        assert mask is None or not mask.is_floating_point()
        y = torch.tanh(self.linear(x)) * pair[0] + options["shift"][0]
        if mask is not None:
            y = y.masked_fill(mask, 0.0)
        return {
            "y": y * scale,
            "rest": [(y.exp(), None), (x > 0), "text"],
            "unused": self.linear(pair[1]).sigmoid(),
        }


def test_arguments_and_results_of_all_kinds():
    block = Nested().double()
    found = []
    for call in (forget, lambda block, *a, **k: block(*a, **k)):
        x, a, b, c = (X.clone().requires_grad_() for _ in range(4))
        result = call(
            block,
            x,
            (a, b),
            options={"shift": [c]},
            mask=X > 0.5,
            scale=2.0,
        )
        assert result["rest"][2] == "text" and result["rest"][0][1] is None
        assert not result["rest"][1].requires_grad
        loss = result["y"].sum() + result["rest"][0][0].prod()
        found.append(gradients_of(loss, x, a, b, c, *block.parameters()))
    assert found[0][2] is None  # b leads to the unused result only
    assert_same(*found)


def test_tensors_that_the_block_finds_elsewhere_get_their_gradients():
    outside = torch.full((5,), 0.3, dtype=torch.double, requires_grad=True)

    class Closed(nn.Module):
        def forward(self, x):
            return torch.tanh(x * (outside * 2).exp())

    found = [
        gradients_of(call(Closed(), X).sum(), outside)
        for call in (forget, lambda block, x: block(x))
    ]
    assert_same(*found)


def test_a_tensor_passed_twice_is_one_object_in_the_replay():
    seen = []

    class Attention(nn.Module):
        def forward(self, query, key):
            seen.append(query is key)
            return (query * key).tanh()

    x = X.clone().requires_grad_()
    forget(Attention(), x, x).sum().backward()
    assert seen == [True, True]


def test_only_inputs_from_outside_the_segment_are_stored():
    block = layers(depth=8)
    kept, _ = saved_bytes(Forgetting(block), X)
    assert kept == X.untyped_storage().nbytes()
    plain, _ = saved_bytes(block, X)
    assert plain > 8 * kept


def test_unused_results_are_freed():
    """As the attention weights of a Conformer layer."""
    inside = []

    class Layer(nn.Module):
        def forward(self, x):
            weights = torch.softmax(x @ x.T, dim=-1)
            inside.append(weakref.ref(weights.untyped_storage()))
            return weights @ x, weights

    y, weights = forget(Layer(), X.clone().requires_grad_())
    assert inside[0]() is not None
    del weights
    assert inside[0]() is None
    y.sum().backward()


def test_values_of_freed_slots_are_not_kept():
    """A branch that leads nowhere takes no memory in backward either."""

    class Fork(nn.Module):
        def forward(self, x):
            branch = x.exp()
            branches.append(weakref.ref(branch.untyped_storage()))
            return branch, x.tanh()

    branches = []
    alive = []
    branch, y = forget(Fork(), X.clone().requires_grad_())
    del branch
    y.grad_fn.register_hook(lambda *_: alive.append(branches[-1]()))
    y.sum().backward()
    assert len(branches) == 2
    assert alive == [None]


def test_everything_is_freed_after_backward():
    block = layers()
    y = forget(block, X.clone().requires_grad_())
    storages = []
    for module in block:
        module.register_forward_hook(
            lambda m, a, out: storages.append(
                weakref.ref(out.untyped_storage())
            )
        )
    gc.disable()
    try:
        y.sum().backward()
        assert len(storages) >= 5
        assert all(storage() is None for storage in storages)
    finally:
        gc.enable()


def test_runs_to_the_end():
    """An operation may write a tensor after autograd has saved it."""
    ran = []

    class Last(nn.Module):
        def forward(self, x):
            y = x.sin()
            ran.append("sin")
            y = y + 1
            ran.append("add")
            return y

    forget(Last(), X.clone().requires_grad_()).sum().backward()
    # sin's input was all that was wanted.
    assert ran == ["sin", "add", "sin", "add"]


def test_backward_in_part():
    block = layers()
    weight = block[4].weight
    ours = gradients_of(forget(block, X).sum(), weight)
    assert_same(ours, gradients_of(block(X).sum(), weight))
    assert all(p.grad is None for p in block.parameters())


def test_retain_graph():
    block = layers()
    y = forget(block, X)
    first = torch.autograd.grad(y.sum(), block[0].weight, retain_graph=True)
    # Another way through the same graph, then the first once more.
    torch.autograd.grad(y.sum(), block[4].weight, retain_graph=True)
    again = torch.autograd.grad(y.sum(), block[0].weight)
    assert_same(first, again)
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()


def test_weights_that_change_between_two_backwards():
    """Whether their slot is filled again or was left over from the first."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 5)

        def forward(self, x):
            return self.a(x).tanh(), self.b(x).tanh()

    for again in (0, 1):
        block = Two().double()
        outputs = forget(block, X.clone().requires_grad_())
        outputs[1].sum().backward(retain_graph=True)
        with torch.no_grad():
            (block.a, block.b)[again].weight.add_(1)
        with pytest.raises(RuntimeError, match="was changed"):
            outputs[again].sum().backward()


@pytest.mark.parametrize("place", [0, 1, 2])
def test_weights_of_any_call_of_a_segment_that_changed(place):
    blocks = [nn.Sequential(nn.Linear(5, 5), nn.Tanh()) for _ in range(3)]
    segment, x = Segment(), X.float()
    for i, block in enumerate(blocks):
        x = segment.call(f"{i}", block, block.forward, (x,), {})
    with torch.no_grad():
        blocks[place][0].weight.add_(1)
    with pytest.raises(RuntimeError, match=f"{place}.0.weight was changed"):
        x.sum().backward()


def test_values_are_handed_out_once():
    """Those of a backward pass do not wait for another one."""
    block, segment = layers(), Segment()
    y = segment.call("block", block, block.forward, (X,), {})
    y.sum().backward(retain_graph=True)
    assert segment._values == {}


def test_double_backward():
    block = layers()
    found = []
    for call in (forget, lambda block, x: block(x)):
        x = X.clone().requires_grad_()
        y = call(block, x).square().sum()
        (gradient,) = torch.autograd.grad(y, x, create_graph=True)
        found.append(
            gradients_of(gradient.square().sum(), x, *block.parameters())
        )
    assert_same(*found)


def test_a_custom_function_may_open_its_tensors_twice():
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx, gradient):
            assert torch.equal(ctx.saved_tensors[0], ctx.saved_tensors[0])
            return 2 * ctx.saved_tensors[0] * gradient

    class Block(nn.Module):
        def forward(self, x):
            return Square.apply(x.tanh())

    x = X.clone().requires_grad_()
    ours = gradients_of(forget(Block(), x).sum(), x)
    assert_same(ours, gradients_of(Block()(x).sum(), x))
    # torch.utils.checkpoint refuses.
    with pytest.raises(RuntimeError, match="already unpacked"):
        checkpoint(Block(), x, use_reentrant=False).sum().backward()


def test_segments_within_a_block_and_around_them():
    """In both, and in torch's checkpoint, which must not notice."""
    inner = Forgetting(*(layers() for _ in range(3)))
    plain = nn.Sequential(*inner.blocks)
    reference = gradients_of(plain(X).sum(), *plain.parameters())
    ours = gradients_of(forget(inner, X).sum(), *plain.parameters())
    assert_same(ours, reference)
    kept, _ = saved_bytes(Forgetting(inner), X)
    assert kept == X.untyped_storage().nbytes()
    y = checkpoint(inner, X, use_reentrant=False)
    assert_same(gradients_of(y.sum(), *plain.parameters()), reference)


def test_together_with_a_reversible_sequence():
    def half():
        conv = nn.Conv1d(2, 2, 3, padding=1)
        return nn.Sequential(conv, nn.BatchNorm1d(2), nn.Tanh())

    torch.manual_seed(0)
    x = torch.randn(3, 4, 6, dtype=torch.double)
    couplings = [AdditiveCoupling(half(), half()) for _ in range(3)]
    around = ReversibleSequence(couplings).double()
    reference = gradients_of(around(x).sum(), *around.parameters())
    ours = gradients_of(forget(around, x).sum(), *around.parameters())
    assert_same(ours, reference)
    for coupling in couplings:
        coupling.f = Forgetting(coupling.f)
    ours = gradients_of(around(x).sum(), *around.parameters())
    assert_same(ours, reference)
    assert around.blocks[0].g[1].num_batches_tracked == 3


def test_hooks_around_the_call_apply_to_what_is_stored():
    """Such as save_on_cpu, and only those of the caller's thread."""
    moved = []

    def pack(tensor):
        moved.append(tensor.shape)
        return tensor.to(torch.float16)

    block = layers()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x.double()):
        y = forget(block, X.clone().requires_grad_())
    assert moved == [X.shape]
    y.sum().backward()


# --- several calls -----------------------------------------------------------


def chained(block, x, between=lambda x: x):
    """Calls the modules of a Sequential in one segment."""
    segment = Segment()
    for i, part in enumerate(block):
        x = segment.call(f"{i}", part, part.forward, (x,), {})
        x = between(x)
    return x


class Chained(nn.Module):
    def __init__(self, block, between=lambda x: x):
        super().__init__()
        self.block = block
        self.between = between

    def forward(self, x):
        return chained(self.block, x, self.between)


def test_calls_that_feed_each_other_store_one_input():
    block = layers()
    kept, y = saved_bytes(Chained(block), X)
    assert kept == X.untyped_storage().nbytes()
    ours = gradients_of(y.sum(), *block.parameters())
    assert_same(ours, gradients_of(block(X).sum(), *block.parameters()))


@pytest.mark.parametrize(
    "between, stored_inputs",
    [
        (lambda x: x * 2, 6),
        (lambda x: x.mul_(2), 6),
        (lambda x: x.view(4, 5), 6),
        (lambda x: x.requires_grad_(), 1),
    ],
)
def test_tensors_made_between_two_calls_are_stored(between, stored_inputs):
    block = nn.Sequential(*(nn.Linear(5, 5) for _ in range(6))).double()
    kept, y = saved_bytes(Chained(block, between), X)
    assert kept == stored_inputs * X.untyped_storage().nbytes()
    x = X
    for part in block:
        x = between(part(x))
    assert_same(
        gradients_of(y.sum(), *block.parameters()),
        gradients_of(x.sum(), *block.parameters()),
    )


def test_in_place_calls_within_a_segment():
    block = nn.Sequential(
        nn.Conv1d(4, 4, 3), nn.ReLU(inplace=True), nn.BatchNorm1d(4)
    ).double()
    x = torch.randn(2, 4, 9, dtype=torch.double)
    ours = gradients_of(chained(block, x).square().sum(), *block.parameters())
    reference = gradients_of(block(x).square().sum(), *block.parameters())
    assert_same(ours, reference)


def test_a_call_whose_result_is_used_by_others_too():
    block = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5)).double()
    segment = Segment()
    outputs = [X]
    for i, part in enumerate(block):
        y = segment.call(f"{i}", part, part.forward, (outputs[-1],), {})
        outputs.append(y)
    loss = sum((i + 1) * y.sin().sum() for i, y in enumerate(outputs))
    ours = gradients_of(loss, *block.parameters())
    outputs = [X]
    for part in block:
        outputs.append(part(outputs[-1]))
    loss = sum((i + 1) * y.sin().sum() for i, y in enumerate(outputs))
    assert_same(ours, gradients_of(loss, *block.parameters()))


def test_a_call_that_raises_keeps_no_tensor():
    """SpeechBrain's Xvector tries layer(x, lengths=...) and then layer(x)."""
    block = layers()
    segment = Segment()

    class Bad(nn.Module):
        def forward(self, x):
            return x.tanh().exp() @ torch.ones(7)

    x = segment.call("0", block, block.forward, (X,), {})
    with contextlib.suppress(RuntimeError):
        segment.call("1", Bad(), Bad().forward, (x,), {})
    y = segment.call("2", block, block.forward, (x,), {})
    ours = gradients_of(y.sum(), *block.parameters())
    reference = gradients_of(block(block(X)).sum(), *block.parameters())
    assert_same(ours, reference)
    # No hooks are left either: this is stored.
    assert saved_bytes(block, X)[0] > X.untyped_storage().nbytes()


# --- errors ------------------------------------------------------------------


def test_an_input_that_is_changed_in_place():
    block = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(5, 5)).double()
    with pytest.raises(RuntimeError, match="0 cannot.*inplace=False"):
        forget(block, X.clone())


@pytest.mark.parametrize("place", [0, 1, 2])
def test_any_of_several_inputs_that_is_changed_in_place(place):
    class Block(nn.Module):
        def forward(self, *tensors, last):
            [*tensors, last][place].add_(1)
            return tensors[0] * tensors[1] * last

    with pytest.raises(RuntimeError, match="0 cannot.*inplace=False"):
        forget(Block(), X.clone(), X.clone(), last=X.clone())


def test_an_input_that_is_changed_afterwards():
    x = X.clone()
    y = forget(layers(), x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        y.sum().backward()


def test_a_saved_tensor_that_is_changed_within_the_block():
    class Block(nn.Module):
        def forward(self, x):
            return x.exp().add_(1).sin()

    x = X.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        Block()(x).sum().backward()
    with pytest.raises(RuntimeError, match=r"0: .*\(4, 5\).*in place"):
        forget(Block(), x).sum().backward()


class Fickle(nn.Module):
    """Does something else at the second call."""

    def __init__(self, second):
        super().__init__()
        # A list would be repeated.
        self.todo = iter([lambda x: x.sin().sin(), second])

    def forward(self, x):
        return next(self.todo)(x)


@pytest.mark.parametrize(
    "second, what",
    [
        (lambda x: x.sin(), "saved 1 tensors"),
        (lambda x: x[:2].sin().sin(), r"saved torch.float64 \(2, 5\)"),
        (lambda x: x.float().sin().sin(), "saved torch.float32"),
        (lambda x: (x.sin().sin(), x + 1), "returned 2 tensors"),
        (lambda x: x.sin().sin().float(), "returned another dtype"),
    ],
)
def test_a_block_that_does_not_repeat_itself(second, what):
    x = X.clone().requires_grad_()
    y = forget(Fickle(second), x)
    with pytest.raises(RuntimeError, match=f"0 cannot be .*{what}"):
        y.sum().backward()
    assert x.grad is None


def test_backward_within_forward():
    class Penalty(nn.Module):
        def forward(self, x):
            y = x.sin().sum()
            return torch.autograd.grad(y, x, create_graph=True)[0].square()

    with pytest.raises(RuntimeError, match="backward inside its own forward"):
        forget(Penalty(), X.clone().requires_grad_())


# --- random numbers and state ------------------------------------------------


class Drawing(nn.Module):
    """Scales by a number that it draws, and again by another one."""

    def __init__(self, draw, **own):
        super().__init__()
        self.linear = nn.Linear(5, 5).double()
        self.draw = draw
        for name, value in own.items():
            setattr(self, name, value)

    def forward(self, x):
        # Three at a time: numpy draws normal numbers in pairs.
        scale = sum(self.draw(self) for _ in range(3))
        return torch.tanh(self.linear(x * (1 + scale)))


DRAWS = {
    "python": lambda: Drawing(lambda m: random.random()),
    "python_normal": lambda: Drawing(lambda m: random.gauss(0, 1)),
    "numpy": lambda: Drawing(lambda m: np.random.rand()),
    "numpy_normal": lambda: Drawing(lambda m: np.random.randn()),
    "torch": lambda: Drawing(lambda m: torch.rand(()).item()),
    "own_python": lambda: Drawing(
        lambda m: m.rng.random(), rng=random.Random(1)
    ),
    "own_numpy": lambda: Drawing(
        lambda m: m.rng.normal(), rng=np.random.default_rng(1)
    ),
    "own_numpy_state": lambda: Drawing(
        lambda m: m.rng.randn(), rng=np.random.RandomState(1)
    ),
    "own_in_a_list": lambda: Drawing(
        lambda m: m.rngs[0].random(), rngs=[random.Random(1)]
    ),
    "own_torch": lambda: Drawing(
        lambda m: torch.rand((), generator=m.rng).item(),
        rng=torch.Generator().manual_seed(1),
    ),
}


def two_steps(network, call, inside=lambda: None):
    """Outputs, gradients and the streams of random numbers afterwards."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    found = []
    for _ in range(2):
        x = X.clone().requires_grad_()
        y = call(network, x) * call(network, x)
        random.random(), np.random.rand(), torch.rand(1)
        inside()
        y.sum().backward()
        found += [y.detach(), x.grad]
    streams = random.random(), np.random.randn(), torch.rand(1).item()
    return [*found, *(p.grad for p in network.parameters())], streams


@pytest.mark.parametrize("kind", DRAWS)
def test_all_random_numbers_are_repeated(kind):
    """And all streams end where they end without recomputation."""
    torch.manual_seed(3)
    plain = nn.Sequential(DRAWS[kind](), DRAWS[kind]())
    # Generators of torch cannot be copied.
    net = nn.Sequential(DRAWS[kind](), DRAWS[kind]())
    net.load_state_dict(plain.state_dict())
    ours, streams = two_steps(net, lambda net, x: Forgetting(*net)(x))
    reference, streams_ref = two_steps(plain, lambda net, x: net(x))
    assert_same(ours, reference)
    assert streams == streams_ref
    # Its own generator too.
    assert net[0].draw(net[0]) == pytest.approx(
        plain[0].draw(plain[0])
    ) or not kind.startswith("own")


def test_a_generator_among_the_arguments():
    class Block(nn.Module):
        def forward(self, x, rng):
            return (x * rng.random()).tanh()

    found = []
    for call in (forget, lambda block, *args: block(*args)):
        rng, x = random.Random(0), X.clone().requires_grad_()
        call(Block(), x, rng).sum().backward()
        found += [x.grad, rng.random()]
    assert torch.equal(found[0], found[2])
    assert found[1] == found[3]


def test_streams_come_back_after_an_error_in_backward():
    class Failing(nn.Module):
        calls = []

        def forward(self, x):
            y = x.sin() * random.random() * np.random.rand() * torch.rand(1)
            self.calls.append(1)
            if len(self.calls) > 1:
                raise ZeroDivisionError
            return y

    y = forget(Failing(), X.clone().requires_grad_())
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    with pytest.raises(ZeroDivisionError):
        y.sum().backward()
    assert random.getstate() == states[0]
    assert str(np.random.get_state()) == str(states[1])
    assert torch.equal(torch.get_rng_state(), states[2])


@pytest.mark.parametrize("kind", ["argument", "parameter", "buffer"])
def test_fake_tensors_are_recognised(kind):
    """Fake tensors hold no random state that could be compared."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.zeros(5)
            if kind == "parameter":
                self.w = nn.Parameter(torch.ones(5))
            if kind == "buffer":
                del self.w
                self.register_buffer("w", torch.ones(5, requires_grad=True))

        def forward(self, x=0.0):
            return ((self.w if kind != "argument" else 1.0) + x).sin()

    with FakeTensorMode():
        arguments = [torch.ones(5, requires_grad=True)]
        block = Block()
        if kind == "argument":
            block.w = None
        y = forget(block, *(arguments if kind == "argument" else []))
        y.sum().backward()
        leaf = arguments[0] if kind == "argument" else block.w
        assert leaf.grad.shape == (5,)


def test_python_numbers_on_fake_tensors():
    """Memory is analysed with them; other layers may be dropped then."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(5, 5)

        def forward(self, x):
            for _ in range(random.randrange(1, 9)):
                x = self.linear(x).tanh()
            return x

    for seed in range(4):
        random.seed(seed)
        memory = training_step_memory(lambda: Forgetting(Block()), (4, 5))
        assert memory.peak_bytes > 0


@pytest.mark.parametrize("after", [nn.Identity(), nn.Tanh()])
def test_rrelu_fills_its_noise_after_it_was_saved(after):
    block = nn.Sequential(nn.Linear(5, 5), nn.RReLU(), after).double()
    found = []
    for call in (forget, lambda block, x: block(x)):
        torch.manual_seed(1)
        found.append(
            gradients_of(call(block, X).square().sum(), *block.parameters())
        )
    assert_same(*found)


class Counting(nn.Module):
    """Its result depends on how often it was called."""

    def __init__(self, act, **state):
        super().__init__()
        self.linear = nn.Linear(5, 5).double()
        self.act = act
        for name, value in state.items():
            setattr(self, name, value)
        self.register_buffer("total", torch.zeros(5).double())

    def forward(self, x):
        return torch.tanh(self.linear(x) * (1 + self.act(self, x)))


def counted(module, x):
    module.calls += 1
    return module.calls


def listed(module, x):
    module.history.append(1)
    return len(module.history)


def cached(module, x):
    """A table that is drawn once."""
    if module.table is None:
        module.table = torch.rand(5).double()
    return module.table


def summed(module, x):
    module.total = module.total + x.detach().mean(0)
    return module.total.clone()


def summed_in_place(module, x):
    module.total += x.detach().mean(0)
    return module.total.clone()


def registered(module, x):
    """As data-dependent initialisation does."""
    if not hasattr(module, "scale"):
        module.register_buffer("scale", x.detach().std(0))
    else:
        module.scale.mul_(2)
    return module.scale.clone()


STATES = {
    "counted": lambda: Counting(counted, calls=0),
    "listed": lambda: Counting(listed, history=[]),
    "cached": lambda: Counting(cached, table=None),
    "summed": lambda: Counting(summed),
    "summed_in_place": lambda: Counting(summed_in_place),
    "registered": lambda: Counting(registered),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", STATES)
def test_state_is_repeated_and_counted_once(kind, training):
    torch.manual_seed(3)
    net = nn.Sequential(STATES[kind](), STATES[kind]()).train(training)
    plain = copy.deepcopy(net)
    ours, _ = two_steps(net, lambda net, x: Forgetting(*net).train(training)(x))
    reference, _ = two_steps(plain, lambda net, x: net(x))
    assert_same(ours, reference)
    for a, b in zip(net, plain, strict=True):
        for name in ("calls", "history"):
            assert getattr(a, name, None) == getattr(b, name, None)
        assert a.state_dict().keys() == b.state_dict().keys()
        for key, value in b.state_dict().items():
            assert torch.equal(a.state_dict()[key], value)


@pytest.fixture
def warned(monkeypatch):
    """Differences are logged and kept here instead of raised."""
    messages = []
    monkeypatch.setattr(mismatch.logger, "warning", messages.append)
    mismatch.set_mismatch_action("warn")
    yield messages
    mismatch.set_mismatch_action("error")


def outside():
    """A block whose state is out of reach."""
    count = [0]

    class Outside(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(5, 5).double()

        def forward(self, x):
            count[0] += 1
            return torch.tanh(self.linear(x * count[0]))

    return Outside()


def test_state_that_cannot_be_repeated_is_an_error():
    first, second = outside(), layers()
    y = Forgetting(first, second)(X)
    with pytest.raises(RuntimeError, match="0 cannot.*output differs.*'warn'"):
        y.sum().backward()
    # Those of blocks that were right are there, none of this one.
    assert all(p.grad is not None for p in second.parameters())
    assert all(p.grad is None for p in first.parameters())


def test_state_that_cannot_be_repeated_may_be_a_warning(warned):
    block = outside()
    forget(block, X).sum().backward()
    assert block.linear.weight.grad is not None
    assert len(warned) == 1 and "0 cannot be computed again" in warned[0]


def test_one_bit_of_one_of_several_outputs():
    """Whatever its dtype, and also where autograd has no part in it."""
    calls = []

    class Block(nn.Module):
        def forward(self, x):
            calls.append(1)
            index = torch.arange(3)
            index[1] = len(calls)
            return x.sin(), [x > 0, {"index": index}]

    y, _ = forget(Block(), X.clone().requires_grad_())
    with pytest.raises(RuntimeError, match="output differs"):
        y.sum().backward()


def test_weights_that_change_behind_autograds_back():
    """No version counter changes, and plain autograd uses the new values."""
    block = layers()
    y = forget(block, X)
    block[2].weight.data.mul_(2)
    with pytest.raises(RuntimeError, match="output differs"):
        y.sum().backward()
    assert block[0].weight.grad is None


def test_outputs_that_the_caller_changes_in_place():
    # A linear layer saves its input, not its output.
    net = nn.Sequential(layers()[:-1], layers()[:-1])
    found = []
    for call in (forget, lambda block, x: block(x)):
        x = X.clone().requires_grad_()
        for block in net:
            x = call(block, x)
            x += 1
        x.view(-1)[3] = 0.0
        found.append(gradients_of(x.sum(), *net.parameters()))
    assert_same(*found)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.complex64, torch.complex128]
)
def test_outputs_of_any_dtype_are_compared(dtype):
    class Block(nn.Module):
        def forward(self, x):
            y = x.to(dtype) * 3
            return y.conj() if dtype.is_complex else -y

    found = []
    for call in (forget, lambda block, x: block(x)):
        x = X.clone().requires_grad_()
        y = call(Block(), x)
        found.append(gradients_of((y * y.conj()).abs().sum(), x))
    assert_same(*found)


def test_outputs_without_bits():
    class Block(nn.Module):
        def forward(self, x):
            sparse = (x > 0).to_sparse()
            small = torch.quantize_per_tensor(
                x.detach().float(), 0.1, 0, torch.qint8
            )
            meta = torch.zeros(2, device="meta")
            return x.sin(), sparse, small, meta, None

    x = X.clone().requires_grad_()
    forget(Block(), x)[0].sum().backward()
    assert torch.equal(x.grad, X.cos())


def test_outputs_that_are_negated_views():
    class Block(nn.Module):
        def forward(self, x):
            y = torch.complex(x, x.sin()).conj().imag
            assert y.is_neg()
            return y

    x = X.clone().requires_grad_()
    forget(Block(), x).sum().backward()
    torch.testing.assert_close(x.grad, -X.cos())


def test_a_parameter_that_is_returned_is_compared():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(5).double())

        def forward(self, x):
            return x.sin(), self.scale

    block = Block()
    y, _ = forget(block, X.clone().requires_grad_())
    block.scale.data.mul_(2)
    with pytest.raises(RuntimeError, match="output differs"):
        y.sum().backward()


class SlowDevice:
    """The test controls when comparisons arrive at the host."""

    def __init__(self):
        self.arrived = False
        self.waits = 0

    def query(self):
        """Whether a copy has arrived."""
        return self.arrived

    def synchronize(self):
        """Counts waits."""
        self.waits += not self.arrived


def test_a_device_is_not_waited_for_within_a_step(monkeypatch):
    """Blocks within blocks run forward during backward, in the same step."""
    device = SlowDevice()
    pending = mismatch._Pending(lambda differs: (differs, device))
    monkeypatch.setattr(mismatch, "_pending", pending)
    net = Forgetting(Forgetting(layers(), layers()), outside())
    net(X).sum().backward()
    assert device.waits == 0
    device.arrived = True
    with pytest.raises(RuntimeError, match="1 cannot be computed again"):
        net(X)


# --- weights that forward changes --------------------------------------------


class Words(nn.Module):
    """Shortens rows of its weight when they are looked up."""

    def __init__(self, embedding):
        super().__init__()
        self.embedding = embedding
        self.linear = nn.Linear(5, 5).double()

    def forward(self, index, x=0.0):
        return torch.tanh(self.linear(self.embedding(index) + x))


def words(**options):
    torch.manual_seed(0)
    embedding = nn.Embedding(9, 5, max_norm=1.0, **options).double()
    return Words(embedding), Words(embedding)


@pytest.mark.parametrize("scale_grad_by_freq", [True, False])
def test_embeddings_of_limited_norm(scale_grad_by_freq):
    """In two blocks, each of which changes it; backward twice."""
    index = torch.tensor([[1, 3], [3, 5]])
    found = []
    for call in (forget, lambda block, *args: block(*args)):
        first, second = words(scale_grad_by_freq=scale_grad_by_freq)
        weight = first.embedding.weight
        y = call(second, index + 2, call(first, index))
        after = weight.detach().clone()
        version = weight._version
        parameters = [*first.parameters(), *second.linear.parameters()]
        y.sum().backward(retain_graph=True)
        y.sum().backward()
        assert torch.equal(weight, after) and weight._version == version
        found.append([p.grad for p in parameters] + [after])
    assert_same(*found)


def test_an_optimizer_step_is_still_noticed_beside_them():
    first, _ = words()
    y = forget(first, torch.tensor([1, 3]))
    with torch.no_grad():
        first.linear.weight.add_(1)
    with pytest.raises(RuntimeError, match="0.linear.weight was changed"):
        y.sum().backward()
    y = forget(first, torch.tensor([1, 3]))
    with torch.no_grad():
        first.embedding.weight.mul_(0.5)
    with pytest.raises(RuntimeError, match="output differs"):
        y.sum().backward()


class Writing(nn.Module):
    def __init__(self, write):
        super().__init__()
        self.write = write
        self.linear = nn.Linear(5, 5).double()

    def forward(self, x):
        with torch.no_grad():
            self.write(self.linear.weight)
        return torch.tanh(self.linear(x))


def test_weights_that_are_clamped_in_forward():
    torch.manual_seed(0)
    block = Writing(lambda weight: weight.clamp_(-0.1, 0.1))
    plain = copy.deepcopy(block)
    ours = gradients_of(forget(block, X).sum(), *block.parameters())
    reference = gradients_of(plain(X).sum(), *plain.parameters())
    assert_same(ours, reference)


def test_weights_come_back_if_the_second_call_fails():
    calls = []

    def write(weight):
        calls.append(1)
        weight.clamp_(-0.1, 0.1)
        if len(calls) > 1:
            raise ZeroDivisionError

    block = Writing(write)
    weight = block.linear.weight
    y = forget(block, X)
    with pytest.raises(ZeroDivisionError):
        y.sum().backward()
    assert block.linear.weight is weight


def test_a_frozen_embedding_of_limited_norm():
    first, second = words()
    first.embedding.requires_grad_(False)
    found = []
    for call in (forget, lambda block, *args: block(*args)):
        y = call(first, torch.tensor([1, 3]))
        found.append(gradients_of(y.sum(), *first.linear.parameters()))
    assert_same(*found)


def test_a_shared_weight_stays_shared_in_the_replay():
    """The first module writes it, the second reads it."""

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 5)
            self.b.weight = self.a.weight

        def forward(self, x):
            with torch.no_grad():
                self.a.weight.fill_(x.mean())
            return torch.tanh(self.b(x))

    block = Shared().double()
    y = forget(block, X + 1)
    # Meanwhile it holds something else.
    forget(block, X + 2)
    y.sum().backward()
    assert block.b.bias.grad is not None


def test_weights_that_become_others_at_each_call():
    block = Writing(lambda weight: weight.mul_(0.9))
    y = forget(block, X)
    weight = block.linear.weight.detach().clone()
    with pytest.raises(RuntimeError, match="output differs"):
        y.sum().backward()
    assert torch.equal(block.linear.weight, weight)
    assert block.linear.weight.grad is None


def test_lazy_modules():
    """Their weights are made in the first call."""
    found = []
    for call in (forget, lambda block, x: block(x)):
        torch.manual_seed(0)
        block = nn.Sequential(nn.LazyLinear(4), nn.Tanh(), nn.LazyLinear(2))
        y = call(block, X.float())
        found.append(gradients_of(y.square().sum(), *block.parameters()))
    assert_same(*found)


# --- layouts -----------------------------------------------------------------


LAYOUTS = {
    "contiguous": lambda x: x.clone(),
    "transposed": lambda x: x.transpose(2, 3).clone().transpose(2, 3),
    "batch_last": lambda x: x.permute(1, 2, 3, 0).clone().permute(3, 0, 1, 2),
    "channels_last": lambda x: x.clone(memory_format=torch.channels_last),
    "sliced": lambda x: torch.cat([x, x], dim=3)[..., : x.shape[3]],
    "step_2": lambda x: torch.stack([x, x], dim=4).flatten(3)[..., ::2],
    "expanded": lambda x: x[:1].expand_as(x),
    "expanded_inside": lambda x: x[..., :1].expand_as(x),
}


@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_of_any_layout(layout, segmented):
    torch.manual_seed(0)
    block = nn.Sequential(
        nn.Conv2d(4, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.Tanh(),
        nn.Conv2d(4, 4, 3, padding=1),
    ).double()
    if layout == "channels_last":
        block = block.to(memory_format=torch.channels_last)
    x = torch.randn(3, 4, 6, 7, dtype=torch.double)
    found = []
    for call in (chained if segmented else forget, lambda block, x: block(x)):
        leaf = x.clone().requires_grad_()
        y = call(block, LAYOUTS[layout](leaf).sin())
        y = LAYOUTS[layout](y)
        found.append(
            [y, *gradients_of(y.square().sum(), leaf, *block.parameters())]
        )
    assert_same(*found)


def test_requires_grad_set_between_two_calls():
    """Of a frozen block's output, which needs none by itself."""
    block = layers()
    block[0].requires_grad_(False)
    segment = Segment()
    y = segment.call("0", block[0], block[0].forward, (X,), {})
    y.requires_grad_()
    z = segment.call("1", block[1:], block[1:].forward, (y,), {})
    ours = gradients_of(z.sum(), y, *block[1:].parameters())
    y = block[0](X).requires_grad_()
    reference = gradients_of(block[1:](y).sum(), y, *block[1:].parameters())
    assert_same(ours, reference)


# --- where nothing is saved ---------------------------------------------------


def test_a_segment_is_a_plain_call_where_nothing_is_saved():
    """It computes the same, and costs no checksums and recordings."""
    sums = []

    class Watched(nn.Tanh):
        def forward(self, x):
            sums.append(torch.is_grad_enabled())
            return super().forward(x)

    layer = Watched()
    x = torch.rand(3, requires_grad=True)
    segment = Segment()
    with nothing_saved():
        y = segment.call("layer", layer, layer.forward, (x,), {})
    assert torch.equal(y, x.tanh()) and sums == [True]
    assert segment.position == -1 and not segment.feeds([y])
    with pytest.raises(RuntimeError, match="calls backward in its own forward"):
        y.sum().backward()
    y = Segment().call("layer", layer, layer.forward, (x,), {})
    y.sum().backward()
    assert len(sums) == 3


def assert_forgets():
    """A segment runs its function again in backward."""
    calls = []

    class Counting(nn.Module):
        def forward(self, x):
            # Outside the module, whose own lists are put back.
            calls.append(1)
            return x.tanh()

    layer = Counting()
    x = torch.rand(3, requires_grad=True)
    Segment().call("layer", layer, layer.forward, (x,), {}).sum().backward()
    assert len(calls) == 2


def test_nothing_is_saved_after_an_inner_context_either():
    with nothing_saved():
        with nothing_saved():
            pass
        layer, segment = nn.Tanh(), Segment()
        x = torch.rand(3, requires_grad=True)
        y = segment.call("layer", layer, layer.forward, (x,), {})
    assert not segment.feeds([y])


def test_other_threads_save_as_before():
    with ThreadPoolExecutor(1) as other, nothing_saved():
        other.submit(assert_forgets).result()


def test_nothing_saved_applies_only_within_its_context():
    for error in (None, ZeroDivisionError):
        try:
            with nothing_saved(), nothing_saved():
                if error:
                    raise error
        except ZeroDivisionError:
            pass
        assert_forgets()
