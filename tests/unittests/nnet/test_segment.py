"""What a segment forgets comes back when backward asks for it."""

import contextlib
import gc
import weakref

import pytest
import torch
from chains import saved_bytes
from torch import nn
from torch.utils.checkpoint import checkpoint

from sb_memeff.nnet.reversible import AdditiveCoupling, ReversibleSequence
from sb_memeff.nnet.segment import Segment


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


def test_one_tensor_given_twice_is_one_tensor_again():
    seen = []

    class Attention(nn.Module):
        def forward(self, query, key):
            seen.append(query is key)
            return (query * key).tanh()

    x = X.clone().requires_grad_()
    forget(Attention(), x, x).sum().backward()
    assert seen == [True, True]


def test_what_is_stored_is_what_comes_from_outside():
    block = layers(depth=8)
    kept, _ = saved_bytes(Forgetting(block), X)
    assert kept == X.untyped_storage().nbytes()
    plain, _ = saved_bytes(block, X)
    assert plain > 8 * kept


def test_results_that_nobody_uses_are_not_kept():
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


def test_nothing_is_kept_for_slots_that_died():
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
def test_what_comes_between_two_calls_is_stored(between, stored_inputs):
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


def test_a_call_that_raises_leaves_nothing_behind():
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
