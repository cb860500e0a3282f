"""8-bit optimizers against torch's, and against bitsandbytes' faults.

Authors
 * The sb_memeff authors 2026
"""

import copy
import io
import logging
import pickle

import bitsandbytes
import pytest
import torch
from speechbrain.nnet.schedulers import NoamScheduler
from speechbrain.utils.checkpoints import Checkpointer
from speechbrain.utils.optimizers import rm_vector_weight_decay
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_flatten

from sb_memeff.lobes.models.RevResNet import RevResNet
from sb_memeff.memory.tracker import StorageTracker
from sb_memeff.ops.blocks_8bit import BLOCK, VALUES, Quantized8bit
from sb_memeff.optim import (
    Adam8bit,
    AdamW8bit,
    SGD8bit,
    keep_32bit_states,
    optimizer_8bit,
    state_bytes,
)

TWINS = {
    SGD8bit: torch.optim.SGD,
    Adam8bit: torch.optim.Adam,
    AdamW8bit: torch.optim.AdamW,
}
SGDS = (SGD8bit, torch.optim.SGD)
SETTINGS = {
    "sgd": (SGD8bit, {"lr": 0.03, "momentum": 0.9}),
    "nesterov": (SGD8bit, {"lr": 0.03, "momentum": 0.9, "nesterov": True}),
    "sgd_decay": (SGD8bit, {"lr": 0.03, "momentum": 0.9, "weight_decay": 0.1}),
    "dampening": (SGD8bit, {"lr": 0.1, "momentum": 0.9, "dampening": 0.7}),
    "sgd_maximize": (SGD8bit, {"lr": 0.03, "momentum": 0.9, "maximize": True}),
    "adam": (Adam8bit, {"lr": 0.003}),
    "adam_decay": (Adam8bit, {"lr": 0.003, "weight_decay": 0.1}),
    "adam_maximize": (Adam8bit, {"lr": 0.003, "maximize": True}),
    "amsgrad": (Adam8bit, {"lr": 0.003, "amsgrad": True}),
    "adamw": (AdamW8bit, {"lr": 0.003, "weight_decay": 0.1}),
    "fused": (AdamW8bit, {"lr": 0.003, "fused": True}),
    "foreach": (Adam8bit, {"lr": 0.003, "foreach": True}),
}
CLASSES = {
    SGD8bit: {"lr": 0.03, "momentum": 0.9, "nesterov": True},
    Adam8bit: {"lr": 0.003, "weight_decay": 0.01},
    AdamW8bit: {"lr": 0.003, "weight_decay": 0.01},
}
every_setting = pytest.mark.parametrize(
    "kind, options", SETTINGS.values(), ids=SETTINGS
)
every_class = pytest.mark.parametrize("kind", CLASSES)


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


def trained(kind, steps=5, **options):
    net = network()
    optimizer = kind(net.parameters(), **{**CLASSES.get(kind, {}), **options})
    train(net, optimizer, steps)
    return net, optimizer


def distance(net, other, start):
    """Of two networks, relative to the way from the start."""
    a, b, c = (
        nn.utils.parameters_to_vector(n.parameters())
        for n in (net, other, start)
    )
    return ((a - b).norm() / (b - c).norm()).item()


def through_a_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, map_location="cpu")


@every_setting
def test_trajectory_of_a_network(kind, options):
    start, net, other = network(), network(), network()
    optimizer = kind(net.parameters(), **options)
    twin = TWINS[kind](other.parameters(), **options)
    ours, theirs = train(net, optimizer, 40), train(other, twin, 40)
    assert theirs[-1] < 0.5 * theirs[0]
    assert distance(net, other, start) < 0.06
    assert ours[-1] == pytest.approx(theirs[-1], rel=0.05, abs=2e-3)
    assert state_bytes(optimizer) < 0.3 * state_bytes(twin)
    assert optimizer.state_bytes() == state_bytes(optimizer)


@every_class
def test_trajectory_of_a_convex_task(kind):
    """Least squares: the same way down, the same end."""
    torch.manual_seed(0)
    data = torch.randn(256, 64)
    target = data @ torch.randn(64, 64)

    def descend(kind):
        weight = nn.Parameter(torch.zeros(64, 64))
        options = {"lr": 2.0, "momentum": 0.9} if kind in SGDS else {"lr": 0.05}
        optimizer = kind([weight], **options)
        losses = []
        for _ in range(300):
            optimizer.zero_grad()
            value = (data @ weight - target).square().mean()
            value.backward()
            optimizer.step()
            losses.append(value.item())
        return torch.tensor(losses)

    ours, theirs = descend(kind), descend(TWINS[kind])
    assert theirs[-1] < 1e-3 * theirs[0]
    assert ours[-1] < 2e-3 * ours[0]
    assert ((ours - theirs).abs() < 0.02 * theirs[0]).all()


@every_setting
def test_one_step_is_torchs(kind, options):
    """From the same states: the same weights; states rounded, no more."""
    net = network()
    optimizer = kind(net.parameters(), **options)
    train(net, optimizer, 5)
    other = copy.deepcopy(net)
    twin = TWINS[kind](other.parameters(), **options)
    twin.load_state_dict(through_a_file(optimizer.state_dict()))
    train(net, optimizer, 1)
    train(other, twin, 1)
    for p, q in zip(net.parameters(), other.parameters()):
        assert torch.equal(p, q)
        packed = optimizer.state[p]
        for name, exact in twin.state[q].items():
            if name not in optimizer.signed:
                continue
            if p.numel() < 4096:
                assert torch.equal(packed[name], exact)
                continue
            assert isinstance(packed[name], Quantized8bit)
            check_bound(packed[name], exact, optimizer.signed[name])


def check_bound(packed, exact, signed):
    """Each value within half a gap of the codes (a whole one next to 0)."""
    values = torch.tensor(VALUES[signed])
    scale = packed.absmax.repeat_interleave(BLOCK)[: exact.numel()]
    scaled = exact.flatten() / scale
    stored = values[packed.codes.flatten().long()]
    above = torch.searchsorted(values, scaled).clamp(1, 255)
    bound = (values[above] - values[above - 1]) / 2
    if not signed:
        bound[above == 1] *= 2
    assert ((stored - scaled).abs() <= 1.0001 * bound + 1e-7).all()


def test_states_are_a_quarter_in_the_widths_of_revnet101():
    with FakeTensorMode():
        net = RevResNet.from_preset("RevNet101", block_sizes=[1, 1, 2, 1])
        sizes = {}
        for kind in (*TWINS, *TWINS.values()):
            options = {"momentum": 0.9} if kind in SGDS else {}
            optimizer = kind(net.parameters(), lr=0.1, **options)
            for p in net.parameters():
                p.grad = torch.zeros_like(p)
            optimizer.step()
            sizes[kind] = state_bytes(optimizer)
    for kind, twin in TWINS.items():
        assert 0.25 < sizes[kind] / sizes[twin] < 0.27


@every_class
def test_state_dict_resumes_exactly(kind):
    net, optimizer = trained(kind)
    other = copy.deepcopy(net)
    resumed = kind(other.parameters(), **CLASSES[kind])
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    assert state_bytes(resumed) == state_bytes(optimizer)
    for p, q in zip(net.parameters(), other.parameters()):
        for name in optimizer.signed:
            a, b = optimizer.state[p].get(name), resumed.state[q].get(name)
            if isinstance(a, Quantized8bit):
                assert torch.equal(a.codes, b.codes)
                assert torch.equal(a.absmax, b.absmax)
    train(net, optimizer, 5, first=5)
    train(other, resumed, 5, first=5)
    for p, q in zip(net.parameters(), other.parameters()):
        assert torch.equal(p, q)


@every_class
def test_from_and_to_the_32bit_class(kind):
    """torch's checkpoints load, and ours in torch's class."""
    twin = TWINS[kind]
    net, optimizer = trained(twin, **CLASSES[kind])
    packed = kind(copy.deepcopy(net).parameters(), **CLASSES[kind])
    packed.load_state_dict(through_a_file(optimizer.state_dict()))
    assert state_bytes(packed) < 0.3 * state_bytes(optimizer)
    back = twin(copy.deepcopy(net).parameters(), **CLASSES[kind])
    back.load_state_dict(through_a_file(packed.state_dict()))
    for p, q in zip(net.parameters(), back.param_groups[0]["params"]):
        for name in packed.signed:
            if name in optimizer.state[p]:
                exact = optimizer.state[p][name]
                error = (back.state[q][name] - exact).abs().max()
                assert error <= 0.008 * exact.abs().max()


def test_maxima_that_torch_carried_along_are_not_believed():
    net, optimizer = trained(Adam8bit)
    twin = torch.optim.Adam(net.parameters())
    twin.load_state_dict(optimizer.state_dict())
    train(net, twin, 20)
    saved = twin.state_dict()
    assert any("exp_avg_absmax" in s for s in saved["state"].values())
    again = Adam8bit(net.parameters())
    again.load_state_dict(saved)
    for p, state in again.state.items():
        if isinstance(state["exp_avg"], Quantized8bit):
            exact = twin.state[p]["exp_avg"]
            assert state["exp_avg"].absmax.max() == exact.abs().max()


@every_class
def test_checkpointer_and_scheduler(kind, tmp_path):
    """SpeechBrain's Checkpointer and a schedule, as Brain uses them."""

    def build():
        net = network()
        optimizer = kind(net.parameters(), **CLASSES[kind])
        schedule = NoamScheduler(0.01, 10)
        checkpointer = Checkpointer(
            tmp_path, {"net": net, "optimizer": optimizer, "lr": schedule}
        )
        return net, optimizer, schedule, checkpointer

    def go(net, optimizer, schedule, steps, first):
        for step in range(first, first + steps):
            schedule(optimizer)
            train(net, optimizer, 1, step)

    net, optimizer, schedule, checkpointer = build()
    go(net, optimizer, schedule, 7, 0)
    checkpointer.save_checkpoint()
    go(net, optimizer, schedule, 7, 7)
    other, *rest, checkpointer = build()
    checkpointer.recover_if_possible()
    go(other, *rest, 7, 7)
    for p, q in zip(net.parameters(), other.parameters()):
        assert torch.equal(p, q)


def test_settings_of_the_checkpoint_win_and_are_named(caplog):
    net, optimizer = trained(Adam8bit)
    other = Adam8bit(net.parameters(), lr=0.5, betas=(0.8, 0.99))
    with caplog.at_level(logging.INFO, "sb_memeff.optim"):
        other.load_state_dict(optimizer.state_dict())
    group = other.param_groups[0]
    assert group["lr"] == 0.003 and group["weight_decay"] == 0.01
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    for part in (
        "lr=0.003 (given: 0.5)",
        "weight_decay=0.01 (given: 0)",
        "betas=(0.9, 0.999) (given: (0.8, 0.99))",
    ):
        assert part in record.getMessage()
    caplog.clear()
    usual = Adam8bit(net.parameters(), lr=0.5, weight_decay=0.01)
    with caplog.at_level(logging.INFO, "sb_memeff.optim"):
        usual.load_state_dict(optimizer.state_dict())
    (record,) = caplog.records
    assert record.levelno == logging.INFO


def assert_same_saved(saved, other):
    """Two state_dicts hold the same, bit for bit."""
    (a, form), (b, other_form) = tree_flatten(saved), tree_flatten(other)
    assert form == other_form
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y) if torch.is_tensor(x) else x == y


def test_settings_of_every_group_are_named(caplog):
    weights = [nn.Parameter(torch.ones(2)) for _ in range(2)]

    def optimizer(*rates):
        return Adam8bit(
            {"params": [w], "weight_decay": r} for w, r in zip(weights, rates)
        )

    with caplog.at_level(logging.WARNING, "sb_memeff.optim"):
        optimizer(0.1, 0.2).load_state_dict(optimizer(0.1, 0.3).state_dict())
    (record,) = caplog.records
    message = record.getMessage()
    assert "group 1 are used: weight_decay=0.3 (given: 0.2)" in message


def refused(optimizer, saved, message):
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert_same_saved(optimizer.state_dict(), before)


def test_checkpoint_of_another_optimizer():
    _, optimizer = trained(Adam8bit)
    _, other = trained(SGD8bit)
    refused(
        other,
        optimizer.state_dict(),
        r"lacks the settings \['dampening', 'momentum', 'nesterov'\].*SGD8bit",
    )
    refused(
        optimizer,
        other.state_dict(),
        r"lacks the settings \['amsgrad', 'betas', 'eps'\].*than Adam8bit",
    )


@pytest.mark.parametrize("stepped", [True, False])
@pytest.mark.parametrize(
    "other",
    [
        torch.optim.RMSprop,
        torch.optim.Adagrad,
        torch.optim.RAdam,
        torch.optim.NAdam,
        torch.optim.Adamax,
        torch.optim.Muon,
        bitsandbytes.optim.Lion8bit,
        bitsandbytes.optim.RMSprop8bit,
        bitsandbytes.optim.Adagrad8bit,
        bitsandbytes.optim.LAMB8bit,
        bitsandbytes.optim.LARS8bit,
        bitsandbytes.optim.AdEMAMix8bit,
        bitsandbytes.optim.Adam8bit,
        bitsandbytes.optim.SGD8bit,
        bitsandbytes.optim.Lion,
    ],
)
def test_other_kinds_are_refused(other, stepped):
    """With and without states, unless nothing tells them apart."""
    bnb = bitsandbytes.optim
    weight = nn.Parameter(torch.randn(80, 80))
    weight.grad = torch.randn(80, 80)
    options = {}
    if other in (bnb.SGD8bit, bnb.LARS8bit):
        options["momentum"] = 0.9
    theirs = other([weight], lr=0.1, **options)
    if stepped:
        theirs.step()
    saved = through_a_file(theirs.state_dict())
    same = {SGD8bit: {bnb.SGD8bit}, Adam8bit: {bnb.Adam8bit}}
    if not stepped:
        # Before the first step these have the same settings.
        same[SGD8bit].add(bnb.LARS8bit)
        same[Adam8bit].add(bnb.LAMB8bit)
        same[Adam8bit] |= {bnb.SGD8bit, bnb.LARS8bit, bnb.Lion8bit, bnb.Lion}
        same[Adam8bit] |= {bnb.RMSprop8bit, bnb.Adagrad8bit}
    for ours in (SGD8bit, Adam8bit):
        optimizer = ours([weight], **CLASSES[ours])
        optimizer.step()
        if other in same[ours]:
            optimizer.load_state_dict(saved)
        else:
            refused(optimizer, saved, "another kind of optimizer")


def test_states_of_another_kind_with_the_same_settings():
    """Lamb classes of other libraries have bitsandbytes' settings."""
    _, optimizer = trained(Adam8bit)
    saved = through_a_file(optimizer.state_dict())
    for state in saved["state"].values():
        state["sum"] = state["exp_avg_sq"]
    refused(optimizer, saved, "has the states.*'sum'.*of parameter 0")
    saved = through_a_file(optimizer.state_dict())
    for state in saved["state"].values():
        del state["exp_avg_sq"]
    refused(optimizer, saved, "has the states.*of parameter 0, not")
    saved = through_a_file(optimizer.state_dict())
    for name in ("amsgrad", "foreach"):
        del saved["param_groups"][0][name]
    refused(optimizer, saved, "lacks the settings.*amsgrad")


def test_momentum_of_bitsandbytes_checkpoint_wins():
    net, theirs = trained(bitsandbytes.optim.SGD8bit, lr=0.01, momentum=0.8)
    ours = SGD8bit(net.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    ours.load_state_dict(theirs.state_dict())
    (group,) = ours.param_groups
    assert group["momentum"] == 0.8 and group["lr"] == 0.01
    assert group["nesterov"] and "betas" not in group


@pytest.mark.parametrize(
    "bnb, ours, settings",
    [
        (
            bitsandbytes.optim.SGD8bit,
            SGD8bit,
            {"lr": 0.01, "momentum": 0.8, "weight_decay": 0.02},
        ),
        *(
            (
                getattr(bitsandbytes.optim, ours.__name__),
                ours,
                {
                    "lr": 0.01,
                    "betas": (0.8, 0.95),
                    "eps": 1e-5,
                    "weight_decay": 0.02,
                },
            )
            for ours in (Adam8bit, AdamW8bit)
        ),
    ],
)
def test_all_settings_of_bitsandbytes_checkpoint_win(bnb, ours, settings):
    net = network()
    given = {"momentum": 0.9} if ours is SGD8bit else {}
    resumed = ours(net.parameters(), lr=0.5, **given)
    saved = bnb(net.parameters(), **settings).state_dict()
    resumed.load_state_dict(through_a_file(saved))
    (group,) = resumed.param_groups
    assert {name: group[name] for name in settings} == settings


OWN = {
    "momentum_0": (SGD8bit, {"momentum": 0.0, "nesterov": False}),
    "other_momentum": (SGD8bit, {"momentum": 0.5}),
    "amsgrad_off": (Adam8bit, {"amsgrad": False}),
    "adamw_amsgrad_off": (AdamW8bit, {"amsgrad": False}),
}


@pytest.mark.parametrize("kind, changed", OWN.values(), ids=OWN)
def test_checkpoints_that_torch_loads_from_itself(kind, changed):
    """Settings that were changed in training, there and back."""
    extra = {} if kind is SGD8bit else {"amsgrad": True}
    networks, optimizers = [], []
    for some in (kind, TWINS[kind]):
        net, optimizer = trained(some, **{**CLASSES[kind], **extra})
        usual = {k: optimizer.param_groups[0][k] for k in changed}
        optimizer.param_groups[0].update(changed)
        other = copy.deepcopy(net)
        resumed = some(other.parameters(), **{**CLASSES[kind], **extra})
        resumed.load_state_dict(through_a_file(optimizer.state_dict()))
        assert {k: resumed.param_groups[0][k] for k in changed} == changed
        for n, o in ((net, optimizer), (other, resumed)):
            train(n, o, 3, first=5)
            o.param_groups[0].update(usual)
            train(n, o, 3, first=8)
        for p, q in zip(net.parameters(), other.parameters()):
            assert torch.equal(p, q)
        networks.append(net)
        optimizers.append(optimizer)
    assert distance(*networks, network()) < 0.03


def test_states_that_are_not_used_do_not_wear_off():
    """Packing what was unpacked makes a negative extreme smaller."""
    net, optimizer = trained(SGD8bit, nesterov=False)
    before = optimizer.state_dict()["state"]
    optimizer.param_groups[0]["momentum"] = 0.0
    train(net, optimizer, 20)
    assert_same_saved(optimizer.state_dict()["state"], before)
    net, optimizer = trained(Adam8bit, amsgrad=True)
    before = optimizer.state_dict()["state"]
    optimizer.param_groups[0]["amsgrad"] = False
    train(net, optimizer, 20)
    after = optimizer.state_dict()["state"]
    for a, b in zip(before.values(), after.values()):
        assert torch.equal(a["max_exp_avg_sq"], b["max_exp_avg_sq"])
        assert not torch.equal(a["exp_avg_sq"], b["exp_avg_sq"])


def test_amsgrad_switched_on():
    """torch's class fails in step(); the maxima begin with 0 here."""
    net, optimizer = trained(Adam8bit)
    optimizer.param_groups[0]["amsgrad"] = True
    resumed = Adam8bit(net.parameters())
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    train(net, resumed, 1)
    state = resumed.state_dict()["state"][0]
    assert torch.equal(state["exp_avg_sq"], state["max_exp_avg_sq"])


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_momentum_that_is_none(momentum):
    """Older versions of torch save it."""
    net, optimizer = trained(torch.optim.SGD, momentum=0)
    saved = optimizer.state_dict()
    saved["param_groups"][0]["momentum"] = momentum
    saved["state"] = {
        n: {"momentum_buffer": None} for n in range(len([*net.parameters()]))
    }
    found = []
    for kind in SGDS:
        other = copy.deepcopy(net)
        resumed = kind(other.parameters(), lr=0.01, momentum=0.5)
        resumed.load_state_dict(copy.deepcopy(saved))
        train(other, resumed, 1)
        resumed.state_dict()
        found.append(other)
    for p, q in zip(*(n.parameters() for n in found)):
        assert torch.equal(p, q)


@every_class
def test_training_does_not_change_what_was_saved_or_loaded(kind):
    net, optimizer = trained(kind, lr=torch.tensor(0.01))
    saved = optimizer.state_dict()
    before = copy.deepcopy(saved)
    other = copy.deepcopy(net)
    resumed = kind(other.parameters(), **CLASSES[kind])
    resumed.load_state_dict(saved)
    for n, o in ((net, optimizer), (other, resumed)):
        train(n, o, 3)
        o.param_groups[0]["lr"].fill_(0.5)
        train(n, o, 3)
    assert_same_saved(saved, before)
    # Nor does the user change an optimizer with what it has loaded or saved.
    resumed.load_state_dict(saved)
    before = copy.deepcopy(resumed.state_dict())
    for some in (saved, resumed.state_dict()):
        for leaf in tree_flatten(some)[0]:
            if torch.is_tensor(leaf):
                leaf.zero_()
        assert_same_saved(resumed.state_dict(), before)


def types_of(states):
    """Kinds of the states that torch's class has too."""
    return {
        (number, name): (type(value), getattr(value, "dtype", None))
        for number, state in states.items()
        for name, value in state.items()
        if not name.endswith("_absmax")
    }


def observed(kind, options, prepend):
    """Arguments of all hooks in saving and loading."""
    net, optimizer = trained(kind, **options)
    resumed = kind(net.parameters(), **options)
    seen = []

    def see(what, o, states):
        seen.append((what, o is optimizer, len(o.state), types_of(states)))

    def saved(o, state_dict):
        see("saved", o, state_dict["state"])
        return {**state_dict, "note": 1}

    def load(o, state_dict):
        see("load", o, state_dict["state"])
        seen.append(state_dict.pop("note"))
        groups = [{**group} for group in state_dict["param_groups"]]
        return {**state_dict, "param_groups": groups}

    def loaded(o):
        see("loaded", o, {})
        assert all(o.state[p] for p in o.param_groups[0]["params"])

    handles = [
        register(hook, prepend=prepend)
        for register, hook in (
            (
                optimizer.register_state_dict_pre_hook,
                lambda o: see("save", o, {}),
            ),
            (optimizer.register_state_dict_post_hook, saved),
            (resumed.register_load_state_dict_pre_hook, load),
            (resumed.register_load_state_dict_post_hook, loaded),
        )
    ]
    state_dict = optimizer.state_dict()
    resumed.load_state_dict(state_dict)
    # The user's is not touched.
    assert state_dict["note"] == 1
    assert len(seen) == 5
    for handle in handles:
        handle.remove()
    resumed.load_state_dict(optimizer.state_dict())
    assert len(seen) == 5
    for o in (optimizer, resumed):
        for what in ("state_dict", "load_state_dict"):
            assert not getattr(o, f"_optimizer_{what}_pre_hooks")
            assert not getattr(o, f"_optimizer_{what}_post_hooks")
    return seen


@pytest.mark.parametrize("prepend", [False, True])
@every_class
def test_hooks_see_what_torch_shows(kind, prepend):
    options = CLASSES[kind]
    expected = observed(TWINS[kind], options, prepend)
    assert observed(kind, options, prepend) == expected


@every_class
def test_step_hooks(kind):
    """They may change the arguments and see the updated parameters."""
    net, optimizer = trained(kind)
    closures, seen = [lambda: 1.0, lambda: 2.0], []
    optimizer.register_step_pre_hook(lambda o, *_: ((o, closures[1]), {}))
    optimizer.register_step_post_hook(
        lambda o, args, kwargs: seen.append((o, args[1], net[0].weight.clone()))
    )
    before = net[0].weight.clone()
    assert optimizer.step(closures[0]) == 2.0
    ((o, closure, weight),) = seen
    assert o is optimizer and closure is closures[1]
    assert torch.equal(weight, net[0].weight)
    assert not torch.equal(weight, before)


def test_hooks_may_change_what_is_loaded():
    net, optimizer = trained(SGD8bit)
    resumed = SGD8bit(net.parameters(), lr=0.5, momentum=0.9)

    def double(_, saved):
        saved["state"] = {
            n: {"momentum_buffer": 2 * s["momentum_buffer"]}
            for n, s in saved["state"].items()
        }

    resumed.register_load_state_dict_pre_hook(double)
    resumed.load_state_dict(optimizer.state_dict())
    for a, b in zip(
        optimizer.state_dict()["state"].values(),
        resumed.state_dict()["state"].values(),
    ):
        expected = 2 * a["momentum_buffer"]
        error = (b["momentum_buffer"] - expected).abs().max()
        assert error <= 0.008 * expected.abs().max()
    # A hook that raises leaves everything as it was.
    before = copy.deepcopy(resumed.state_dict())
    resumed.register_load_state_dict_pre_hook(lambda *_: 1 / 0)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            resumed.load_state_dict(optimizer.state_dict())
    assert_same_saved(resumed.state_dict(), before)
    assert len(resumed._optimizer_load_state_dict_pre_hooks) == 2
    assert not resumed._optimizer_load_state_dict_post_hooks


def test_checkpoint_of_another_network():
    _, optimizer = trained(SGD8bit)
    net = nn.Sequential(*(nn.Linear(70, 70) for _ in range(4)))
    with pytest.raises(ValueError, match=r"parameter 0 has the shape \(32, 4"):
        SGD8bit(net.parameters()).load_state_dict(optimizer.state_dict())
    a, b = (nn.Parameter(torch.ones(shape)) for shape in ((2, 3), (3, 2)))
    a.grad = torch.ones_like(a)
    other = Adam8bit([a])
    other.step()
    refused(Adam8bit([b]), other.state_dict(), r"\(2, 3\), the.*\(3, 2\)")
    net = nn.Linear(70, 70)
    with pytest.raises(ValueError, match="size of optimizer's group"):
        SGD8bit(net.parameters()).load_state_dict(optimizer.state_dict())
    # As many parameters in as many groups, otherwise distributed.
    a, b, c = (nn.Parameter(torch.ones(n)) for n in (1, 2, 3))
    split = [[{"params": [a]}, {"params": [b, c]}]]
    split.append([{"params": [a, b]}, {"params": [c]}])
    ours, theirs = (Adam8bit(groups) for groups in split)
    for p in (a, b, c):
        p.grad = torch.ones_like(p)
    theirs.step()
    refused(ours, theirs.state_dict(), "size of optimizer's group")


@every_class
def test_states_without_a_parameter_are_kept(kind):
    """As torch's class keeps them."""
    for some in (kind, TWINS[kind]):
        net, optimizer = trained(some, **CLASSES[kind])
        saved = optimizer.state_dict()
        saved["state"]["note"] = {"count": 3}
        resumed = some(net.parameters(), **CLASSES[kind])
        resumed.load_state_dict(through_a_file(saved))
        assert resumed.state_dict()["state"]["note"] == {"count": 3}


# Faults of bitsandbytes 0.50.2, one test each. What is expected of its classes
# here tells when ours is no longer needed.


def compare(ours, theirs, bnb, options, steps=20, **bnb_options):
    """Distances of our class and of bitsandbytes' to torch's."""
    start, found = network(), []
    reference = network()
    train(reference, theirs(reference.parameters(), **options), steps)
    for kind, extra in ((ours, {}), (bnb, bnb_options)):
        net = network()
        train(net, kind(net.parameters(), **{**options, **extra}), steps)
        found.append(distance(net, reference, start))
    return found


def test_adam_has_l2_weight_decay():
    ours, bnb = compare(
        Adam8bit,
        torch.optim.Adam,
        bitsandbytes.optim.Adam8bit,
        {"lr": 0.003, "weight_decay": 0.1},
    )
    assert ours < 0.05 < 0.3 < bnb


@pytest.mark.parametrize("option", [{"nesterov": True}, {"dampening": 0.7}])
def test_nesterov_and_dampening_are_used(option):
    ours, bnb = compare(
        SGD8bit,
        torch.optim.SGD,
        bitsandbytes.optim.SGD8bit,
        {"lr": 0.03, "momentum": 0.9, **option},
    )
    assert ours < 0.05 < bnb and ours < bnb / 3


def test_sgd_without_momentum():
    options = {"lr": 0.03, "weight_decay": 0.01}
    net, optimizer = trained(SGD8bit, momentum=0, nesterov=False, **options)
    other, _ = trained(torch.optim.SGD, **options)
    for p, q in zip(net.parameters(), other.parameters()):
        assert torch.equal(p, q)
    assert optimizer.state_bytes() == 0
    with pytest.raises(NotImplementedError):
        bitsandbytes.optim.SGD8bit(net.parameters(), lr=0.1, momentum=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@every_class
def test_cuda_with_weight_decay_is_like_the_cpu(kind):
    nets = [network().to(device) for device in ("cpu", "cuda")]
    optimizers = [kind(n.parameters(), **CLASSES[kind]) for n in nets]
    for step in range(20):
        optimizers[0].zero_grad()
        loss(nets[0], step).backward()
        # The same gradients for both, so that nothing else can differ.
        for p, q in zip(*(n.parameters() for n in nets)):
            q.grad = p.grad.cuda()
        for optimizer in optimizers:
            optimizer.step()
    assert distance(nets[1].cpu(), nets[0], network()) < 1e-2


def test_32bit_checkpoint_of_bitsandbytes_becomes_8bit():
    options = {"lr": 0.003}
    net, bnb = trained(bitsandbytes.optim.Adam, **options)
    saved = through_a_file(bnb.state_dict())
    ours = Adam8bit(net.parameters(), **options)
    ours.load_state_dict(saved)
    assert state_bytes(ours) < 0.3 * state_bytes(bnb)
    # Theirs stays as it was.
    theirs = bitsandbytes.optim.Adam8bit(net.parameters(), **options)
    theirs.load_state_dict(saved)
    assert state_bytes(theirs) == state_bytes(bnb)


def test_torchs_checkpoint_kills_bitsandbytes_in_step():
    """The reason for test_from_and_to_the_32bit_class."""
    net, optimizer = trained(torch.optim.Adam)
    theirs = bitsandbytes.optim.Adam8bit(net.parameters())
    theirs.load_state_dict(optimizer.state_dict())
    with pytest.raises(KeyError, match="state1"):
        train(net, theirs, 1)


@pytest.mark.parametrize(
    "bnb, ours",
    [
        (bitsandbytes.optim.AdamW8bit, AdamW8bit),
        (bitsandbytes.optim.SGD8bit, SGD8bit),
    ],
)
def test_8bit_checkpoint_of_bitsandbytes(bnb, ours):
    options = {"lr": 0.01}
    if ours is SGD8bit:
        options["momentum"] = 0.9
    net, optimizer = trained(bnb, **options)
    other = copy.deepcopy(net)
    resumed = ours(other.parameters(), **options)
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    start = copy.deepcopy(net)
    train(net, optimizer, 3)
    train(other, resumed, 3)
    assert distance(other, net, start) < 0.05


@pytest.mark.parametrize(
    "bnb, ours, names",
    [
        (bitsandbytes.optim.AdamW8bit, AdamW8bit, ["exp_avg", "exp_avg_sq"]),
        (bitsandbytes.optim.SGD8bit, SGD8bit, ["momentum_buffer"]),
    ],
)
def test_8bit_states_of_bitsandbytes_load_exactly(bnb, ours, names):
    """Though a block's maximum may be negative, which has no code."""
    options = {"momentum": 0.9} if ours is SGD8bit else {}
    net, optimizer = trained(bnb, lr=0.01, **options)
    resumed = ours(net.parameters(), **options)
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    compared = 0
    for p, state in zip(
        net.parameters(), resumed.state_dict()["state"].values(), strict=True
    ):
        theirs = optimizer.state[p]
        for number, name in enumerate(names, 1):
            exact = theirs[f"state{number}"]
            if exact.dtype == torch.uint8:
                maxima = theirs[f"absmax{number}"].repeat_interleave(BLOCK)
                values = theirs[f"qmap{number}"][exact.flatten().long()]
                exact = (values * maxima[: len(values)]).view(p.shape)
                compared += 1
            assert torch.equal(state[name], exact)
    assert compared == 2 * len(names)


def test_channels_last_stays():
    found = []
    for kind in (Adam8bit, bitsandbytes.optim.Adam8bit):
        net = network().to(memory_format=torch.channels_last)
        train(net, kind(net.parameters(), lr=0.003), 5)
        found.append(
            net[3].weight.is_contiguous(memory_format=torch.channels_last)
        )
    assert found == [True, False]


@pytest.mark.parametrize("fused", [None, True])
def test_layout_does_not_change_the_update(fused):
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(32, 32, 3, 3)) for _ in range(2)]
    weights[1].data = weights[0].detach().to(memory_format=torch.channels_last)
    optimizers = [Adam8bit([w], fused=fused) for w in weights]
    for _ in range(3):
        gradient = torch.randn(32, 32, 3, 3)
        for weight, optimizer in zip(weights, optimizers):
            weight.grad = gradient.clone()
            optimizer.step()
    assert torch.equal(*weights)
    # Checkpoints too: one continues from the other's state.
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    assert optimizers[1].state_bytes() == optimizers[0].state_bytes()


LAYOUTS = {
    "contiguous": lambda: torch.randn(80, 64),
    "transposed": lambda: torch.randn(64, 80).t(),
    "permuted": lambda: torch.randn(20, 16, 20).permute(2, 0, 1),
    "channels_last": lambda: torch.randn(32, 16, 3, 3).to(
        memory_format=torch.channels_last
    ),
    "slice": lambda: torch.randn(64, 100)[:, 10:90],
    "slice_of_rows": lambda: torch.randn(100, 64)[10:90],
    "step_2": lambda: torch.randn(64, 160)[:, ::2],
    "small": lambda: torch.randn(8, 16),
    "small_step_2": lambda: torch.randn(8, 16)[:, ::2],
    "vector_step_3": lambda: torch.randn(15000)[::3],
}
GRADIENTS = {
    "contiguous": lambda p: torch.randn(p.shape),
    "of_the_parameter": lambda p: torch.empty_strided(
        p.shape, p.stride()
    ).normal_(),
    "reversed": lambda p: torch.randn(p.shape[::-1]).permute(
        *reversed(range(p.dim()))
    ),
    "step_2": lambda p: torch.randn(*p.shape, 2)[..., 0],
    "expanded": lambda p: torch.randn(p.shape[-1]).expand(p.shape),
    "one_number": lambda p: torch.randn(()).expand(p.shape),
}


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("gradient", GRADIENTS.values(), ids=GRADIENTS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@every_class
def test_any_strides(kind, layout, gradient, fused):
    """The first step is torch's, the next ones those of contiguous tensors.

    Nothing outside of a slice changes.
    """
    torch.manual_seed(0)
    odd = nn.Parameter(layout())
    plain, exact = (
        nn.Parameter(odd.detach().clone(memory_format=torch.contiguous_format))
        for _ in range(2)
    )
    exact.data = exact.data.double()
    memory = odd.detach().as_strided(
        (odd.untyped_storage().nbytes() // 4,), (1,), 0
    )
    outside = torch.ones(len(memory), dtype=torch.bool)
    outside.as_strided(odd.shape, odd.stride(), odd.storage_offset()).fill_(0)
    before = memory[outside].clone()
    strides = odd.stride()
    options = {**CLASSES[kind], "fused": fused}
    ours = [kind([odd], **options), kind([plain], **options)]
    twin = TWINS[kind]([exact], **CLASSES[kind])
    for step in range(3):
        odd.grad = gradient(odd)
        plain.grad = odd.grad.clone(memory_format=torch.contiguous_format)
        for optimizer in ours:
            optimizer.step()
        assert torch.equal(odd, plain)
        if step == 0:
            exact.grad = plain.grad.double()
            twin.step()
            torch.testing.assert_close(
                odd.double(), exact, rtol=1e-5, atol=1e-6
            )
    assert torch.equal(memory[outside], before)
    assert odd.stride() == strides
    # A checkpoint goes from one layout to the other.
    saved = [o.state_dict()["state"] for o in ours]
    assert_same_saved(*saved)
    ours[0].load_state_dict(ours[1].state_dict())
    odd.grad, plain.grad = gradient(odd), None
    plain.grad = odd.grad.contiguous()
    for optimizer in ours:
        optimizer.step()
    assert torch.equal(odd, plain)


@pytest.mark.parametrize("channels", [4, 64])
@pytest.mark.parametrize("fused", [None, True])
@every_class
def test_layout_that_changes_between_two_steps(kind, fused, channels):
    """module.to(memory_format=...) replaces the memory of a parameter."""
    torch.manual_seed(0)
    odd = nn.Parameter(torch.randn(channels, 8, 3, 3))
    plain = nn.Parameter(odd.detach().clone())
    ours = [kind([p], **CLASSES[kind], fused=fused) for p in (odd, plain)]
    for layout in (torch.contiguous_format, torch.channels_last) * 2:
        odd.data = odd.data.to(memory_format=layout)
        odd.grad = torch.randn_like(odd)
        plain.grad = odd.grad.contiguous()
        for optimizer in ours:
            optimizer.step()
        assert torch.equal(odd, plain)


@pytest.mark.parametrize("shape", [(8, 16), (64, 80)], ids=["32bit", "8bit"])
@pytest.mark.parametrize("fused", [None, True])
@every_class
def test_precision_that_changes_between_two_steps(kind, fused, shape):
    """module.double() and back, with states of float32."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(shape))
    optimizer = kind([weight], **CLASSES[kind], fused=fused)
    for dtype in (torch.float32, torch.float64, torch.float32):
        weight.data, weight.grad = weight.data.to(dtype), None
        exact = nn.Parameter(weight.detach().double())
        twin = TWINS[kind]([exact], **CLASSES[kind])
        twin.load_state_dict(optimizer.state_dict())
        weight.grad = torch.randn(shape, dtype=dtype)
        exact.grad = weight.grad.double()
        optimizer.step()
        twin.step()
        assert weight.dtype == dtype
        eps = 8 * torch.finfo(dtype).eps
        torch.testing.assert_close(weight.double(), exact, rtol=eps, atol=eps)


def test_expanded_parameter():
    weight = nn.Parameter(torch.zeros(80, 1).expand(80, 80))
    with pytest.raises(ValueError, match=r"\(80, 80\).*\(1, 0\).*clone"):
        SGD8bit([weight], lr=0.1)
    SGD8bit([nn.Parameter(torch.zeros(1).expand(1, 1))], lr=0.1)


def test_a_group_that_is_refused_is_not_there():
    """The good part of it can be added afterwards."""
    optimizer = SGD8bit([nn.Parameter(torch.zeros(2))], lr=0.1)
    good = nn.Parameter(torch.zeros(2))
    refused = {
        TypeError: nn.Parameter(torch.zeros(2, dtype=torch.complex64)),
        ValueError: nn.Parameter(torch.zeros(8, 1).expand(8, 8)),
    }
    for error, bad in refused.items():
        with pytest.raises(error):
            optimizer.add_param_group({"params": [good, bad]})
        assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [good]})
    good.grad = torch.ones(2)
    optimizer.step()
    assert torch.equal(good, torch.full((2,), -0.1))


def test_parameter_without_values():
    weight = nn.Parameter(torch.zeros(0, 4))
    weight.grad = torch.zeros(0, 4)
    optimizer = Adam8bit([weight], min_8bit_size=0)
    for _ in range(2):
        optimizer.step()
    Adam8bit([weight], min_8bit_size=0).load_state_dict(optimizer.state_dict())


def test_small_tensors_and_embeddings_keep_32_bits():
    net = nn.ModuleDict(
        {
            "embedding": nn.Embedding(100, 64),
            "bag": nn.EmbeddingBag(100, 64),
            "large": nn.Linear(64, 64, bias=False),
            "small": nn.Linear(63, 65, bias=False),
        }
    )
    keep_32bit_states(dict(net))
    optimizer = SGD8bit(net.parameters(), lr=0.1, momentum=0.9)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    packed = {
        name: isinstance(
            optimizer.state[module.weight]["momentum_buffer"], Quantized8bit
        )
        for name, module in net.items()
    }
    assert packed == {
        "embedding": False,
        "bag": False,
        "large": True,
        "small": False,
    }
    # The checkpoint's value is ignored.
    resumed = SGD8bit(net.parameters(), momentum=0.9)
    del net["embedding"].weight.optim_bits
    resumed.load_state_dict(optimizer.state_dict())
    state = resumed.state[net["embedding"].weight]
    assert isinstance(state["momentum_buffer"], Quantized8bit)


def test_min_8bit_size_of_a_group():
    weights = [nn.Parameter(torch.ones(40)) for _ in range(3)]
    sizes = ({"min_8bit_size": 41}, {"min_8bit_size": 40}, {})
    optimizer = SGD8bit(
        ({"params": [w], **size} for w, size in zip(weights, sizes)),
        lr=0.1,
        momentum=0.9,
        min_8bit_size=10,
    )
    for w in weights:
        w.grad = torch.ones(40)
    optimizer.step()
    packed = [
        isinstance(optimizer.state[w]["momentum_buffer"], Quantized8bit)
        for w in weights
    ]
    assert packed == [False, True, True]


def test_min_8bit_size():
    net, optimizer = trained(Adam8bit, min_8bit_size=1 << 30)
    other, _ = trained(torch.optim.Adam, **CLASSES[Adam8bit])
    for p, q in zip(net.parameters(), other.parameters()):
        assert torch.equal(p, q)


def test_groups_without_weight_decay():
    """SpeechBrain's remove_vector_weight_decay."""
    options = {"lr": 0.003, "weight_decay": 0.1}
    start, net, other = network(), network(), network()
    train(net, AdamW8bit(rm_vector_weight_decay(net), **options), 20)
    train(
        other, torch.optim.AdamW(rm_vector_weight_decay(other), **options), 20
    )
    assert distance(net, other, start) < 0.05
    optimizer = AdamW8bit(rm_vector_weight_decay(net), **options)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.0, 0.1]
    assert all(g["min_8bit_size"] == 4096 for g in optimizer.param_groups)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(64, 64, dtype=dtype))
    exact = nn.Parameter(weight.detach().double())
    optimizer = Adam8bit([weight], lr=0.01)
    twin = torch.optim.Adam([exact], lr=0.01)
    for _ in range(10):
        weight.grad = torch.randn(64, 64, dtype=dtype)
        exact.grad = weight.grad.double()
        optimizer.step()
        twin.step()
    assert weight.dtype == dtype and optimizer.state_bytes() < 8500
    tolerance = 0.02 if dtype == torch.bfloat16 else 0.005
    assert torch.allclose(weight.double(), exact, atol=tolerance, rtol=0.02)
    Adam8bit([weight]).load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_class
def test_small_updates_of_a_state_in_half_precision_are_not_lost(kind, dtype):
    """States of 32 bits are float32 whatever the parameter is."""
    weight = nn.Parameter(torch.zeros(8, dtype=dtype))
    exact = nn.Parameter(torch.zeros(8, dtype=torch.float64))
    options = {"momentum": 0.999} if kind is SGD8bit else {}
    optimizer = kind([weight], lr=1e-4, **options)
    twin = TWINS[kind]([exact], lr=1e-4, **options)
    for step in range(50):
        for p in (weight, exact):
            p.grad = torch.full_like(p, 1.0 if step == 0 else 2**-10)
        optimizer.step()
        twin.step()
    for name in optimizer.signed:
        if name in twin.state[exact]:
            value = optimizer.state[weight][name]
            assert value.dtype == torch.float32
            expected = twin.state[exact][name].float()
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=0)


def test_closure_and_hooks():
    net = network()
    optimizer = SGD8bit(net.parameters(), lr=0.1, momentum=0.9)
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))

    def closure():
        optimizer.zero_grad()
        value = loss(net)
        value.backward()
        return value

    assert optimizer.step(closure).item() > optimizer.step(closure).item()
    assert calls == [1, 1]


def test_parameters_without_gradient_are_left_alone():
    net, optimizer = trained(Adam8bit)
    saved = optimizer.state_dict()
    optimizer.zero_grad()
    net[5].weight.grad = torch.ones_like(net[5].weight)
    before = [p.clone() for p in net.parameters()]
    optimizer.step()
    changed = [not torch.equal(a, b) for a, b in zip(before, net.parameters())]
    assert changed == [p is net[5].weight for p in net.parameters()]
    now = optimizer.state_dict()
    assert torch.equal(now["state"][4]["exp_avg"], saved["state"][4]["exp_avg"])


def test_large_steps_do_not_follow_small_gradients():
    """A second moment that is rounded to 0 would divide by nearly nothing."""
    weight = nn.Parameter(torch.zeros(4096))
    optimizer = Adam8bit([weight], lr=1e-3)
    for step in range(3):
        # 1e-5 of the largest: its square is less than the least code.
        weight.grad = torch.full((4096,), 1e-5 if step < 2 else 0.0)
        weight.grad[::256] = 1.0
        before = weight.detach().clone()
        optimizer.step()
    assert (weight - before).abs().max() < 2e-3


def test_copies_and_pickles_go_on():
    net, optimizer = trained(Adam8bit)
    pair = copy.deepcopy((net, optimizer))
    loaded = pickle.loads(pickle.dumps((net, optimizer)))
    for other, twin in (pair, loaded):
        train(other, twin, 3)
    train(net, optimizer, 3)
    for others in (pair[0], loaded[0]):
        for p, q in zip(net.parameters(), others.parameters()):
            assert torch.equal(p, q)


def test_clear_errors():
    weight = nn.Parameter(torch.zeros(2, 2))
    for name in ("capturable", "differentiable"):
        with pytest.raises(ValueError, match=f"{name}=True"):
            Adam8bit([weight], **{name: True})
    with pytest.raises(ValueError, match="Nesterov"):
        SGD8bit([weight], nesterov=True)
    with pytest.raises(TypeError, match="complex64"):
        SGD8bit([nn.Parameter(torch.zeros(2, dtype=torch.complex64))])
    embedding = nn.Embedding(10, 4, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse=False"):
        SGD8bit(embedding.parameters()).step()
    # Nothing has changed then, what comes before it neither.
    weight.grad = torch.ones(2, 2)
    groups = [{"params": [weight]}, {"params": embedding.parameters()}]
    with pytest.raises(RuntimeError, match="sparse=False"):
        SGD8bit(groups).step()
    assert not weight.any()
    # The settings that bitsandbytes' classes take and drop.
    with pytest.raises(TypeError, match="percentile_clipping"):
        Adam8bit([weight], percentile_clipping=5)


def test_in_a_gradscaler_steps_are_skipped():
    """torch.GradScaler on the CPU, with a gradient that is not finite."""
    for fused in (None, True):
        weight = nn.Parameter(torch.zeros(64, 64))
        optimizer = Adam8bit([weight], fused=fused)
        scaler = torch.GradScaler("cpu", init_scale=4.0)
        for bad in (False, True, False):
            optimizer.zero_grad()
            value = weight.sum() * (torch.inf if bad else 1)
            scaler.scale(value).backward()
            before = weight.detach().clone()
            scaler.step(optimizer)
            scaler.update()
            assert torch.equal(before, weight) == bad
        assert optimizer.state[weight]["step"] == 2


@pytest.mark.parametrize("kind", CLASSES)
def test_a_step_holds_few_unpacked_states_at_a_time(kind, monkeypatch):
    """Of one parameter, if a chunk holds no more; not those of all."""
    peaks = []
    weights = [nn.Parameter(torch.randn(64, 1024)) for _ in range(8)]
    settings = {"momentum": 0.9} if kind is SGD8bit else {}
    for values in (1 << 16, 1 << 30):
        monkeypatch.setattr(optimizer_8bit, "CHUNK", values)
        optimizer = kind(weights, lr=0.01, foreach=False, **settings)
        for p in weights:
            p.grad = torch.ones_like(p)
        optimizer.step()
        known = [*weights, *(p.grad for p in weights)]
        with StorageTracker(exclude=known) as tracker:
            optimizer.step()
        peaks.append(tracker.peak)
    moments = 1 if kind is SGD8bit else 2
    unpacked = 4 * moments * weights[0].numel()
    assert peaks[1] - peaks[0] > 5 * unpacked
