"""Attentive statistics pooling that stores only its input."""

import copy

import pytest
import torch
from speechbrain.lobes.models.ECAPA_TDNN import AttentiveStatisticsPooling
from torch import nn

from sb_memeff.memory.step import training_step_memory
from sb_memeff.nnet.attentive_pooling import attentive_statistics_pooling
from tests.unittests.nnet.reversible.chains import (
    assert_same_state,
    gradients,
    relative_error,
)


class Ours(nn.Module):
    """Our function with the weights of SpeechBrain's module."""

    def __init__(self, pooling, save_memory=True):
        super().__init__()
        self.pooling = pooling
        self.save_memory = save_memory

    def forward(self, x, lengths=None):
        return attentive_statistics_pooling(
            self.pooling, x, lengths, self.save_memory
        )


def pooling(channels=11, global_context=True):
    torch.manual_seed(0)
    return AttentiveStatisticsPooling(channels, 4, global_context)


@pytest.fixture(autouse=True)
def narrow_slices(monkeypatch):
    """Three slices of 11 channels, the last one narrower."""
    monkeypatch.setattr("sb_memeff.nnet.attentive_pooling.WIDTH", 4)


def batch(dtype=torch.float64):
    torch.manual_seed(1)
    return torch.randn(3, 11, 20, dtype=dtype)


@pytest.mark.parametrize("lengths", [None, torch.tensor([1.0, 0.7, 0.3])])
@pytest.mark.parametrize("global_context", [True, False])
@pytest.mark.parametrize("save_memory", [True, False])
def test_equals_speechbrains(save_memory, global_context, lengths):
    theirs = pooling(global_context=global_context).double()
    ours = Ours(copy.deepcopy(theirs), save_memory)
    x = batch()
    y_ref, reference, _ = gradients(theirs, x, lengths)
    y, found, _ = gradients(ours, x, lengths)
    torch.testing.assert_close(y, y_ref)
    assert relative_error(found, reference) < 1e-9
    torch.testing.assert_close(
        ours.pooling.tdnn.norm.norm.running_var,
        theirs.tdnn.norm.norm.running_var,
    )
    assert ours.pooling.tdnn.norm.norm.num_batches_tracked == 1
    torch.testing.assert_close(
        ours.eval()(x, lengths), theirs.eval()(x, lengths)
    )


def long_batch():
    """Enough frames and slices that sums in low precision show."""
    torch.manual_seed(1)
    # A mean beside the deviations, as behind an activation.
    return torch.randn(3, 64, 300).relu(), torch.tensor([1.0, 0.7, 0.3])


def squared(pooling):
    pooling.tdnn.activation.register_forward_hook(lambda m, x, y: y**2)


REPLACED = {
    "eps": lambda pooling: setattr(pooling, "eps", 0.5),
    "tanh": lambda pooling: setattr(pooling, "tanh", nn.Sigmoid()),
    "activation": lambda pooling: setattr(
        pooling.tdnn, "activation", nn.GELU()
    ),
    "norm": lambda pooling: setattr(pooling.tdnn, "norm", nn.Identity()),
    "hook": squared,
}


@pytest.mark.parametrize("change", REPLACED.values(), ids=REPLACED)
@pytest.mark.parametrize("save_memory", [True, False])
def test_parts_that_a_user_has_replaced(save_memory, change):
    theirs = pooling().double()
    change(theirs)
    x, lengths = batch(), torch.tensor([1.0, 0.7, 0.3])
    y_ref, reference, _ = gradients(theirs, x, lengths)
    y, found, _ = gradients(Ours(theirs, save_memory), x, lengths)
    torch.testing.assert_close(y, y_ref)
    assert relative_error(found, reference) < 1e-9


@pytest.mark.parametrize("save_memory", [True, False])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_error_against_float64_is_not_above_speechbrains(autocast, save_memory):
    """Value and gradients; backward runs outside autocast."""
    theirs = pooling(64)
    ours = Ours(copy.deepcopy(theirs), save_memory)
    x, lengths = long_batch()
    exact = copy.deepcopy(theirs).double()
    truth, true_gradients, _ = gradients(exact, x.double(), lengths)
    errors = []
    for module in (ours, theirs):
        y, found, _ = gradients(module, x, lengths, autocast=autocast)
        assert len(found) == len(true_gradients)
        errors.append(
            [relative_error([y], [truth])]
            # Of its own for each: a large gradient would hide the others.
            # The biases before a norm or a softmax have none to speak of.
            + [
                relative_error([ours], [true])
                for ours, true in zip(found, true_gradients)
                if true.norm() > 1e-6 * true_gradients[0].norm()
            ]
        )
    assert len(errors[0]) > 5
    for ours, theirs in zip(*errors):
        # Four attention channels: rounding is luck, up to a factor.
        assert ours < 2 * theirs + 1e-6
    assert sum(errors[0]) < 1.2 * sum(errors[1])


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_recomputed_is_what_was_stored(autocast):
    ours = Ours(pooling(64))
    twin = copy.deepcopy(ours)
    twin.save_memory = False
    x, lengths = long_batch()
    y, found, _ = gradients(ours, x, lengths, autocast=autocast)
    y_ref, reference, _ = gradients(twin, x, lengths, autocast=autocast)
    assert torch.equal(y, y_ref)
    assert relative_error(found, reference) < 1e-6
    assert_same_state(ours, twin)


@pytest.mark.parametrize("save_memory", [True, False])
def test_padding_instead_of_lengths(save_memory):
    """Counts exactly the frames given, while lengths may round up."""
    ours = Ours(pooling().double(), save_memory).eval()
    x = batch()
    frames = torch.tensor([20, 13, 7])
    padding = (torch.arange(20) >= frames[:, None]).unsqueeze(1)
    y = attentive_statistics_pooling(
        ours.pooling, x, None, save_memory, padding
    )
    for row, n in enumerate(frames):
        alone = ours(x[row : row + 1, :, :n])
        torch.testing.assert_close(y[row : row + 1], alone)


def test_pure_bfloat16():
    """SpeechBrain's module fails here."""
    y = Ours(pooling().bfloat16())(batch(torch.bfloat16))
    assert torch.isfinite(y).all()


def test_dropout_and_frozen_weights():
    ours = Ours(pooling().double())
    ours.pooling.tdnn.dropout = nn.Dropout1d(0.5)
    ours.pooling.conv.conv.weight.requires_grad_(False)
    stored = copy.deepcopy(ours)
    stored.save_memory = False
    x = batch()
    _, found, state = gradients(ours, x)
    for twin in (stored, copy.deepcopy(ours.pooling)):
        _, reference, state_ref = gradients(twin, x)
        assert [g is None for g in found] == [g is None for g in reference]
        assert relative_error(found, reference) < 1e-9
        assert torch.equal(state, state_ref)


def test_backward_twice_and_not_through_backward():
    ours = Ours(pooling().double())
    x = batch().requires_grad_()
    y = ours(x).square().sum()
    y.backward(retain_graph=True)
    once = x.grad.clone()
    y.backward()
    torch.testing.assert_close(x.grad, 2 * once)
    with pytest.raises(RuntimeError, match="create_graph.*save_memory"):
        torch.autograd.grad(ours(x).sum(), x, create_graph=True)


def test_memory_is_little_beside_the_input(monkeypatch):
    """Ours: input and gradient; SpeechBrain's peak is 11 times the input."""
    monkeypatch.undo()
    channels = 3072
    shape = (8, channels, 300)
    size = 4 * 8 * channels * 300

    def activations(build):
        return training_step_memory(build, shape).activation_bytes

    ours = activations(lambda: Ours(pooling(channels)))
    assert ours < 2.5 * size
    assert activations(lambda: pooling(channels)) > 4.5 * ours
