"""Adam and AdamW with moments in 8 bits.

Authors
 * The sb_memeff authors 2026
"""

from typing import Any, cast

import torch
from torch.optim.adam import adam

from sb_memeff.optim.layout import Group, State, step_tensor
from sb_memeff.optim.one_launch import OneLaunch
from sb_memeff.optim.optimizer_8bit import Optimizer8bit

__all__ = ["Adam8bit", "AdamW8bit"]


class _Adam8bit(Optimizer8bit):
    """The states and the update that Adam8bit and AdamW8bit share."""

    states = ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    needed = frozenset(states[:3])
    signed = {
        "exp_avg": True,
        "exp_avg_sq": False,
        "max_exp_avg_sq": False,
    }
    # A maximum does not decay, and dithering would raise it.
    dithered = frozenset({"exp_avg_sq"})
    bitsandbytes = ("exp_avg", "exp_avg_sq")
    settings = frozenset(("lr", "betas", "eps", "weight_decay", "amsgrad"))

    def _names(self, group: Group) -> list[str]:
        return list(self.states[: 4 if group["amsgrad"] else 3])

    def _settings_from_bitsandbytes(self, group: Group) -> Group:
        # AdEMAMix has a third beta.
        if len(group["betas"]) != 2:
            raise self._other_kind(
                f"has betas={group['betas']}, while bitsandbytes' Adam8bit "
                "saves two"
            )
        names = ("lr", "betas", "eps", "weight_decay", "params")
        return {name: group[name] for name in names}

    def _update(
        self,
        group: Group,
        params: list[torch.Tensor],
        grads: list[torch.Tensor],
        states: list[State],
    ) -> None:
        for p, state in zip(params, states):
            for name in self._names(group):
                if name in state:
                    continue
                state[name] = (
                    step_tensor(0, group, p)
                    if name == "step"
                    else torch.zeros_like(p)
                )
        adam(
            params,
            grads,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [s["max_exp_avg_sq"] for s in states if group["amsgrad"]],
            [state["step"] for state in states],
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            decoupled_weight_decay=group["decoupled_weight_decay"],
            amsgrad=group["amsgrad"],
            maximize=group["maximize"],
            foreach=group["foreach"],
            fused=group["fused"],
        )

    def _make_finite(self, state: State) -> None:
        """Restarts the moments of values whose second moment is infinite.

        The gradient was beyond 1e19, and moved nothing. In 8 bits it would stop
        the values of its block for ever. (torch's class stops the value.)
        """
        infinite = state["exp_avg_sq"] > torch.finfo(torch.float32).max
        for name in self.signed.keys() & state.keys():
            state[name].masked_fill_(infinite, 0)

    def _add_residual(
        self,
        group: Group,
        weight: torch.Tensor,
        state: State,
        residual: torch.Tensor,
    ) -> None:
        amsgrad, beta2 = group["amsgrad"], group["betas"][1]
        square = state["max_exp_avg_sq" if amsgrad else "exp_avg_sq"]
        root = (square / (1 - beta2 ** state["step"])).sqrt_()
        residual.mul_(_residual_rate(group)).div_(root.add_(group["eps"]))
        weight.sub_(residual)

    def _update_fused(self, group: Group, one: OneLaunch) -> None:
        signed, unsigned = (
            self._codebook(name, one.table.device) for name in self.bitsandbytes
        )
        steps = cast(torch.Tensor, one.steps)
        steps += 1
        one.kernel("adam_8bit")(
            one.table,
            one.gradients(),
            steps,
            signed,
            unsigned,
            lr=group["lr"],
            residual_rate=_residual_rate(group),
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            decoupled_weight_decay=group["decoupled_weight_decay"],
            amsgrad=group["amsgrad"],
            maximize=group["maximize"],
        )


def _residual_rate(group: Group) -> Any:
    """The sum of the learning rates of a first moment until it has decayed."""
    beta1 = group["betas"][0]
    return group["lr"] * min(beta1 / (1 - beta1), 100)


class Adam8bit(_Adam8bit, torch.optim.Adam):
    """torch.optim.Adam with moments in 8 bits.

    Weight decay is an L2 penalty, as in torch.optim.Adam. (bitsandbytes'
    Adam8bit has the weight decay of AdamW.)

    What rounding takes from a first moment moves the parameter in the same step, as
    in SGD8bit. Second moments are dithered: most change by less than the gap
    between two codes, and would never change if they were rounded to the nearest.

    Arguments
    ---------
    params : iterable
        Parameters or groups of parameters.
    *args : tuple
        See torch.optim.Adam.
    min_8bit_size : int
        Parameters with fewer values keep 32-bit states.
    **kwargs : dict
        See torch.optim.Adam.

    Raises
    ------
    ValueError
        If torch.optim.Adam refuses a setting, or if capturable or
        differentiable is set.

    Example
    -------
    >>> net = torch.nn.Linear(100, 100)
    >>> optimizer = Adam8bit(net.parameters(), lr=0.001, weight_decay=2e-6)
    >>> net(torch.ones(1, 100)).sum().backward()
    >>> optimizer.step()
    >>> optimizer.state_bytes()
    21128
    """


class AdamW8bit(_Adam8bit, torch.optim.AdamW):
    """torch.optim.AdamW with moments in 8 bits, which are rounded as in Adam8bit.

    Arguments
    ---------
    params : iterable
        Parameters or groups of parameters.
    *args : tuple
        See torch.optim.AdamW.
    min_8bit_size : int
        Parameters with fewer values keep 32-bit states.
    **kwargs : dict
        See torch.optim.AdamW.

    Raises
    ------
    ValueError
        If torch.optim.AdamW refuses a setting, or if capturable or
        differentiable is set.

    Example
    -------
    >>> net = torch.nn.Linear(100, 100)
    >>> optimizer = AdamW8bit(net.parameters(), lr=0.001, weight_decay=0.01)
    >>> net(torch.ones(1, 100)).sum().backward()
    >>> optimizer.step()
    >>> optimizer.state_bytes()
    21128
    """
