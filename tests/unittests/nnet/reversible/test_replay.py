"""Changes of state in, during and after a call of f or g."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from sb_memeff.nnet.reversible import (
    AdditiveCoupling,
    ReversibleSequence,
    SpaceToDepth,
    Tap,
    check_invertible,
)
from tests.unittests.nnet.reversible.chains import (
    assert_same_state,
    chain,
    gradients,
    relative_error,
    stored,
)


def images(batch=3, dtype=torch.float32):
    torch.manual_seed(0)
    return torch.randn(batch, 8, 7, 6, dtype=dtype)


def with_f(f, *others):
    """A chain whose second block has this f."""
    net = chain(3, dropout=0.0)
    net.blocks[1].f = f
    return ReversibleSequence([*net.blocks, *others])


# --- between forward and backward ----------------------------------------------


@pytest.mark.parametrize("part", ["blocks.1.f.1", "blocks.0.g.2", "blocks.2"])
@pytest.mark.parametrize("mode", [True, False])
def test_mode_of_one_module_between_forward_and_backward(part, mode):
    net = chain(3).train(not mode)
    y = net(images())
    net.get_submodule(part).train(mode)
    with pytest.raises(RuntimeError, match="mode of the forward pass"):
        y.sum().backward()
    assert all(p.grad is None for p in net.parameters())
    net.train(not mode)
    y.sum().backward()


@pytest.mark.parametrize("times", [1, 2, 5])
def test_data_of_a_parameter_between_forward_and_backward(times):
    net = chain(2)
    y = net(images())
    weight = net.blocks[1].f[0].weight
    for _ in range(times):
        # Without a reference the memory of the first may be used again.
        weight.data = weight.data.clone()
    with pytest.raises(RuntimeError, match=r"blocks\.1\.f\.0\.weight was"):
        y.sum().backward()
    assert all(p.grad is None for p in net.parameters())


def test_an_argument_that_changes_between_forward_and_backward():
    net = ReversibleSequence([AdditiveCoupling(Scale(), Scale())])
    scale = torch.ones(3, 1, 1, 1)
    y = net(images(), scale)
    scale.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x, scale):
        return x * scale * self.gain


# --- in forward ----------------------------------------------------------------


class Table(nn.Module):
    """Adds a row of an embedding, which may renormalise its weight."""

    def __init__(self, max_norm):
        super().__init__()
        self.rows = nn.Embedding(5, 4, max_norm=max_norm)

    def forward(self, x):
        return x.tanh() + self.rows(torch.tensor(3)).view(1, 4, 1, 1)


def test_an_embedding_that_renormalises_its_weight():
    net = with_f(Table(max_norm=0.1))
    with pytest.raises(
        RuntimeError,
        match=r"blocks\.1\.f changes its parameter rows\.weight.*max_norm",
    ):
        net(images())
    net = with_f(Table(max_norm=None))
    _, ours, _ = gradients(net, images())
    _, reference, _ = gradients(stored(net), images())
    assert relative_error(ours, reference) < 1e-5


class Clamped(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.full((), 2.0))

    def forward(self, x):
        with torch.no_grad():
            self.gain.clamp_(max=1.0)
        return x * self.gain


class Unguarded(Clamped):
    def forward(self, x):
        self.gain.clamp_(max=1.0)
        return x * self.gain


class ChangesArgument(nn.Module):
    def forward(self, x, scale):
        with torch.no_grad():
            scale.mul_(0.5)
        return x * scale


def in_place():
    return nn.Sequential(nn.SiLU(inplace=True), nn.Conv2d(4, 4, 1))


class Secretly(nn.Module):
    def forward(self, x):
        with torch.no_grad():
            x.mul_(2)
        return x.tanh()


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: with_f(Clamped()), r"blocks\.1\.f changes its parameter gain"),
        (lambda: with_f(Unguarded()), r"blocks\.1\.f changes its input or a p"),
        (lambda: with_f(in_place()), r"blocks\.1\.f changes its input or a p"),
        (lambda: with_f(Secretly()), r"blocks\.1\.f changes its input in"),
        (
            lambda: ReversibleSequence(
                [nn.Conv2d(8, 8, 1), nn.SiLU(inplace=True)]
            ),
            r"blocks\.1 cannot be computed again: it changes its input",
        ),
        (
            lambda: ReversibleSequence([nn.Conv2d(8, 8, 1), Tap(Secretly())]),
            r"blocks\.1\.read changes its input",
        ),
        (
            lambda: ReversibleSequence([Secretly(), *chain(1).blocks]),
            r"blocks\.0 cannot be computed again: it changes its input",
        ),
    ],
)
def test_what_changes_in_place_while_it_runs_is_refused(build, message):
    net = build()
    x = images()
    before = x.clone()
    with pytest.raises(RuntimeError, match=message + ".*inplace=False"):
        net(x)
    if not isinstance(net.blocks[0], Secretly):
        assert torch.equal(x, before)


@pytest.mark.parametrize("by_name", [False, True])
def test_an_argument_that_f_changes_is_refused(by_name):
    net = ReversibleSequence(
        [AdditiveCoupling(ChangesArgument(), ChangesArgument())]
    )
    scale = torch.ones(3, 1, 1, 1)
    args, kwargs = ((), {"scale": scale}) if by_name else ((scale,), {})
    with pytest.raises(RuntimeError, match="changes extra argument 0"):
        net(images(), *args, **kwargs)


@pytest.mark.parametrize("save_memory", [True, False])
def test_a_stream_changed_in_place_is_refused_without_gradients_too(
    save_memory,
):
    net = with_f(Secretly())
    net.save_memory = save_memory
    with torch.no_grad(), pytest.raises(RuntimeError, match="changes its inp"):
        net(images())


def test_in_place_on_a_copy_of_another_dtype_is_harmless():
    net = with_f(in_place()).bfloat16()
    _, ours, _ = gradients(net, images(dtype=torch.bfloat16))
    _, reference, _ = gradients(stored(net), images(dtype=torch.bfloat16))
    assert relative_error(ours, reference) < 1e-2


def test_inference_tensors():
    net = chain(2).eval()
    with torch.no_grad():
        expected = net(images())
    with torch.inference_mode():
        assert torch.equal(net(images()), expected)


# --- state that a replay restores ----------------------------------------------


class Draws(nn.Module):
    """Draws from Python's, numpy's and a generator of its own."""

    def __init__(self, source):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.source = source
        self.generator = torch.Generator().manual_seed(4)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        factor = {
            "python": random.random,
            "numpy": np.random.rand,
            "own": lambda: torch.rand(1, generator=self.generator).item(),
            "counter": lambda: 1 / self.calls,
        }[self.source]()
        return self.conv(x * factor).tanh()


@pytest.mark.parametrize("source", ["python", "numpy", "own", "counter"])
def test_random_numbers_and_state_of_any_kind(source):
    torch.manual_seed(0)
    net = ReversibleSequence(
        [AdditiveCoupling(Draws(source), Draws(source)) for _ in range(3)]
    ).double()
    found = []
    for module in (net, stored(net)):
        random.seed(0)
        np.random.seed(0)
        _, grads, _ = gradients(module, images(dtype=torch.float64))
        calls = [m.calls for m in module.modules() if isinstance(m, Draws)]
        found.append((grads, random.random(), np.random.rand(), calls))
    assert relative_error(found[0][0], found[1][0]) < 1e-9
    assert found[0][1:] == found[1][1:]


@pytest.mark.parametrize("inside", ["forward", "both"])
def test_cached_parametrizations(inside):
    def conv():
        return parametrizations.weight_norm(nn.Conv2d(4, 4, 3, padding=1))

    torch.manual_seed(0)
    f = conv()
    net = ReversibleSequence(
        [AdditiveCoupling(f, conv()), AdditiveCoupling(conv(), f)]
    ).double()
    found = []
    for module in (net, stored(net)):
        x = images(dtype=torch.float64).requires_grad_()
        with parametrize.cached():
            # One use of the weight before the sequence, one after it.
            before = module.blocks[0].f(x[:, :4]).sum()
            y = module(x)
            after = module.blocks[0].f.weight.sum()
            loss = y.square().sum() + before + after
            if inside == "both":
                loss.backward()
        if inside == "forward":
            loss.backward()
        found.append([x.grad, *(p.grad for p in module.parameters())])
    assert all(g is not None for g in found[0])
    assert relative_error(*found) < 1e-9


def test_flags_of_backends_in_both_passes():
    cudnn = torch.backends.cudnn
    seen = []

    class Look(nn.Module):
        def forward(self, x):
            seen.append((cudnn.benchmark, cudnn.deterministic))
            return x.tanh()

    before = cudnn.benchmark, cudnn.deterministic
    try:
        cudnn.benchmark = cudnn.deterministic = True
        net = ReversibleSequence([Look(), AdditiveCoupling(Look(), Look())])
        y = net(images().requires_grad_())
        cudnn.deterministic = False
        y.sum().backward()
        assert (cudnn.benchmark, cudnn.deterministic) == (True, False)
    finally:
        cudnn.benchmark, cudnn.deterministic = before
    assert seen == [(False, True)] * 6


class GradientMode(nn.Module):
    """Takes a fast path without gradients, as transformer layers do."""

    def forward(self, x):
        needs = torch.is_grad_enabled() and x.requires_grad
        return x.tanh() if needs else x.tanh() + 1e-3


def test_forward_takes_the_path_of_replay():
    net = ReversibleSequence(
        [
            AdditiveCoupling(GradientMode(), GradientMode()),
            GradientMode(),
            AdditiveCoupling(GradientMode(), GradientMode()),
            Tap(GradientMode()),
        ]
    )
    x = images().requires_grad_()
    ours = net(x)
    reference = stored(net)(x)
    assert all(map(torch.equal, ours, reference))
    sum(o.sum() for o in ours).backward()


def test_a_transformer_layer_in_evaluation_mode():
    torch.manual_seed(0)

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)

        def forward(self, x):
            return self.layer(x.transpose(1, 2)).transpose(1, 2)

    net = ReversibleSequence(
        [AdditiveCoupling(Layer(), Layer()) for _ in range(4)]
    ).eval()
    x = torch.randn(2, 8, 9)
    assert torch.equal(*(m(x.requires_grad_()) for m in (net, stored(net))))
    assert check_invertible(net, x.detach()).inversion_error == 0.0


# --- empty batches -------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("exact", [True, False])
def test_a_batch_of_none(exact, dtype):
    torch.manual_seed(0)

    def conv(channels):
        return parametrizations.weight_norm(nn.Conv2d(channels, channels, 1))

    net = ReversibleSequence(
        [
            AdditiveCoupling(conv(4), conv(4)),
            Tap(nn.Identity()),
            SpaceToDepth(2),
            AdditiveCoupling(conv(16), conv(16)),
        ],
        exact=exact,
    ).to(dtype)
    found = []
    for module in (net, stored(net)):
        x = images(batch=0, dtype=dtype).requires_grad_()
        y, total = module(x)
        (y.sum() + total.sum()).backward()
        found.append((y, x.grad, [p.grad for p in module.parameters()]))
    assert found[0][0].shape == found[1][0].shape
    assert found[0][1].shape == (0, 8, 7, 6)
    assert all(g is not None and not g.any() for g in found[0][2])
    report = check_invertible(Only(net), images(batch=0, dtype=dtype))
    assert report.inversion_error == 0.0


class Only(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x)[0]


# --- the range of the grid -----------------------------------------------------


@pytest.mark.parametrize("scale", [5000.0, -5000.0])
@pytest.mark.parametrize("stream", [0, 1])
def test_either_stream_beyond_the_grid_on_either_side(scale, stream):
    net = ReversibleSequence(
        [AdditiveCoupling(nn.Tanh(), nn.Tanh()) for _ in range(2)]
    )
    x = torch.zeros(2, 4)
    x[1, 2 * stream] = scale
    y = net(x.requires_grad_())
    with pytest.raises(RuntimeError, match="blocks.0 the stream reached 500"):
        y.sum().backward()
    assert x.grad is None


class Constant(nn.Module):
    """Adds the same to a whole stream."""

    def __init__(self, value):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))

    def forward(self, x):
        return self.value.expand_as(x)


@pytest.mark.parametrize("block", [0, 1, 2])
def test_any_block_may_be_the_one_that_leaves_the_grid(block):
    """The last one too, though its output is the input of no other."""
    net = ReversibleSequence(
        [AdditiveCoupling(Constant(0.0), Constant(0.0)) for _ in range(3)]
    )
    net.blocks[block].g.value.data.fill_(5000.0)
    y = net(torch.zeros(2, 4))
    with pytest.raises(RuntimeError, match=f"at blocks.{block} the stream re"):
        y.sum().backward()
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_edge_of_the_grid_is_beyond_it(sign):
    """4096 + 2**-12 is rounded to 4096, so that 4096 may stand for either."""
    net = ReversibleSequence([AdditiveCoupling(nn.Tanh(), nn.Tanh())])
    x = torch.zeros(2, 4)
    x[0, 0] = sign * 4096.0
    y = net(x.requires_grad_())
    with pytest.raises(RuntimeError, match="reached 4096, beyond 4096"):
        y.sum().backward()
    x = x.detach()
    x[0, 0] = sign * (4096.0 - 2.0**-10)
    y = net(x.requires_grad_())
    y.sum().backward()
    assert x.grad is not None


# --- check_invertible ----------------------------------------------------------


class Forgetful(nn.Module):
    """Its convolution differs in backward; its last step begins at zero."""

    def __init__(self, last):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.last = last

    def forward(self, x):
        y = self.conv(x)
        if torch._C._current_graph_task_id() != -1:
            y = y * 1.1
        return self.last(y)


def zero_conv():
    conv = nn.Conv2d(4, 4, 1)
    nn.init.zeros_(conv.weight)
    return conv


def zero_norm():
    norm = nn.BatchNorm2d(4, momentum=None).eval()
    nn.init.zeros_(norm.weight)
    return norm


class LayerScale(nn.Module):
    def __init__(self, shape=(4, 1, 1), value=1e-6):
        super().__init__()
        self.gamma = nn.Parameter(torch.full(shape, value))

    def forward(self, x):
        return x * self.gamma


@pytest.mark.parametrize(
    "last",
    [
        zero_conv,
        zero_norm,
        LayerScale,
        lambda: LayerScale((), 0.0),
        lambda: LayerScale((1,), 0.0),
        lambda: nn.Sequential(zero_conv(), LayerScale()),
        lambda: parametrizations.weight_norm(zero_conv()),
    ],
)
def test_check_invertible_wakes_what_begins_at_zero(last):
    net = ReversibleSequence(
        [AdditiveCoupling(Forgetful(last()), Forgetful(last()))]
    )
    outer = nn.Sequential(zero_conv_of_8(), net)
    before = copy.deepcopy(outer)
    report = check_invertible(outer, images())
    assert report.blocks["1.blocks.0"] > 1e-3
    assert report.gradient_error > 1e-3 or not outer[0].weight.any()
    assert_same_state(outer, before)


def zero_conv_of_8():
    conv = nn.Conv2d(8, 8, 1)
    nn.init.dirac_(conv.weight)
    return conv


def test_check_invertible_says_the_same_again_and_draws_nothing():
    net = chain(2)
    nn.init.zeros_(net.blocks[0].f[4].weight)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    x = images()
    torch.set_rng_state(state)
    reports = [check_invertible(net, x) for _ in range(2)]
    assert reports[0] == reports[1]
    assert torch.equal(torch.get_rng_state(), state)
