"""SGD with momentum in 8 bits.

Authors
 * The sb_memeff authors 2026
"""

from typing import Any

import torch
from torch.optim.sgd import sgd

from sb_memeff.optim.layout import Group, State
from sb_memeff.optim.one_launch import OneLaunch
from sb_memeff.optim.optimizer_8bit import Optimizer8bit

__all__ = ["SGD8bit"]


class SGD8bit(Optimizer8bit, torch.optim.SGD):
    """torch.optim.SGD with momentum in 8 bits.

    Momentum, dampening, weight decay, Nesterov and maximize have the same effect
    as in torch.optim.SGD. Without momentum there is no state.

    Rounding errors do not add up, for momenta up to 0.99. What rounding takes from
    a momentum would have moved the parameter in further steps, by
    lr * momentum / (1 - momentum) times as much in all. It moves the parameter in
    the same step instead. (For larger momenta, by 100 * lr times as much.)

    Arguments
    ---------
    params : iterable
        Parameters or groups of parameters.
    *args : tuple
        See torch.optim.SGD.
    min_8bit_size : int
        Parameters with fewer values keep a 32-bit state.
    **kwargs : dict
        See torch.optim.SGD.

    Raises
    ------
    ValueError
        If torch.optim.SGD refuses a setting, or if differentiable is set.

    Example
    -------
    >>> net = torch.nn.Linear(100, 100)
    >>> optimizer = SGD8bit(
    ...     net.parameters(), lr=0.1, momentum=0.9, nesterov=True
    ... )
    >>> net(torch.ones(1, 100)).sum().backward()
    >>> optimizer.step()
    >>> optimizer.state_bytes()
    10560
    """

    states = ("momentum_buffer",)
    signed = {"momentum_buffer": True}
    bitsandbytes = ("momentum_buffer",)
    settings = frozenset(
        ("lr", "momentum", "dampening", "weight_decay", "nesterov")
    )

    def _names(self, group: Group) -> list[str]:
        return list(self.states) if group["momentum"] else []

    def _settings_from_bitsandbytes(self, group: Group) -> Group:
        # bitsandbytes' RMSprop, Adagrad and Lion use the same state name.
        momentum, *others = group["betas"]
        if group["eps"] or any(others):
            raise self._other_kind(
                f"has betas={group['betas']} and eps={group['eps']}, while "
                "bitsandbytes' SGD8bit saves its momentum and 0, and eps=0"
            )
        names = ("lr", "weight_decay", "params")
        return {**{name: group[name] for name in names}, "momentum": momentum}

    def _update(
        self,
        group: Group,
        params: list[torch.Tensor],
        grads: list[torch.Tensor],
        states: list[State],
    ) -> None:
        momenta = [state.get("momentum_buffer") for state in states]
        sgd(
            params,
            grads,
            momenta,
            lr=group["lr"],
            momentum=group["momentum"],
            dampening=group["dampening"],
            weight_decay=group["weight_decay"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
            foreach=group["foreach"],
            fused=group["fused"],
        )
        if group["momentum"]:
            for state, momentum in zip(states, momenta):
                state["momentum_buffer"] = momentum

    def _add_residual(
        self,
        group: Group,
        weight: torch.Tensor,
        state: State,
        residual: torch.Tensor,
    ) -> None:
        weight.sub_(residual.mul_(_residual_rate(group)))

    def _update_fused(self, group: Group, one: OneLaunch) -> None:
        one.kernel("sgd_8bit")(
            one.table,
            one.gradients(),
            self._codebook("momentum_buffer", one.table.device),
            lr=group["lr"],
            residual_rate=_residual_rate(group),
            momentum=group["momentum"],
            dampening=group["dampening"],
            weight_decay=group["weight_decay"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
        )


def _residual_rate(group: Group) -> Any:
    """How far the parameter would go with a momentum of 1 until it is 0.

    At most 100 steps: beyond momentum 0.99 the whole way would be a larger error
    at the moment than what it saves in the end.
    """
    momentum = group["momentum"]
    steps = 100 if momentum >= 1 else min(momentum / (1 - momentum), 100)
    return group["lr"] * steps * (momentum if group["nesterov"] else 1)
