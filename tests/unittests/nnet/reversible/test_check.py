"""Compare backward with stored activations."""

import copy
import math
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from sb_memeff.nnet.reversible import (
    AdditiveCoupling,
    ReversibleSequence,
    Tap,
    check_invertible,
    inversion_errors,
)
from tests.unittests.nnet.reversible.chains import (
    Nondeterministic,
    OtherOrder,
    assert_same_state,
    chain,
    images,
    stored,
)


def test_check_invertible_names_the_block_that_does_not_repeat():
    net = chain(3, dropout=0.0)
    net.blocks[1].g = Nondeterministic()
    report = check_invertible(net, images())
    assert report.blocks["blocks.2"] == 0.0
    assert report.blocks["blocks.1"] > 1e-3
    assert report.gradient_error > 1e-3
    assert "gradient error" in str(report)


def test_check_invertible_leaves_everything_as_it_was():
    outer = nn.Sequential(nn.Conv2d(8, 8, 1), chain(2))
    before = copy.deepcopy(outer.state_dict())
    x = images()
    state = torch.get_rng_state()
    report = check_invertible(outer, x)
    assert report.inversion_error == 0.0
    assert set(report.blocks) == {"1.blocks.0", "1.blocks.1"}
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in outer.parameters())
    for key, value in outer.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_check_invertible_begins_both_steps_with_the_same_state():
    """Else a module that uses what it counts would look wrong."""

    class Warming(nn.Conv2d):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x) * self.calls

    net = ReversibleSequence(
        [AdditiveCoupling(Warming(4, 4, 1), Warming(4, 4, 1))]
    ).double()
    report = check_invertible(net, images(dtype=torch.float64))
    assert report.gradient_error < 1e-12
    assert net.blocks[0].f.calls == 0


def test_check_invertible_repeats_numbers_of_python_and_numpy():
    """And leaves their generators as they were."""

    class Drawing(nn.Module):
        def forward(self, x):
            return x * (random.random() + np.random.rand())

    net = ReversibleSequence([AdditiveCoupling(Drawing(), Drawing())]).double()
    states = random.getstate(), np.random.get_state()[1].tolist()
    report = check_invertible(net, images(dtype=torch.float64))
    assert report.gradient_error < 1e-12
    assert states == (random.getstate(), np.random.get_state()[1].tolist())


@pytest.mark.parametrize("lost", [True, False])
def test_check_invertible_reports_gradients_of_one_kind_alone(lost):
    """Without saving memory, or with it, a weight gets none at all."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.chain = ReversibleSequence(
                [AdditiveCoupling(nn.Tanh(), nn.Tanh())]
            )
            self.scale = nn.Parameter(torch.ones(1, dtype=torch.float64))

        def forward(self, x):
            cut = self.chain.save_memory is lost
            scale = self.scale.detach() if cut else self.scale
            return self.chain(x * scale)

    report = check_invertible(Scaled(), images(dtype=torch.float64))
    assert report.parameters["scale"] > 1e-3
    assert report.gradient_error > 1e-3


def test_check_invertible_needs_a_reversible_sequence():
    with pytest.raises(ValueError, match="Conv2d holds no Reversible"):
        check_invertible(nn.Conv2d(1, 1, 1), images(channels=1))


class WrongOnce(AdditiveCoupling):
    """The first call of backward rebuilds something else."""

    def __init__(self, f, g, wrong):
        super().__init__(f, g)
        self.wrong = wrong

    def backward_streams(self, *args):
        (x1, x2), dx = super().backward_streams(*args)
        x2 = x2 + self.wrong
        self.wrong = 0.0
        return (x1, x2), dx


@pytest.mark.parametrize(
    "wrong, error",
    [(1.0, 1 / 6), (math.nan, math.inf), (math.inf, math.inf)],
)
def test_inversion_errors_are_the_worst_of_all_calls(wrong, error):
    block = WrongOnce(nn.Identity(), nn.Identity(), wrong)
    inner = ReversibleSequence([block, Tap(nn.Identity())])
    net = nn.ModuleDict({"inner": inner})
    x = torch.full((1, 2, 3), 2.0, requires_grad=True)
    with inversion_errors(net) as errors:
        y, _ = inner(inner(x)[0])
        y.sum().backward()
    assert errors == {"inner.blocks.0": pytest.approx(error)}
    assert not {"forward_streams", "backward_streams"} & set(vars(block))


def test_inversion_errors_are_none_where_all_is_stored():
    net = stored(chain(2))
    with inversion_errors(net) as errors:
        net(images()).sum().backward()
    assert errors == {}


def test_check_invertible_of_a_chain_without_invertible_blocks():
    report = check_invertible(
        ReversibleSequence([nn.Conv2d(8, 8, 1)]), images()
    )
    assert (report.inversion_error, report.blocks) == (0.0, {})
    assert "no block" in str(report)


def test_check_invertible_draws_zero_parameters_of_the_first_layer():
    net = ReversibleSequence([AdditiveCoupling(OtherOrder(64), nn.Tanh())])
    nn.init.zeros_(net.blocks[0].f.linear.weight)
    report = check_invertible(net, 100 * torch.randn(50, 128))
    assert report.inversion_error > 0
    assert not net.blocks[0].f.linear.weight.any()


class DiffersInBackward(nn.Module):
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
def test_check_invertible_draws_zero_parameters(last):
    net = ReversibleSequence(
        [AdditiveCoupling(DiffersInBackward(last()), DiffersInBackward(last()))]
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
