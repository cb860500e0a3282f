"""Checkpoints: what they hold, what goes on from them, and what is refused.

Authors
 * The sb_memeff authors 2026
"""

import copy
import logging

import bitsandbytes
import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_flatten

from sb_memeff.ops.blocks_8bit import Quantized8bit
from sb_memeff.optim import Adam8bit, AdamW8bit, SGD8bit
from tests.unittests.optim.optimizers import (
    CLASSES,
    assert_refused,
    assert_same_saved,
    assert_same_weights,
    distance,
    each_class,
    moved_by_rounding,
    network,
    through_a_file,
    train,
    trained,
)


@each_class
def test_scales_that_torch_carried_along_are_not_believed(kind):
    net, optimizer = trained(kind.ours)
    theirs = kind.make_torchs(net.parameters())
    theirs.load_state_dict(optimizer.state_dict())
    train(net, theirs, 20)
    saved = theirs.state_dict()
    again = kind.make(net.parameters())
    again.load_state_dict(saved)
    compared = 0
    for p, state in again.state.items():
        for name in set(state) & set(again.signed):
            if isinstance(state[name], Quantized8bit):
                assert f"{name}_absmax" in theirs.state[p]
                exact = theirs.state[p][name]
                assert state[name].scales.abs().max() == exact.abs().max()
                compared += 1
    assert compared


@each_class
def test_checkpoints_whose_scales_are_magnitudes(kind):
    """Earlier versions wrote them. They load as they are."""
    net, optimizer = trained(kind.ours)
    negative = 0
    for p, state in optimizer.state.items():
        for name, signed in optimizer.signed.items():
            value = state.get(name)
            if isinstance(value, Quantized8bit) and signed:
                codebook = optimizer._codebook(name, p.device)
                exact = codebook.dequantize(value)
                state[name] = codebook.requantize(exact, value.scales.abs())
                negative += (value.scales < 0).sum()
    assert negative
    resumed = kind.make(net.parameters())
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    for p, state in optimizer.state.items():
        for name in optimizer.signed.keys() & state.keys():
            value, again = state[name], resumed.state[p][name]
            if isinstance(value, Quantized8bit):
                assert torch.equal(again.codes, value.codes)
                assert torch.equal(again.scales, value.scales)
    assert_same_saved(resumed.state_dict(), optimizer.state_dict())
    # The next step changes to extremes with a sign.
    train(net, resumed, 1)
    assert any(
        (value.scales < 0).any()
        for state in resumed.state.values()
        for value in state.values()
        if isinstance(value, Quantized8bit)
    )


def test_settings_of_the_checkpoint_win_and_are_named(caplog):
    net, optimizer = trained(Adam8bit)
    other = Adam8bit(net.parameters(), lr=0.5, betas=(0.8, 0.99))
    with caplog.at_level(logging.INFO, "sb_memeff.optim"):
        other.load_state_dict(optimizer.state_dict())
    group = other.param_groups[0]
    assert group["lr"] == 0.003 and group["weight_decay"] == 0.1
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    for part in (
        "lr=0.003 (given: 0.5)",
        "weight_decay=0.1 (given: 0)",
        "betas=(0.9, 0.999) (given: (0.8, 0.99))",
    ):
        assert part in record.getMessage()
    caplog.clear()
    usual = Adam8bit(net.parameters(), lr=0.5, weight_decay=0.1)
    with caplog.at_level(logging.INFO, "sb_memeff.optim"):
        usual.load_state_dict(optimizer.state_dict())
    (record,) = caplog.records
    assert record.levelno == logging.INFO


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


def test_checkpoint_of_another_optimizer():
    _, optimizer = trained(Adam8bit)
    _, other = trained(SGD8bit)
    assert_refused(
        other,
        optimizer.state_dict(),
        r"lacks the settings \['dampening', 'momentum', 'nesterov'\].*SGD8bit",
    )
    assert_refused(
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
        optimizer = CLASSES[ours].make([weight])
        optimizer.step()
        if other in same[ours]:
            optimizer.load_state_dict(saved)
        else:
            assert_refused(optimizer, saved, "another kind of optimizer")


def test_states_of_another_kind_with_the_same_settings():
    """Lamb classes of other libraries have bitsandbytes' settings."""
    _, optimizer = trained(Adam8bit)
    saved = through_a_file(optimizer.state_dict())
    for state in saved["state"].values():
        state["sum"] = state["exp_avg_sq"]
    assert_refused(optimizer, saved, "has the states.*'sum'.*of parameter 0")
    saved = through_a_file(optimizer.state_dict())
    for state in saved["state"].values():
        del state["exp_avg_sq"]
    assert_refused(optimizer, saved, "has the states.*of parameter 0, not")
    saved = through_a_file(optimizer.state_dict())
    for name in ("amsgrad", "foreach"):
        del saved["param_groups"][0][name]
    assert_refused(optimizer, saved, "lacks the settings.*amsgrad")


OWN = {
    "momentum_0": (SGD8bit, {"momentum": 0.0, "nesterov": False}),
    "other_momentum": (SGD8bit, {"momentum": 0.5}),
    "amsgrad_off": (Adam8bit, {"amsgrad": False}),
    "adamw_amsgrad_off": (AdamW8bit, {"amsgrad": False}),
}


@pytest.mark.parametrize("cls, changed", OWN.values(), ids=OWN)
def test_what_torch_loads_from_itself(cls, changed):
    """Settings that were changed in training, there and back."""
    kind = CLASSES[cls]
    options = dict(kind.options)
    if "amsgrad" in changed:
        options["amsgrad"] = True
    networks = []
    for some in (kind.ours, kind.torchs):
        net, optimizer = trained(some, **options)
        usual = {k: optimizer.param_groups[0][k] for k in changed}
        optimizer.param_groups[0].update(changed)
        other = copy.deepcopy(net)
        resumed = some(other.parameters(), **options)
        resumed.load_state_dict(through_a_file(optimizer.state_dict()))
        assert {k: resumed.param_groups[0][k] for k in changed} == changed
        for n, o in ((net, optimizer), (other, resumed)):
            train(n, o, 3, first=5)
            o.param_groups[0].update(usual)
            train(n, o, 3, first=8)
        assert_same_weights(net, other)
        networks.append(net)
    assert distance(*networks, network()) < 0.03


def test_states_that_are_not_used_do_not_wear_off():
    """They are not packed again."""
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
    for cls in (SGD8bit, torch.optim.SGD):
        other = copy.deepcopy(net)
        resumed = cls(other.parameters(), lr=0.01, momentum=0.5)
        resumed.load_state_dict(copy.deepcopy(saved))
        train(other, resumed, 1)
        resumed.state_dict()
        found.append((other, resumed))
    (net, ours), (other, theirs) = found
    for p, q in zip(net.parameters(), other.parameters()):
        expected = q.double()
        if momentum:
            expected = moved_by_rounding(ours, p, theirs, q)
        torch.testing.assert_close(p.double(), expected, rtol=1e-5, atol=1e-6)


@each_class
def test_training_does_not_change_what_was_saved_or_loaded(kind):
    net, optimizer = trained(kind.ours, lr=torch.tensor(0.01))
    saved = optimizer.state_dict()
    before = copy.deepcopy(saved)
    other = copy.deepcopy(net)
    resumed = kind.make(other.parameters())
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


def observed(cls, options, prepend):
    """Arguments of all hooks in saving and loading."""
    net, optimizer = trained(cls, **options)
    resumed = cls(net.parameters(), **options)
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
@each_class
def test_hooks_see_what_torch_shows(kind, prepend):
    expected = observed(kind.torchs, kind.options, prepend)
    assert observed(kind.ours, kind.options, prepend) == expected


@each_class
def test_hooks_may_change_what_is_loaded(kind):
    net, optimizer = trained(kind.ours)
    resumed = kind.make(net.parameters(), lr=0.5)

    def doubled(state):
        return {
            name: 2 * value if name in optimizer.signed else value
            for name, value in state.items()
            if name in optimizer.states
        }

    def double(_, saved):
        states = saved["state"].items()
        saved["state"] = {n: doubled(state) for n, state in states}

    resumed.register_load_state_dict_pre_hook(double)
    resumed.load_state_dict(optimizer.state_dict())
    for a, b in zip(
        optimizer.state_dict()["state"].values(),
        resumed.state_dict()["state"].values(),
    ):
        for name, expected in doubled(a).items():
            error = (b[name] - expected).abs().max()
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
    with pytest.raises(
        ValueError, match=r"parameter 0 of group 0 .*buffer of it \(32, 4"
    ):
        SGD8bit(net.parameters()).load_state_dict(optimizer.state_dict())
    a, b = (nn.Parameter(torch.ones(shape)) for shape in ((2, 3), (3, 2)))
    a.grad = torch.ones_like(a)
    other = Adam8bit([a])
    other.step()
    assert_refused(
        Adam8bit([b]), other.state_dict(), r"\(3, 2\), the.*\(2, 3\)"
    )
    net = nn.Linear(70, 70)
    with pytest.raises(ValueError, match="parameter 0 of group 0"):
        SGD8bit(net.parameters()).load_state_dict(optimizer.state_dict())
    # As many parameters in as many groups, otherwise distributed.
    a, b, c = (nn.Parameter(torch.ones(n)) for n in (1, 2, 3))
    split = [[{"params": [a]}, {"params": [b, c]}]]
    split.append([{"params": [a, b]}, {"params": [c]}])
    ours, theirs = (Adam8bit(groups) for groups in split)
    for p in (a, b, c):
        p.grad = torch.ones_like(p)
    theirs.step()
    assert_refused(ours, theirs.state_dict(), "2 parameters in group 0.* 1,")


@each_class
def test_states_that_belong_to_no_parameter_are_kept(kind):
    """As torch's class keeps them."""
    for make in (kind.make, kind.make_torchs):
        net = network()
        optimizer = make(net.parameters())
        train(net, optimizer, 5)
        saved = optimizer.state_dict()
        saved["state"]["note"] = {"count": 3}
        resumed = make(net.parameters())
        resumed.load_state_dict(through_a_file(saved))
        assert resumed.state_dict()["state"]["note"] == {"count": 3}
