"""Extra arguments of a chain, and the functions that take them.

A chain may be called with more than its input: lengths, masks, conditions.
Every function in it gets all of them, unless it declares those that it takes:

    >>> class Attention(torch.nn.Module):
    ...     takes_arguments = ("mask",)
    ...
    ...     def forward(self, x, mask=None): ...

Then it gets only these of the arguments that are passed by name. A name that no
function declares is an error; so is one that a function without a declaration
does not take.

Authors
 * The sb_memeff authors 2026
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

__all__ = ["ExtraArguments"]


class ExtraArguments(NamedTuple):
    """Arguments of one call of a chain, besides its input.

    Arguments
    ---------
    args : tuple
        Those passed by position; every function gets them.
    kwargs : dict
        Those passed by name.

    Example
    -------
    >>> class Scale(nn.Module):
    ...     takes_arguments = ("factor",)
    ...
    ...     def forward(self, x, factor):
    ...         return x * factor
    >>> extra = ExtraArguments((), {"factor": 2, "lengths": None})
    >>> extra.call(Scale(), torch.ones(2))
    tensor([2., 2.])
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def call(self, module: nn.Module, x: Any) -> Any:
        """Calls a module with an input and its share of the arguments.

        Arguments
        ---------
        module : torch.nn.Module
            A function of the chain.
        x : torch.Tensor or tuple of torch.Tensor
            Its input.

        Returns
        -------
        any
            What the module returns.
        """
        return module(x, *self.args, **self.named_for(module))

    def named_for(self, module: nn.Module) -> dict[str, Any]:
        """Arguments that a module gets by name.

        Arguments
        ---------
        module : torch.nn.Module
            A function of the chain.

        Returns
        -------
        dict
            All of them, or those that the module declares.
        """
        if not self.kwargs:
            return self.kwargs
        taken = _taken_by(module)
        if taken is None:
            return self.kwargs
        return {k: value for k, value in self.kwargs.items() if k in taken}

    def check(self, functions: Iterable[nn.Module]) -> None:
        """Refuses an argument that no function of the chain takes.

        Arguments
        ---------
        functions : iterable of torch.nn.Module
            All functions of the chain.

        Raises
        ------
        TypeError
            If there is one. A function without a declaration gets all
            arguments, and raises this error itself when it is called.
        """
        if not self.kwargs:
            return
        # A dict keeps the order.
        known: dict[str, None] = {}
        for function in functions:
            taken = _taken_by(function)
            if taken is None:
                return
            known.update(dict.fromkeys(taken))
        for name in self.kwargs:
            if name not in known:
                raise TypeError(
                    f"No function of the reversible chain takes the argument "
                    f"{name!r}; they take {', '.join(known) or 'none'} "
                    f"(declared in takes_arguments)."
                )

    def split_tensors(
        self,
    ) -> tuple[
        list[torch.Tensor], Callable[[Sequence[torch.Tensor]], ExtraArguments]
    ]:
        """Separates the tensors, at any depth, from all else.

        Returns
        -------
        tuple
            The tensors, and a function that replaces them by others.
        """
        leaves, structure = tree_flatten(tuple(self))
        positions = [
            i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)
        ]
        tensors = [leaves[i] for i in positions]
        # The function must not keep the tensors alive.
        for i in positions:
            leaves[i] = None

        def with_tensors(
            replacements: Sequence[torch.Tensor],
        ) -> ExtraArguments:
            filled = list(leaves)
            for i, tensor in zip(positions, replacements):
                filled[i] = tensor
            return ExtraArguments(*tree_unflatten(filled, structure))

        return tensors, with_tensors


def _taken_by(function: nn.Module) -> tuple[str, ...] | None:
    """Names that a function declares; None if it declares none."""
    return cast(
        "tuple[str, ...] | None", getattr(function, "takes_arguments", None)
    )
