"""Every 8-bit optimizer with its settings. A new one is a line in OPTIMIZERS.

Authors
 * The sb_memeff authors 2026
"""

import copy
import dataclasses
import io
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_flatten

from sb_memeff.ops.blocks_8bit import Quantized8bit
from sb_memeff.optim import Adam8bit, AdamW8bit, SGD8bit


@dataclasses.dataclass(frozen=True)
class Kind:
    """A class with settings.

    Arguments
    ---------
    ours : type
        The 8-bit class.
    torchs : type
        torch's class of the same name.
    options : dict
        Settings of both. The learning rate is one at which ``network`` learns.
    """

    ours: type
    torchs: type
    options: dict[str, Any]

    def make(self, params, **changed):
        """Our optimizer."""
        return self.ours(params, **{**self.options, **changed})

    def make_torchs(self, params, **changed):
        """torch's optimizer, with the same settings."""
        return self.torchs(params, **{**self.options, **changed})


def _sgd(**options):
    options = {"lr": 0.03, "momentum": 0.9, **options}
    return Kind(SGD8bit, torch.optim.SGD, options)


def _adam(**options):
    return Kind(Adam8bit, torch.optim.Adam, {"lr": 0.003, **options})


def _adamw(**options):
    return Kind(AdamW8bit, torch.optim.AdamW, {"lr": 0.003, **options})


FAST = {"betas": (0.5, 0.6)}
# The first of a class stands for it where one is enough. The last has all that
# its kernel can do, and is what is compiled for GPUs that are not here.
OPTIMIZERS = {
    "SGD-nesterov": _sgd(nesterov=True),
    "SGD": _sgd(),
    "SGD-decay": _sgd(weight_decay=0.1),
    "SGD-dampening-maximize": _sgd(lr=0.1, dampening=0.7, maximize=True),
    "SGD-all": _sgd(nesterov=True, weight_decay=0.1, maximize=True),
    "Adam-decay": _adam(weight_decay=0.1),
    "Adam-foreach": _adam(foreach=True),
    "Adam-amsgrad": _adam(amsgrad=True, **FAST),
    "Adam-all": _adam(weight_decay=0.1, amsgrad=True, maximize=True),
    "AdamW-decay": _adamw(weight_decay=0.1),
    "AdamW-eps": _adamw(eps=0.01, **FAST),
    # Counts its steps where the parameters are.
    "AdamW-fused": _adamw(fused=True),
    "AdamW-all": _adamw(weight_decay=0.1, amsgrad=True, maximize=True),
}
CLASSES = {}
for kind in OPTIMIZERS.values():
    CLASSES.setdefault(kind.ours, kind)

each_setting = pytest.mark.parametrize(
    "kind", OPTIMIZERS.values(), ids=OPTIMIZERS
)
each_class = pytest.mark.parametrize(
    "kind", CLASSES.values(), ids=[ours.__name__ for ours in CLASSES]
)


def network():
    """Layers of more and of fewer than 4096 weights."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 32, 3),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3),
        nn.Flatten(),
        nn.Linear(64 * 4, 50),
    )


def loss(net, step=0):
    """Of random labels: learnt by heart in some dozens of steps."""
    generator = torch.Generator().manual_seed(step % 4)
    x = torch.randn(16, 4, 6, 6, generator=generator)
    y = torch.randint(50, (16,), generator=generator)
    return nn.functional.cross_entropy(net(x), y)


def train(net, optimizer, steps, first=0):
    """Losses of some steps."""
    # What is maximized is the negative loss, so that all go downhill.
    sign = -1 if optimizer.defaults.get("maximize") else 1
    losses = []
    for step in range(first, first + steps):
        optimizer.zero_grad()
        value = loss(net, step)
        (sign * value).backward()
        optimizer.step()
        losses.append(value.item())
    return losses


def trained(cls, steps=5, **options):
    """A network and its optimizer; ours have the settings of their kind."""
    net = network()
    if cls in CLASSES:
        options = {**CLASSES[cls].options, **options}
    optimizer = cls(net.parameters(), **options)
    train(net, optimizer, steps)
    return net, optimizer


def assert_same_weights(net, other):
    """Two networks have the same weights, bit for bit."""
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def distance(net, other, start):
    """Of two networks, relative to the way from the start."""
    a, b, c = (
        nn.utils.parameters_to_vector(n.parameters())
        for n in (net, other, start)
    )
    return ((a - b).norm() / (b - c).norm()).item()


def moved_by_rounding(optimizer, p, theirs, q):
    """Where a parameter of ours is, if another of torch's took the same steps.

    What rounding took from the first moment has moved ours already, as far as the
    first moment would have moved it in all further steps. For Adam this holds
    after the first step that the two do differently.
    """
    name = optimizer.bitsandbytes[0]
    stored = optimizer.state[p][name]
    exact = q.detach().double()
    if not isinstance(stored, Quantized8bit):
        return exact
    stored = optimizer._codebook(name, p.device).dequantize(stored)
    state, (group,) = theirs.state[q], theirs.param_groups
    residual = state[name].double() - stored
    rate, decay = group["lr"], group.get("momentum")
    if decay is None:
        decay, beta2 = group["betas"]
        square = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
        root = (square.double() / (1 - beta2 ** state["step"].item())).sqrt()
        rate = rate / (root + group["eps"])
    for _ in range(300):
        residual = decay * residual
        exact -= rate * residual * (decay if group.get("nesterov") else 1)
    return exact


def distances_to_torchs(ours, bnb, options):
    """Of our class and of bitsandbytes', after some steps."""
    nets = []
    for cls in (CLASSES[ours].torchs, ours, bnb):
        net = network()
        train(net, cls(net.parameters(), **options), 20)
        nets.append(net)
    theirs, *others = nets
    return [distance(net, theirs, network()) for net in others]


def through_a_file(state_dict):
    """What a file holds of a state_dict."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, map_location="cpu")


def assert_same_saved(saved, other):
    """Two state_dicts hold the same, bit for bit."""
    (a, form), (b, other_form) = tree_flatten(saved), tree_flatten(other)
    assert form == other_form
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y) if torch.is_tensor(x) else x == y


def assert_refused(optimizer, saved, message):
    """A checkpoint does not load, and changes nothing."""
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert_same_saved(optimizer.state_dict(), before)
