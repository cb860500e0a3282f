"""Checkpoints of bitsandbytes' optimizers.

Authors
 * The sb_memeff authors 2026
"""

import copy

import bitsandbytes
import pytest
import torch

from sb_memeff.ops.blocks_8bit import BLOCK
from sb_memeff.optim import Adam8bit, AdamW8bit, SGD8bit, state_bytes
from tests.unittests.optim.optimizers import (
    distance,
    network,
    through_a_file,
    train,
    trained,
)


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
    train(net, optimizer, 10)
    train(other, resumed, 10)
    assert distance(other, net, start) < 0.05


@pytest.mark.parametrize(
    "bnb, ours, names",
    [
        (bitsandbytes.optim.AdamW8bit, AdamW8bit, ["exp_avg", "exp_avg_sq"]),
        (bitsandbytes.optim.SGD8bit, SGD8bit, ["momentum_buffer"]),
    ],
)
def test_8bit_states_of_bitsandbytes_lose_nothing(bnb, ours, names):
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
