"""Dtypes and memory layouts of a parameter's states.

Authors
 * The sb_memeff authors 2026
"""

from typing import Any

import torch

from sb_memeff.ops.dispatch import holds_its_values

__all__ = [
    "Group",
    "State",
    "dense",
    "laid_out_like",
    "state_dtype",
    "step_tensor",
]

# As in torch.optim: settings with parameters, and states by name.
Group = dict[str, Any]
State = dict[str, Any]


def state_dtype(p: torch.Tensor) -> torch.dtype:
    """Returns the dtype of a parameter's states.

    Arguments
    ---------
    p : torch.Tensor
        The parameter.

    Returns
    -------
    torch.dtype
        float64 for float64, otherwise float32: half precision would lose
        small updates of a momentum.
    """
    return p.dtype if p.dtype == torch.float64 else torch.float32


def dense(p: torch.Tensor) -> torch.Tensor:
    """Returns a parameter's values without gaps, in the dtype of its states.

    This is the parameter itself if possible. torch's fused functions ignore
    strides, and would update the wrong values of a slice.

    Arguments
    ---------
    p : torch.Tensor
        The parameter.

    Returns
    -------
    torch.Tensor
        The same values without gaps between them, perhaps a copy.
    """
    if not holds_its_values(p) or (
        not p.is_contiguous()
        and torch.empty_like(p, device="meta").stride() != p.stride()
    ):
        return torch.empty_like(p, dtype=state_dtype(p)).copy_(p)
    return p.to(state_dtype(p))


def laid_out_like(p: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Returns a state or gradient in the layout of its parameter.

    torch's fused functions ignore strides.

    Arguments
    ---------
    p : torch.Tensor
        The parameter, as returned by ``dense``.
    value : torch.Tensor
        The state or gradient, with any strides.

    Returns
    -------
    torch.Tensor
        The values, in the dtype of states.
    """
    # Fused functions refuse the others.
    if value.stride() == p.stride() and holds_its_values(value):
        return value.to(p.device, state_dtype(p))
    return torch.empty_like(p, dtype=state_dtype(p)).copy_(value)


def step_tensor(
    step: torch.Tensor | float, group: Group, p: torch.Tensor
) -> torch.Tensor:
    """Returns the number of steps in the form of torch's Adam.

    Arguments
    ---------
    step : torch.Tensor or float
        The number.
    group : dict
        Settings. Fused functions keep the number on the parameter's device.
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
