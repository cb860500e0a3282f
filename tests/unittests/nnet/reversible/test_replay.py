"""Changes of state in, during and after a call of f or g."""

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
    images,
    relative_error,
    stored,
)


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


class ChangesInput(nn.Module):
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
        (lambda: with_f(ChangesInput()), r"blocks\.1\.f changes its input in"),
        (
            lambda: ReversibleSequence(
                [nn.Conv2d(8, 8, 1), nn.SiLU(inplace=True)]
            ),
            r"blocks\.1 cannot be computed again: it changes its input",
        ),
        (
            lambda: ReversibleSequence(
                [nn.Conv2d(8, 8, 1), Tap(ChangesInput())]
            ),
            r"blocks\.1\.read changes its input",
        ),
        (
            lambda: ReversibleSequence([ChangesInput(), *chain(1).blocks]),
            r"blocks\.0 cannot be computed again: it changes its input",
        ),
    ],
)
def test_changes_in_place_during_a_call_are_refused(build, message):
    net = build()
    x = images()
    before = x.clone()
    with pytest.raises(RuntimeError, match=message + ".*inplace=False"):
        net(x)
    if not isinstance(net.blocks[0], ChangesInput):
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
    net = with_f(ChangesInput())
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

    class RecordsCall(nn.Module):
        def forward(self, x):
            seen.append((cudnn.benchmark, cudnn.deterministic))
            return x.tanh()

    before = cudnn.benchmark, cudnn.deterministic
    try:
        cudnn.benchmark = cudnn.deterministic = True
        net = ReversibleSequence(
            [RecordsCall(), AdditiveCoupling(RecordsCall(), RecordsCall())]
        )
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
    report = check_invertible(FirstOutput(net), images(batch=0, dtype=dtype))
    assert report.inversion_error == 0.0


class FirstOutput(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x)[0]


def test_random_numbers_of_python_numpy_and_own_generators():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.own = [torch.Generator().manual_seed(3)]
            self.rng = np.random.default_rng(3)

        def forward(self, x):
            noise = torch.rand(4, generator=self.own[0])
            scale = random.random() + np.random.rand() + self.rng.random()
            return self.linear(x) * noise * scale

    torch.manual_seed(0)
    net = ReversibleSequence(
        [AdditiveCoupling(Noisy(), Noisy()) for _ in range(2)]
    ).double()
    twin = stored(net)
    x = torch.randn(3, 8, dtype=torch.float64)
    found, after = [], []
    for module in (net, twin):
        random.seed(1)
        np.random.seed(1)
        found.append(gradients(module, x)[1])
        after.append(
            (
                random.random(),
                np.random.rand(),
                module.blocks[0].f.rng.random(),
                torch.rand(1, generator=module.blocks[0].f.own[0]).item(),
            )
        )
    assert relative_error(*found) < 1e-12
    assert after[0] == after[1]


def test_changes_between_forward_and_backward_are_found():
    net = chain(2)
    y = net(images())
    with torch.no_grad():
        net.blocks[1].g[0].bias.add_(1)
    with pytest.raises(RuntimeError, match=r"blocks\.1\.g\.0\.bias was"):
        y.sum().backward()
    y = net(images())
    net.blocks[0].f[0].weight.requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"blocks\.0\.f\.0\.weight was"):
        y.sum().backward()
    y = net(images())
    net.eval()
    with pytest.raises(RuntimeError, match="mode of the forward pass"):
        y.sum().backward()
    assert all(p.grad is None for p in net.parameters())


def test_changes_of_one_submodule_and_by_data_are_found():
    net = chain(2)
    y = net(images())
    net.blocks[0].g[1].eval()
    with pytest.raises(RuntimeError, match="mode of the forward pass"):
        y.sum().backward()
    net.train()
    y = net(images())
    weight = net.blocks[1].f[0].weight
    weight.data = weight.data + 1
    with pytest.raises(RuntimeError, match=r"blocks\.1\.f\.0\.weight was"):
        y.sum().backward()
    assert all(p.grad is None for p in net.parameters())


def test_cached_parametrizations_get_gradients():
    def conv():
        return parametrizations.weight_norm(nn.Conv1d(4, 4, 3, padding=1))

    torch.manual_seed(0)
    net = ReversibleSequence([AdditiveCoupling(conv(), conv())]).double()
    x = torch.randn(2, 8, 6, dtype=torch.float64)
    with parametrize.cached():
        _, ours, _ = gradients(net, x)
    _, reference, _ = gradients(stored(net), x)
    assert relative_error(ours, reference) < 1e-12


def test_attributes_count_once():
    class Counting(nn.Conv2d):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x) * self.calls

    net = ReversibleSequence(
        [AdditiveCoupling(Counting(4, 4, 1), Counting(4, 4, 1))]
    ).double()
    twin = stored(net)
    x = images(dtype=torch.float64)
    for _ in range(2):
        assert relative_error(gradients(net, x)[1], gradients(twin, x)[1]) < (
            1e-12
        )
    assert net.blocks[0].f.calls == twin.blocks[0].f.calls == 2


def test_modules_with_other_state():
    """Spectral norm changes its buffers in forward and uses them."""

    def half():
        conv = nn.Conv2d(4, 4, 3, padding=1)
        return nn.utils.parametrizations.spectral_norm(conv)

    torch.manual_seed(2)
    net = ReversibleSequence(
        [AdditiveCoupling(half(), half()) for _ in range(3)]
    ).double()
    twin = stored(net)
    x = images(dtype=torch.float64)
    _, ours, _ = gradients(net, x)
    _, reference, _ = gradients(twin, x)
    assert relative_error(ours, reference) < 1e-9
    assert_same_state(net, twin)


def test_global_random_stream_is_that_of_plain_autograd():
    draws = []
    for module in (chain(3), stored(chain(3))):
        torch.manual_seed(9)
        y = module(images())
        between = torch.rand(3)
        y.sum().backward()
        draws.append((between, torch.rand(3)))
    assert torch.equal(draws[0][0], draws[1][0])
    assert torch.equal(draws[0][1], draws[1][1])
