"""Refuses parameters that fully_shard has sharded within a module's parts.

FSDP2 gathers the parameters of a module when the module is called. What calls
parts of it again in backward, or reads their weights, needs a module around all
of these calls that is sharded as one.

Authors
 * The sb_memeff authors 2026
"""

import sys

import torch
from torch import nn

__all__ = ["check_gathered", "is_sharded"]


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a part of a distributed one.

    Arguments
    ---------
    tensor : torch.Tensor
        A parameter, for example.

    Returns
    -------
    bool
        True for a DTensor.

    Example
    -------
    >>> is_sharded(torch.ones(2))
    False
    """
    # Its import takes long, and is done where there is one.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def check_gathered(module: nn.Module, owner: str, remedy: str) -> None:
    """Raises an error if a parameter is sharded while its values are needed.

    Arguments
    ---------
    module : torch.nn.Module
        Called or read in parts.
    owner : str
        Name of the module, for the message.
    remedy : str
        The module that may be sharded instead, for the message.

    Raises
    ------
    RuntimeError
        If there is one. The message names it.

    Example
    -------
    >>> check_gathered(nn.Linear(2, 3), "classifier", "the loss")
    """
    for name, parameter in module.named_parameters():
        if is_sharded(parameter):
            raise RuntimeError(
                f"{owner}: {name} is sharded with a part of this module, whose "
                f"parameters are needed at other times than those of its own "
                f"calls: call fully_shard on {remedy}, or on a module that "
                f"contains it, and not on its parts."
            )
