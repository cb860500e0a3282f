"""Extra arguments reach the functions that take them."""

import weakref

import pytest
import torch
from torch import nn

from sb_memeff.nnet.reversible import (
    AdditiveCoupling,
    ReversibleSequence,
    SpaceToDepth,
    Tap,
)
from sb_memeff.nnet.reversible.arguments import ExtraArguments
from tests.unittests.nnet.reversible.chains import (
    gradients,
    images,
    relative_error,
    stored,
)


class Shift(nn.Module):
    """Adds the one argument that it declares."""

    takes_arguments = ("offset",)

    def forward(self, x, offset):
        return x.tanh() + offset


class Scale(nn.Module):
    """Takes other arguments."""

    takes_arguments = ("gain", "bias")

    def forward(self, x, gain, bias=0):
        return x.sin() * gain + bias


class Silent(nn.Module):
    """Takes no arguments."""

    takes_arguments = ()

    def forward(self, x):
        return x.cos()


class Undeclared(nn.Module):
    def forward(self, x, gain):
        return x * gain


def declaring(**options):
    """A chain in which each kind of block gets other arguments."""
    return ReversibleSequence(
        [
            Silent(),
            AdditiveCoupling(Shift(), Silent()),
            Tap(Shift()),
            SpaceToDepth(1),
            AdditiveCoupling(nn.ModuleList([Scale(), Shift()]), Scale()),
            Scale(),
            Tap(Scale()),
        ],
        **options,
    ).double()


def expected_outputs(x, offset, gain, bias):
    """The same chain, written out."""
    x1, x2 = x.cos().chunk(2, dim=1)
    x1 = x1 + x2.tanh() + offset
    x2 = x2 + x1.cos()
    total = torch.cat((x1, x2), dim=1).tanh() + offset
    x1 = x1 + x2.sin() * gain + bias + x2.tanh() + offset
    x2 = x2 + x1.sin() * gain + bias
    y = torch.cat((x1, x2), dim=1).sin() * gain + bias
    return y, total + y.sin() * gain + bias


@pytest.mark.parametrize("save_memory", [True, False])
def test_each_function_gets_the_arguments_that_it_declares(save_memory):
    x = torch.rand(2, 4, 3, dtype=torch.float64, requires_grad=True)
    named = {
        name: torch.rand((), dtype=torch.float64, requires_grad=True)
        for name in ("offset", "gain", "bias")
    }
    found = []
    for function in (declaring(save_memory=save_memory), expected_outputs):
        outputs = function(x, **named)
        loss = sum(output.square().sum() for output in outputs)
        grads = torch.autograd.grad(loss, [x, *named.values()])
        found.append([*outputs, *grads])
    assert relative_error(*found) < 1e-12


def test_the_inverse_gets_them_too():
    net = ReversibleSequence([AdditiveCoupling(Shift(), Scale())]).double()
    x = torch.rand(2, 4, dtype=torch.float64)
    named = {"offset": 0.3, "gain": 0.7}
    torch.testing.assert_close(net.inverse(net(x, **named), **named), x)
    (block,) = net.blocks
    torch.testing.assert_close(block.inverse(block(x, **named), **named), x)
    assert torch.equal(block(x, **named), net(x, **named))


def test_a_function_without_a_declaration_gets_all():
    net = ReversibleSequence([AdditiveCoupling(Undeclared(), Silent())])
    x = torch.rand(2, 4).double().requires_grad_()
    _, ours, _ = gradients(net, x, gain=2.0)
    _, reference, _ = gradients(stored(net), x, gain=2.0)
    assert relative_error(ours, reference) < 1e-12
    with pytest.raises(TypeError, match="unexpected keyword argument 'offset'"):
        net(x, gain=2.0, offset=1.0)


def test_arguments_by_position_reach_every_function():
    net = ReversibleSequence([AdditiveCoupling(Shift(), Silent())])
    with pytest.raises(TypeError, match="takes 2 positional arguments but 3"):
        net(torch.rand(2, 4), 1.0)


@pytest.mark.parametrize("save_memory", [True, False])
def test_an_argument_that_no_function_takes_is_refused_at_once(save_memory):
    calls = []
    net = declaring(save_memory=save_memory)
    net.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    x = torch.rand(2, 4, 3).double()
    message = r"takes the argument 'offsets'; they take offset, gain, bias"
    named = {"offset": 1.0, "gain": 1.0}
    with pytest.raises(TypeError, match=message):
        net(x, offsets=1.0, **named)
    assert not calls
    net(x, **named)
    assert calls


@pytest.mark.parametrize(
    "call",
    [
        lambda block, x: block(x, mask=None),
        lambda block, x: block.inverse(x, mask=None),
        lambda block, x: ReversibleSequence([block]).inverse(x, mask=None),
    ],
)
def test_blocks_alone_and_inverses_refuse_it_too(call):
    block = AdditiveCoupling(Silent(), Silent())
    with pytest.raises(TypeError, match="'mask'; they take none"):
        call(block, torch.rand(2, 4))


def test_split_tensors_keeps_none_of_them():
    extra = ExtraArguments(
        (1, [torch.zeros(1)]), {"a": {"b": torch.ones(1)}, "c": "d"}
    )
    tensors, with_tensors = extra.split_tensors()
    assert tensors == [extra.args[1][0], extra.kwargs["a"]["b"]]
    references = [weakref.ref(tensor) for tensor in tensors]
    del extra, tensors
    assert all(reference() is None for reference in references)
    assert with_tensors("xy") == ((1, ["x"]), {"a": {"b": "y"}, "c": "d"})


@pytest.mark.parametrize("compiled", ["function", "stored network"])
def test_a_compiled_module_declares_as_before(compiled):
    torch._dynamo.reset()
    block = AdditiveCoupling(Shift(), Silent())
    net = ReversibleSequence([block])
    x = torch.rand(2, 4).double()
    expected = net(x, offset=0.5)
    if compiled == "function":
        block.f = torch.compile(block.f, backend="eager")
        block.g = torch.compile(block.g, backend="eager")
    else:
        net.save_memory = False
        net = torch.compile(net, backend="eager", fullgraph=True)
    assert torch.equal(net(x, offset=0.5), expected)


class ScaledByLengths(nn.Module):
    """Uses what the sequence is called with."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, 4, 1, 1))

    def forward(self, x, lengths, *, gain=None):
        y = torch.tanh(x * self.weight) * lengths.view(-1, 1, 1, 1)
        return y if gain is None else y * gain["tensor"]


def test_extra_arguments_reach_f_and_g_and_get_gradients():
    net = ReversibleSequence(
        [
            AdditiveCoupling(ScaledByLengths(), ScaledByLengths())
            for _ in range(3)
        ]
    ).double()
    x = images(dtype=torch.float64)
    found = []
    for module in (net, stored(net)):
        lengths = torch.tensor([1.0, 0.5, 0.2], dtype=torch.float64)
        gain = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
        _, grads, _ = gradients(module, x, lengths, gain={"tensor": gain})
        found.append([*grads, gain.grad])
    assert relative_error(*found) < 1e-9
    # ... and they matter.
    _, others, _ = gradients(stored(net), x, torch.ones(3, dtype=torch.float64))
    assert relative_error(others, found[0][:-1]) > 1e-2


class Mixed(nn.Module):
    """Uses the tensors among arguments of all kinds."""

    def forward(self, x, *arguments):
        for argument in arguments:
            if isinstance(argument, torch.Tensor):
                x = x * argument
        return x.sin()


@pytest.mark.parametrize("wanted", [(True, True), (False, True), (True, False)])
@pytest.mark.parametrize(
    "between", [(None,), (2, "text"), (None, 0.5, None)], ids=str
)
def test_tensors_among_other_arguments_get_their_gradients(between, wanted):
    net = ReversibleSequence(
        [AdditiveCoupling(Mixed(), Mixed()) for _ in range(2)]
    ).double()
    x = images(dtype=torch.float64)
    found = []
    for module in (net, stored(net)):
        gains = [
            torch.tensor(value, dtype=torch.float64, requires_grad=needed)
            for value, needed in zip((0.7, 1.3), wanted)
        ]
        arguments = (*between, gains[0], *between, gains[1])
        _, grads, _ = gradients(module, x, *arguments)
        found.append([*grads, *(g.grad for g in gains if g.requires_grad)])
    assert relative_error(*found) < 1e-9


@pytest.mark.parametrize("kind", ["module", "coupling", "tap", "first tap"])
@pytest.mark.parametrize("save_memory", [True, False])
def test_extra_arguments_by_name_reach_every_kind_of_block(kind, save_memory):
    class Scaled(nn.Module):
        def forward(self, x, *, scale):
            return x * scale

    blocks = {
        "module": [Scaled()],
        "coupling": [AdditiveCoupling(Scaled(), Scaled())],
        "tap": [AdditiveCoupling(Scaled(), Scaled()), Tap(Scaled())],
        "first tap": [Tap(Scaled())],
    }[kind]
    net = ReversibleSequence(blocks, save_memory)
    x = images().requires_grad_()
    result = net(x, scale=0.5)
    y = result[-1] if isinstance(result, tuple) else result
    y.sum().backward()
    # x1 + x2 / 2 and x2 + (x1 + x2 / 2) / 2, halved by the tap.
    first, second = {
        "module": (0.5, 0.5),
        "coupling": (1.5, 1.75),
        "tap": (0.75, 0.875),
        "first tap": (0.5, 0.5),
    }[kind]
    assert x.grad[:, :4].unique().tolist() == [first]
    assert x.grad[:, 4:].unique().tolist() == [second]
