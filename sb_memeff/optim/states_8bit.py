"""States of an optimizer in 8 bits: which ones, and how they are packed.

Authors
 * The sb_memeff authors 2026
"""

import inspect
import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn
from torch.optim.optimizer import ParamsT
from torch.utils._pytree import tree_leaves

from sb_memeff.ops.blocks_8bit import Codebook, Quantized8bit
from sb_memeff.optim.layout import Group, State
from sb_memeff.utils.settings import (
    check_integer,
    check_number,
    check_switches,
)
from sb_memeff.utils.sharding import is_sharded

__all__ = ["States8bit", "keep_32bit_states", "state_bytes"]


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Counts the bytes of all tensors in an optimizer's state.

    Arguments
    ---------
    optimizer : torch.optim.Optimizer
        Any optimizer, after its first step, which creates the states.

    Returns
    -------
    int
        Number of bytes.

    Example
    -------
    >>> from sb_memeff.optim import Adam8bit
    >>> weight = torch.nn.Parameter(torch.zeros(100, 100))
    >>> weight.grad = torch.ones(100, 100)
    >>> sizes = []
    >>> for optimizer in (torch.optim.Adam([weight]), Adam8bit([weight])):
    ...     optimizer.step()
    ...     sizes.append(state_bytes(optimizer))
    >>> sizes
    [80004, 20324]
    """
    return sum(
        leaf.nbytes
        for leaf in tree_leaves(list(optimizer.state.values()))
        if isinstance(leaf, (torch.Tensor, Quantized8bit))
    )


def keep_32bit_states(modules: nn.Module | dict[str, nn.Module]) -> None:
    """Makes 8-bit optimizers keep 32-bit states for all embeddings.

    The gradient of an embedding is zero in all but a few rows, whose magnitudes
    differ widely. Call this before the optimizer is created.
    ``sb_memeff.brain.MemEffBrain`` does; with another Brain add a line to the yaml
    file::

        __keep: !apply:sb_memeff.optim.keep_32bit_states [!ref <modules>]

    Arguments
    ---------
    modules : torch.nn.Module or dict
        Modules that contain torch.nn.Embedding or torch.nn.EmbeddingBag.

    Example
    -------
    >>> from sb_memeff.optim import SGD8bit
    >>> embedding = torch.nn.Embedding(1000, 16)
    >>> keep_32bit_states(embedding)
    >>> optimizer = SGD8bit(embedding.parameters(), lr=0.1, momentum=0.9)
    >>> embedding(torch.tensor([3])).sum().backward()
    >>> optimizer.step()
    >>> optimizer.state_bytes()
    64000
    """
    if isinstance(modules, dict):
        modules = torch.nn.ModuleDict(modules)
    for module in modules.modules():
        if isinstance(module, (torch.nn.Embedding, torch.nn.EmbeddingBag)):
            # bitsandbytes' mark.
            cast(Any, module.weight).optim_bits = 32


class States8bit(torch.optim.Optimizer):
    """Packs and unpacks the states of parameters; must precede torch's class.

    A subclass lists its states and settings.

    Arguments
    ---------
    params : iterable
        Parameters or groups of parameters.
    *args : tuple
        See torch's class.
    min_8bit_size : int
        Parameters with fewer values keep 32-bit states.
    **kwargs : dict
        See torch's class.

    Raises
    ------
    ValueError
        If capturable or differentiable is set, or if a setting is not a
        number.
    """

    # All states; the states that a checkpoint must have; and the states that can
    # be in 8 bits, with whether their codebook is signed.
    states: tuple[str, ...] = ()
    needed: frozenset[str] = frozenset()
    signed: dict[str, bool] = {}
    # Of these, states that change by less than the gap between two codes.
    dithered: frozenset[str] = frozenset()
    # bitsandbytes' state1 and state2; the first one is what moves the parameter.
    bitsandbytes: tuple[str, ...] = ()
    # Settings that a checkpoint must have. (torch adds those that its older
    # versions did not have.)
    settings: frozenset[str] = frozenset()

    def __init__(
        self,
        params: ParamsT,
        *args: Any,
        min_8bit_size: int = 4096,
        **kwargs: Any,
    ):
        check_integer("min_8bit_size", min_8bit_size, 0)
        given = inspect.signature(super().__init__).bind(
            params, *args, **kwargs
        )
        _check_numbers(given.arguments)
        super().__init__(params, *args, **kwargs)
        switches = {"nesterov", "maximize", "amsgrad"} & self.defaults.keys()
        check_switches(**{name: self.defaults[name] for name in switches})
        for name in ("capturable", "differentiable"):
            if self.defaults.get(name):
                raise ValueError(
                    f"{type(self).__name__} does not support {name}=True: its "
                    "states are packed and unpacked at each step. Remove it."
                )
        # Makes GradScaler unscale and skip steps itself, fused or not.
        self._step_supports_amp_scaling = False
        self.defaults["min_8bit_size"] = min_8bit_size
        for group in self.param_groups:
            group.setdefault("min_8bit_size", min_8bit_size)
        self._codebooks: dict[tuple[bool, torch.device], Codebook] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # Copies and pickles lack codebooks.
        self._codebooks = {}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters, as torch's class does.

        Arguments
        ---------
        param_group : dict
            ``params`` and the settings that differ from the defaults.

        Raises
        ------
        TypeError
            If a parameter does not have a floating-point dtype, or is sharded.
        ValueError
            If values of a parameter share memory, as in an expanded tensor, or
            if a setting is not a number.
        """
        check_integer("min_8bit_size", param_group.get("min_8bit_size", 0), 0)
        _check_numbers(param_group)
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            error = None
            if not p.is_floating_point():
                error = TypeError(
                    f"{type(self).__name__} updates floating-point parameters, "
                    f"not {p.dtype}."
                )
            elif is_sharded(p):
                error = TypeError(
                    f"{type(self).__name__} cannot update the DTensor of shape "
                    f"{tuple(p.shape)} that fully_shard made of a parameter: use "
                    f"{type(self).__name__[:-4]} of torch.optim with "
                    f"fully_shard, or DistributedDataParallel."
                )
            elif any(
                stride == 0 and size > 1
                for stride, size in zip(p.stride(), p.shape)
            ):
                error = ValueError(
                    f"{type(self).__name__} cannot update a parameter of "
                    f"shape {tuple(p.shape)} and strides {p.stride()}: its "
                    "values share memory. Use a clone() of it."
                )
            if error is not None:
                self.param_groups.pop()
                raise error

    def _names(self, group: Group) -> list[str]:
        """Names of a parameter's states with these settings."""
        raise NotImplementedError

    @staticmethod
    def _in_8bit(group: Group, p: torch.Tensor) -> bool:
        keep = getattr(p, "optim_bits", 8) == 32
        return p.numel() >= group["min_8bit_size"] and not keep

    def _codebook(self, name: str, device: torch.device) -> Codebook:
        key = (self.signed[name], device)
        if key not in self._codebooks:
            self._codebooks[key] = Codebook(*key)
        return self._codebooks[key]

    def _make_finite(self, state: State) -> None:
        """Changes unpacked states, in place, whose blocks would lack a scale."""

    def _packed(
        self, name: str, value: torch.Tensor, scales: torch.Tensor | None = None
    ) -> Quantized8bit:
        codebook = self._codebook(name, value.device)
        if scales is not None:
            packed = codebook.requantize(value, scales)
            # The scales are stale if torch's class has trained in between.
            if torch.equal(codebook.dequantize(packed), value):
                return packed
        return codebook.quantize(value)

    def state_bytes(self) -> int:
        """Counts the bytes of all states; 0 before the first step.

        Returns
        -------
        int
            Number of bytes.
        """
        return state_bytes(self)


def _check_numbers(settings: Mapping[str, Any]) -> None:
    """Raises if a setting is text, for example, or NaN, which torch accepts."""
    betas = settings.get("betas", (0.0, 0.0))
    if not isinstance(betas, (list, tuple)) or len(betas) != 2:
        raise ValueError(f"betas={betas!r} must be two numbers.")
    numbers = [("betas", beta) for beta in betas]
    for name in ("lr", "momentum", "dampening", "weight_decay", "eps"):
        numbers.append((name, settings.get(name, 0.0)))
    for name, value in numbers:
        if not torch.is_tensor(value):
            check_number(name, value)
        elif value.numel() != 1 or not math.isfinite(value):
            raise ValueError(f"{name}={value!r} must be one finite number.")
