"""Tensors that a chain changes in place, and those that others may keep."""

import pytest
import torch
from torch import nn

from sb_memeff.nnet.reversible import (
    AdditiveCoupling,
    ReversibleSequence,
    Tap,
)
from tests.unittests.nnet.reversible.chains import (
    chain,
    gradients,
    images,
    relative_error,
    stored,
)


def sequences(batch=1, dtype=torch.float64):
    """Two streams of [batch, 4, 9]."""
    torch.manual_seed(0)
    return torch.randn(batch, 8, 9, dtype=dtype)


class Positional(nn.Module):
    """A parameter of the stream's shape is added last, as it is or a view."""

    def __init__(self, view=False):
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 3, padding=1)
        shape = (4, 9) if view else (1, 4, 9)
        self.position = nn.Parameter(torch.randn(shape))

    def forward(self, x):
        return self.conv(x).tanh() + self.position.view(1, 4, 9)


class Conditioned(nn.Module):
    """An argument of the sequence is added last."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 3, padding=1)

    def forward(self, x, condition):
        return self.conv(x).tanh() + condition


class ReturnsParameter(nn.Module):
    """Returns a parameter."""

    def __init__(self):
        super().__init__()
        self.position = nn.Parameter(torch.randn(1, 4, 9))

    def forward(self, x):
        return self.position


def couplings(make, count=3):
    return [AdditiveCoupling(make(), make()) for _ in range(count)]


def shared():
    f = Positional()
    return [AdditiveCoupling(f, f), AdditiveCoupling(f, f)]


def lists():
    f, g = (nn.ModuleList(Positional(i == 1) for i in range(3)) for _ in "fg")
    return [AdditiveCoupling(f, g), *couplings(Positional, 1)]


CHAINS = {
    "added last": lambda: couplings(Positional),
    "views": lambda: couplings(lambda: Positional(view=True)),
    "identities": lambda: couplings(nn.Identity),
    "parameters alone": lambda: couplings(ReturnsParameter),
    "shared": shared,
    "lists": lists,
    "taps": lambda: [
        *couplings(Positional, 1),
        Tap(nn.Identity()),
        *couplings(Positional, 1),
        Tap(nn.Identity()),
    ],
}


class Whole(nn.Module):
    """Output and total of a sequence together."""

    def __init__(self, blocks):
        super().__init__()
        self.net = ReversibleSequence(blocks)

    def forward(self, x, *args):
        y = self.net(x, *args)
        return y if isinstance(y, torch.Tensor) else y[0].sin() + y[1]


@pytest.mark.parametrize("kind", CHAINS)
def test_gradients_of_what_is_added_last(kind):
    torch.manual_seed(1)
    net = Whole(CHAINS[kind]()).double()
    _, ours, _ = gradients(net, sequences())
    _, reference, _ = gradients(stored(net), sequences())
    for a, b in zip(ours, reference, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("count", [1, 3])
def test_gradients_of_a_condition_that_is_added_last(count):
    torch.manual_seed(1)
    net = ReversibleSequence(couplings(Conditioned, count)).double()
    found = []
    for module in (net, stored(net)):
        condition = sequences()[:, :4].clone().requires_grad_()
        _, grads, _ = gradients(module, sequences(), condition)
        found.append([*grads, condition.grad])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", CHAINS)
def test_each_gradient_has_memory_of_its_own(kind):
    net = Whole(CHAINS[kind]()).double()
    x = sequences().requires_grad_()
    y = net(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    found = [x.grad, dy, *(p.grad for p in net.parameters())]
    storages = {g.untyped_storage().data_ptr() for g in found}
    assert len(storages) == len(found)


class KeepsTensors(nn.Module):
    """Keeps what passes, with a copy of how it was."""

    def __init__(self, keep, inner):
        super().__init__()
        self.keep = keep
        self.inner = inner

    def forward(self, x):
        self.keep(x)
        y = self.inner(x)
        self.keep(y)
        if y.requires_grad:
            y.register_hook(self.keep)
        if x.requires_grad:
            x.register_hook(self.keep)
        return y


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(
    "inner", [nn.Tanh, nn.Identity, Positional, lambda: nn.Dropout(0.5)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tensors_that_a_module_or_hook_keeps_do_not_change(inner, exact, dtype):
    kept = []

    def keep(tensor):
        kept.append((tensor.detach(), tensor.detach().clone()))

    blocks = couplings(lambda: KeepsTensors(keep, inner()), 2)
    blocks.insert(1, Tap(KeepsTensors(keep, nn.Identity())))
    net = ReversibleSequence(blocks, exact=exact).to(dtype)
    x = sequences(2 if inner is not Positional else 1, dtype).requires_grad_()
    y, total = net(x)
    forward = len(kept)
    (y.sin() + total).sum().backward()
    assert len(kept) > 2 * forward
    for tensor, copy in kept:
        assert torch.equal(tensor, copy)


class KeepsGradient(torch.autograd.Function):
    """Identity that hands on the gradient itself, and keeps it."""

    kept = []

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        KeepsGradient.kept.append((gradient, gradient.clone()))
        return gradient


class Function(nn.Module):
    def forward(self, x):
        return KeepsGradient.apply(x)


def test_a_function_may_keep_its_gradient():
    KeepsGradient.kept.clear()
    net = ReversibleSequence(couplings(Function)).double()
    _, ours, _ = gradients(net, sequences())
    assert len(KeepsGradient.kept) == 6
    for gradient, copy in KeepsGradient.kept:
        assert torch.equal(gradient, copy)
    _, reference, _ = gradients(stored(net), sequences())
    assert relative_error(ours, reference) < 1e-12


def test_a_gradient_may_be_changed_in_place_after_the_step():
    net = ReversibleSequence(couplings(Positional)).double()
    x = sequences().requires_grad_()
    y = net(x)
    y.square().sum().backward()
    before = [p.grad.clone() for p in net.parameters()]
    for number, p in enumerate(net.parameters()):
        p.grad.mul_(0)
        for other, copy in list(zip(net.parameters(), before))[number + 1 :]:
            assert torch.equal(other.grad, copy)


@pytest.mark.parametrize("kind", CHAINS)
def test_a_gradient_may_be_changed_in_place_while_backward_goes_on(kind):
    """As an optimizer does that steps in hooks, to free each gradient."""
    torch.manual_seed(1)
    net = Whole(CHAINS[kind]()).double()
    _, reference, _ = gradients(stored(net), sequences())
    found = {}

    def take(p):
        found[p] = p.grad.clone()
        p.grad.fill_(1e3)

    for p in net.parameters():
        p.register_post_accumulate_grad_hook(take)
    _, (of_x, *_), _ = gradients(net, sequences())
    ours = [of_x, *(found[p] for p in net.parameters())]
    for a, b in zip(ours, reference, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


# --- strides -------------------------------------------------------------------

LAYOUTS = {
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "sliced": lambda t: torch.stack((t, t), -1)[..., 1],
    "step 2": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "channels last": lambda t: t.movedim(1, -1).contiguous().movedim(-1, 1),
    "offset": lambda t: torch.cat((t, t))[len(t) :],
    "expanded": lambda t: t[:1].expand(t.shape),
}


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 3, padding=1)
        self.gain = nn.Parameter(torch.randn(3, 4, 9))

    def forward(self, x, scale):
        return (self.conv(x) * self.gain).tanh() * scale


class Stem(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(8, 8, 1)

    def forward(self, x, scale):
        return self.conv(x)


@pytest.mark.parametrize("begin", ["coupling", "other"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_input_extras_and_parameters_of_any_strides(layout, begin):
    change = LAYOUTS[layout]
    torch.manual_seed(0)
    first = [Stem()] if begin == "other" else []
    net = ReversibleSequence([*first, *couplings(Scaled)]).double()
    plain = stored(net)
    x, scale = sequences(3), sequences(3)[:, :4] + 2
    found = []
    for module, changed in ((net, change), (plain, lambda t: t.clone())):
        # Where both are expanded they must still hold the same values.
        leaves = [change(t).clone().requires_grad_() for t in (x, scale)]
        for name, parameter in module.named_parameters():
            if name.endswith("gain"):
                parameter.data = changed(change(parameter.data).clone())
                if module is net and layout != "offset":
                    assert not parameter.is_contiguous()
        y = module(*map(changed, leaves))
        y.sin().sum().backward()
        gradients_of = [*leaves, *module.parameters()]
        found.append([t.grad for t in gradients_of])
    for ours, reference in zip(*found, strict=True):
        if layout == "expanded":
            # Only the first of the batch went in; in the reference each did.
            leaf = ours.shape[0] == 3
            ours, reference = (
                g.sum(0) if leaf else g for g in (ours, reference)
            )
        torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-12)


def test_input_and_output_of_the_caller_stay_untouched():
    for batch in (1, 3):  # one utterance: its halves are contiguous views
        net = chain(3)
        x = images(batch=batch).requires_grad_()
        before = x.detach().clone()
        y = net(x)
        after = y.detach().clone()
        y.square().sum().backward()
        assert torch.equal(x, before)
        assert torch.equal(y, after)


class Sum(nn.Module):
    """Both streams get the same tensor for a gradient."""

    takes_streams = True

    def forward(self, streams):
        return streams[0] + streams[1]


@pytest.mark.parametrize("head", [Sum(), nn.Identity(), nn.Flatten()])
def test_gradients_that_share_memory(head):
    net = ReversibleSequence([*chain(2).blocks, head]).double()
    x = images(dtype=torch.float64)
    _, reference, _ = gradients(stored(net), x)
    _, ours, _ = gradients(net, x)
    assert relative_error(ours, reference) < 1e-9
    # ... and that of the caller is not overwritten.
    y = net(x)
    dy = torch.ones_like(y)
    y.backward(dy)
    assert torch.equal(dy, torch.ones_like(y))


class TwoPositions(nn.Module):
    """Adds parameters of the stream's full shape last.

    autograd then hands out one tensor for the gradients of both, and that of
    the stream itself.
    """

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 3, padding=1)
        self.position = nn.Parameter(torch.randn(1, 4, 9))
        self.offset = nn.Parameter(torch.randn(1, 4, 9))

    def forward(self, x, condition=0):
        return self.conv(x).tanh() + self.position + self.offset + condition


def positional_chain(shared):
    torch.manual_seed(0)
    couplings = []
    for _ in range(3):
        f, g = TwoPositions(), TwoPositions()
        if shared:
            g.position = f.position
        couplings.append(AdditiveCoupling(f, g))
    return ReversibleSequence(couplings).double()


@pytest.mark.parametrize("shared", [False, True])
def test_gradients_of_parameters_that_are_added_last(shared):
    net = positional_chain(shared)
    x = torch.randn(1, 8, 9, dtype=torch.float64)
    found = []
    for module in (net, stored(net)):
        condition = torch.ones(1, 4, 9, dtype=torch.float64)
        condition.requires_grad_()
        _, grads, _ = gradients(module, x, condition=condition)
        found.append([*grads, condition.grad])
    for ours, reference in zip(*found, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-12)


class Identity(nn.Module):
    """Hands its input on: whoever adds to the result changes the input."""

    def forward(self, x):
        return x


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("function", [nn.Tanh, Identity])
def test_tensors_that_hooks_keep_do_not_change(function, exact):
    net = ReversibleSequence(
        [AdditiveCoupling(function(), function()) for _ in range(3)],
        exact=exact,
    )
    kept = []

    def keep(module, inputs, output):
        for x in (*inputs, output):
            kept.append((x, x.detach().clone()))

    def keep_gradients(module, inputs, outputs):
        for x in (*inputs, *outputs):
            kept.append((x, x.clone()))

    for part in net.modules():
        if isinstance(part, function):
            part.register_forward_hook(keep)
            part.register_full_backward_hook(keep_gradients)
    net(images().requires_grad_()).square().sum().backward()
    assert len(kept) == 6 * 2 * 2 + 6 * 2  # f, g: twice, then backward
    for now, before in kept:
        assert torch.equal(now, before)
