"""Optimizer checkpoints of other parameters are refused by the parameter's name.

torch compares the numbers of parameters, but not their shapes: a checkpoint of
parameters in another order fails in the first step, without a name.

Authors
 * The sb_memeff authors 2026
"""

import functools
from collections.abc import Mapping
from typing import Any

import torch

from sb_memeff.optim.layout import State

__all__ = ["BITSANDBYTES", "check_fit", "name_parameters"]

# The key of the states in bitsandbytes' checkpoints.
BITSANDBYTES = "__bnb_optimizer_quant_state__"
# States with the shape of their parameter, in torch's classes and bitsandbytes'.
SHAPED = (
    "momentum_buffer",
    "exp_avg",
    "exp_avg_sq",
    "max_exp_avg_sq",
    "sum",
    "square_avg",
    "prev",
    "ax",
    "state1",
    "state2",
)


def name_parameters(
    optimizer: torch.optim.Optimizer, modules: torch.nn.Module
) -> None:
    """Makes an optimizer name the parameter that a checkpoint does not fit.

    Arguments
    ---------
    optimizer : torch.optim.Optimizer
        Any optimizer that calls torch's hooks when it loads a checkpoint.
    modules : torch.nn.Module
        Holds the optimizer's parameters.

    Example
    -------
    >>> saved = torch.optim.Adam(torch.nn.Linear(2, 3).parameters())
    >>> net = torch.nn.Linear(2, 3, bias=False)
    >>> optimizer = torch.optim.Adam(net.parameters())
    >>> name_parameters(optimizer, net)
    >>> optimizer.load_state_dict(saved.state_dict())
    Traceback (most recent call last):
    ValueError: The optimizer's checkpoint does not fit: it has 2 parameters in group 0, the optimizer has 1, the last of them weight. It is of other modules, or of the same in another order.
    """
    names: dict[torch.Tensor, str] = {
        p: name for name, p in modules.named_parameters()
    }
    optimizer.register_load_state_dict_pre_hook(
        functools.partial(check_fit, names=names)
    )


def check_fit(
    optimizer: torch.optim.Optimizer,
    state_dict: dict[str, Any],
    names: Mapping[torch.Tensor, str] | None = None,
) -> None:
    """Checks that a checkpoint is of parameters of the same shapes.

    Arguments
    ---------
    optimizer : torch.optim.Optimizer
        Has the parameters.
    state_dict : dict
        A checkpoint in torch's or bitsandbytes' format.
    names : mapping, optional
        Names of parameters; others are identified by group and number.

    Raises
    ------
    ValueError
        If numbers or shapes differ.
    """
    names = names or {}
    # Others may have a state of such a name in another shape.
    package = type(optimizer).__module__.partition(".")[0]
    has_known_states = package in ("torch", "bitsandbytes", "sb_memeff")
    given, saved = optimizer.param_groups, state_dict["param_groups"]
    if len(given) != len(saved):
        raise _misfit(
            f"it has {len(saved)} parameter groups, the optimizer {len(given)}"
        )
    for number, (new, old) in enumerate(zip(given, saved)):
        params, keys = new["params"], old["params"]
        for i, (p, key) in enumerate(zip(params, keys)):
            where = names.get(p, f"parameter {i} of group {number}")
            if has_known_states:
                _check_shapes(p, state_dict["state"].get(key) or {}, where)
        if len(params) == len(keys):
            continue
        # The shapes are equal, or unknown, as far as both go.
        reason = (
            f"it has {len(keys)} parameters in group {number}, the optimizer "
            f"has {len(params)}"
        )
        if len(keys) < len(params):
            where = names.get(params[len(keys)], f"number {len(keys)}")
            reason += f": {where} is the first that it lacks"
        elif params:
            where = names.get(params[-1], f"number {len(params) - 1}")
            reason += f", the last of them {where}"
        raise _misfit(reason)


def _check_shapes(p: torch.Tensor, state: State, where: str) -> None:
    state = {**state, **state.get(BITSANDBYTES, {})}
    for name in SHAPED:
        value = state.get(name)
        # bitsandbytes' AdEMAMix stacks two momenta.
        if torch.is_tensor(value) and (
            value.shape[value.dim() - p.dim() :] != p.shape
        ):
            raise _misfit(
                f"{where} has the shape {tuple(p.shape)}, the checkpoint's "
                f"{name} of it {tuple(value.shape)}"
            )


def _misfit(reason: str) -> ValueError:
    return ValueError(
        f"The optimizer's checkpoint does not fit: {reason}. It is of other "
        "modules, or of the same in another order."
    )
