"""The parameter that an optimizer's checkpoint does not fit is named.

Authors
 * The sb_memeff authors 2026
"""

import bitsandbytes
import pytest
import torch
from torch import nn

from sb_memeff.optim import SGD8bit
from sb_memeff.optim.misfit import check_fit, name_parameters


def modules(**sizes):
    return nn.ModuleDict(
        {name: nn.Linear(5, size) for name, size in sizes.items()}
    )


def optimizer_of(net, kind, steps=1):
    optimizer = kind(net.parameters(), lr=0.1)
    for _ in range(steps):
        for p in net.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    return optimizer


def momentum_sgd(params, lr):
    return torch.optim.SGD(params, lr, momentum=0.9)


def momentum_sgd8bit(params, lr):
    return SGD8bit(params, lr, momentum=0.9)


KINDS = [
    momentum_sgd,
    momentum_sgd8bit,
    bitsandbytes.optim.Adam8bit,
    *(
        getattr(torch.optim, name)
        for name in (
            "Adadelta",
            "Adagrad",
            "Adam",
            "AdamW",
            "Adamax",
            "ASGD",
            "NAdam",
            "RAdam",
            "RMSprop",
            "Rprop",
        )
    ),
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_modules_in_another_order(kind):
    """torch loads this, and fails in the next step without a name."""
    saved = optimizer_of(modules(a=7, b=3, c=4), kind).state_dict()
    net = modules(a=7, c=4, b=3)
    optimizer = optimizer_of(net, kind, steps=0)
    text = r"has the shape \(4, 5\), the checkpoint's \w+ of it \(3, 5\)"
    with pytest.raises(ValueError, match=f"fit: parameter 2 of group 0 {text}"):
        check_fit(optimizer, saved)
    name_parameters(optimizer, net)
    if kind is not bitsandbytes.optim.Adam8bit:
        # Which calls no hooks.
        with pytest.raises(ValueError, match=f"fit: c.weight {text}"):
            optimizer.load_state_dict(saved)
    same = optimizer_of(modules(a=7, b=3, c=4), kind, steps=0)
    check_fit(same, saved)


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"a": 7, "b": 3, "c": 4}, "4 .* 6: c.weight is the first that it lac"),
        ({"a": 7}, "4 parameters in group 0, the optimizer has 2, .* a.bias"),
        ({"c": 2, "a": 7, "b": 3}, "c.weight has the shape"),
    ],
)
def test_more_or_fewer_modules(sizes, message):
    saved = optimizer_of(modules(a=7, b=3), momentum_sgd).state_dict()
    net = modules(**sizes)
    optimizer = optimizer_of(net, momentum_sgd, steps=0)
    name_parameters(optimizer, net)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)


def test_another_number_of_groups():
    net = modules(a=7, b=3)
    groups = [{"params": net["a"].parameters()}, {"params": net["b"].weight}]
    saved = torch.optim.SGD(groups).state_dict()
    optimizer = optimizer_of(net, momentum_sgd, steps=0)
    with pytest.raises(ValueError, match="2 parameter groups, the optimizer 1"):
        check_fit(optimizer, saved)


def test_states_of_other_packages_may_have_any_shape():
    """NovoGrad's exp_avg_sq is a scalar."""

    class Other(torch.optim.SGD):
        pass

    Other.__module__ = "other.novograd"
    net = torch.nn.Linear(2, 3)
    optimizer = Other(net.parameters(), lr=0.1)
    saved = optimizer.state_dict()
    saved["state"] = {0: {"exp_avg_sq": torch.zeros(())}}
    name_parameters(optimizer, net)
    optimizer.load_state_dict(saved)
