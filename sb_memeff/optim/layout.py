"""How the states of a parameter lie in memory.

Authors
 * The sb_memeff authors 2026
"""

from typing import Any

import torch

__all__ = [
    "Group",
    "State",
    "dense",
    "laid_out_like",
    "state_dtype",
    "step_tensor",
]

# As torch.optim has them: settings with parameters, and states by name.
Group = dict[str, Any]
State = dict[str, Any]


def state_dtype(p: torch.Tensor) -> torch.dtype:
    """The precision of a parameter's states.

    Arguments
    ---------
    p : torch.Tensor
        The parameter.

    Returns
    -------
    torch.dtype
        float64 of float64, else float32: half precision would lose small
        updates of a momentum.
    """
    return p.dtype if p.dtype == torch.float64 else torch.float32


def dense(p: torch.Tensor) -> torch.Tensor:
    """The values of a parameter in the precision of its states.

    It is the parameter itself where it can be. torch's fused functions take
    the values at the first address and those behind it: of a slice others.

    Arguments
    ---------
    p : torch.Tensor
        The parameter.

    Returns
    -------
    torch.Tensor
        The same values without gaps between them.
    """
    if not p.is_contiguous() and (
        torch.empty_like(p, device="meta").stride() != p.stride()
    ):
        return torch.empty_like(p, dtype=state_dtype(p)).copy_(p)
    return p.to(state_dtype(p))


def laid_out_like(p: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """A state or gradient in the layout of its parameter.

    torch's fused functions do not look at the strides.

    Arguments
    ---------
    p : torch.Tensor
        The parameter, as ``dense`` returned it.
    value : torch.Tensor
        Of the same shape, with any strides.

    Returns
    -------
    torch.Tensor
        The values, in the precision of states.
    """
    if value.stride() == p.stride():
        return value.to(p.device, state_dtype(p))
    return torch.empty_like(p, dtype=state_dtype(p)).copy_(value)


def step_tensor(
    step: torch.Tensor | float, group: Group, p: torch.Tensor
) -> torch.Tensor:
    """The number of steps so far, as torch's Adam keeps it.

    Arguments
    ---------
    step : torch.Tensor or float
        The number.
    group : dict
        Settings: fused functions count on the parameter's device.
    p : torch.Tensor
        The parameter.

    Returns
    -------
    torch.Tensor
        A scalar.
    """
    return torch.tensor(
        float(step), device=p.device if group["fused"] else None
    )
