"""Parameters that a kernel updates in one launch, with a table that is built once.

Between two steps the parameters, their states and the settings of a group are
usually the same objects in the same memory. The table then stays in the device's
memory, and a step passes on only the addresses of the gradients.

Authors
 * The sb_memeff authors 2026
"""

import importlib
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch

from sb_memeff.ops.blocks_8bit import Quantized8bit
from sb_memeff.ops.dispatch import (
    has_values,
    holds_its_values,
    package_of_kernels,
)
from sb_memeff.optim.layout import State

# The states of each parameter.
States = Mapping[torch.Tensor, State]

__all__ = ["OneLaunch", "contiguous_copy", "fits", "same_objects"]


def fits(
    p: torch.Tensor, state: State, names: list[str], in_8bit: bool
) -> bool:
    """Checks whether a kernel can update a parameter.

    Arguments
    ---------
    p : torch.Tensor
        The parameter, with a gradient.
    state : dict
        Its states.
    names : list of str
        Names of those that the kernel updates.
    in_8bit : bool
        Whether they should be in 8 bits.

    Returns
    -------
    bool
        False if it needs the plain form, also in the first step, which creates
        the states.
    """
    grad = cast(torch.Tensor, p.grad)
    package = package_of_kernels(p, grad)
    return (
        # On a CPU torch's own function updates 32-bit states: it is as fast, and
        # its square roots are not always the nearest numbers.
        (package == "triton" or (package == "numba" and in_8bit))
        and _layout(p) == (torch.float32, p.device, p.shape, True, True)
        and _layout(grad) == _layout(p)
        and all(
            name in state and _state_fits(p, state[name], in_8bit)
            for name in names
        )
    )


def contiguous_copy(
    p: torch.Tensor, state: State, names: list[str]
) -> torch.Tensor | None:
    """Returns a copy of a parameter on the CPU that a kernel can update.

    Arguments
    ---------
    p : torch.Tensor
        The parameter, with a gradient.
    state : dict
        Its states, in 8 bits.
    names : list of str
        Names of those that the kernel updates.

    Returns
    -------
    torch.Tensor or None
        With a gradient; the parameter's memory if it is contiguous. None if no
        kernel can update the copy either.
    """
    grad = cast(torch.Tensor, p.grad)
    if not state or p.device.type != "cpu" or not has_values(p):
        return None
    copy = p.detach().contiguous().resolve_neg()
    copy.grad = grad.contiguous().resolve_neg()
    if grad._is_zerotensor():
        copy.grad = grad.clone()
    if package_of_kernels(copy, copy.grad) != "numba":
        return None
    return copy if fits(copy, state, names, in_8bit=True) else None


def _state_fits(p: torch.Tensor, value: Any, in_8bit: bool) -> bool:
    if in_8bit:
        return isinstance(value, Quantized8bit) and _layout(value.codes) == (
            torch.uint8,
            *_layout(p)[1:],
        )
    return torch.is_tensor(value) and _layout(value) == _layout(p)


def _layout(
    x: torch.Tensor,
) -> tuple[torch.dtype, torch.device, torch.Size, bool, bool]:
    return x.dtype, x.device, x.shape, x.is_contiguous(), holds_its_values(x)


def same_objects(some: Iterable[Any], others: Iterable[Any]) -> bool:
    """Compares two lists by identity.

    Arguments
    ---------
    some, others : iterable
        The lists.

    Returns
    -------
    bool
        True if they have the same length and contain the same objects.

    Example
    -------
    >>> x = torch.zeros(2)
    >>> same_objects([x], [x]), same_objects([x], [x.clone()])
    (True, False)
    """
    some, others = list(some), list(others)
    return len(some) == len(others) and all(map(operator.is_, some, others))


def _join_steps(states: list[State]) -> torch.Tensor | None:
    if "step" not in states[0]:
        return None
    first = states[0]["step"]
    joined = torch.stack([state["step"].to(first.device) for state in states])
    for state, step in zip(states, joined.unbind()):
        state["step"] = step
    return joined


class OneLaunch:
    """Parameters of a group on one device, and a table of them and their states.

    Arguments
    ---------
    params : list of torch.Tensor
        Parameters that fit (see ``fits``), and that share no memory.
    states : mapping
        Their states. If they count steps, the counters become parts of one
        tensor.
    names : list of str
        Names of the states that the kernel updates.

    Attributes
    ----------
    steps : torch.Tensor or None
        All counters.
    """

    def __init__(
        self,
        params: list[torch.Tensor],
        states: States,
        names: list[str],
    ):
        self.params = params
        self._package = self._found_package()
        # Later steps may be outside of an inference mode.
        with torch.inference_mode(False):
            self.steps = _join_steps([states[p] for p in params])
        self._names = names if self.steps is None else [*names, "step"]
        self._values = self._found_values(states)
        rows: list[list[torch.Tensor | None]] = [[*params]]
        for number in range(len(names)):
            values = self._values[number :: len(self._names)]
            packed = [isinstance(x, Quantized8bit) for x in values]
            pairs = list(zip(values, packed))
            rows.append([x.codes if is_8bit else x for x, is_8bit in pairs])
            rows.append([x.scales if is_8bit else None for x, is_8bit in pairs])
        self.table = self._import("table", "Table")(rows)
        self._tensors = [x for row in rows for x in row if x is not None]
        if self.steps is not None:
            self._tensors += self._values[len(names) :: len(self._names)]
        self._memory = self._found_memory()

    def _found_values(self, states: States) -> list[Any]:
        found = [states.get(p, {}) for p in self.params]
        return [state.get(name) for state in found for name in self._names]

    def _found_memory(self) -> list[Any]:
        """What ``tensor.data = ...`` may change without replacing a tensor."""
        if not has_values(self.params[0]):
            return []
        return [
            *map(torch.Tensor.data_ptr, self._tensors),
            *[x.dtype for x in self._tensors],
            # The shape and device of a state are those of its parameter.
            *map(_layout, self.params),
        ]

    def is_current(self, states: States) -> bool:
        """Checks that the table is valid and that the gradients fit.

        Arguments
        ---------
        states : mapping
            Each parameter's states.

        Returns
        -------
        bool
            False if a tensor was replaced, moved or converted.
        """
        grads = self._grads()
        return (
            same_objects(self._found_values(states), self._values)
            and self._found_memory() == self._memory
            and self._found_package() == self._package
            and {*map(type, grads)} == {type(grads[0])}
            and all(
                _layout(p) == _layout(grad)
                for p, grad in zip(self.params, grads)
            )
        )

    def kernel(self, name: str) -> Callable[..., None]:
        """Returns the function that launches an optimizer's kernel.

        Arguments
        ---------
        name : str
            Its name, and that of its file.

        Returns
        -------
        callable
            The function, for the device of the parameters.
        """
        return self._import(name, name)

    def _import(self, file: str, name: str) -> Any:
        # Neither Triton nor numba is imported before it is needed.
        module = f"sb_memeff.ops.{self._package}.{file}"
        return getattr(importlib.import_module(module), name)

    def _found_package(self) -> str | None:
        first = self.params[0]
        return package_of_kernels(first, cast(torch.Tensor, first.grad))

    def _grads(self) -> list[torch.Tensor]:
        return cast("list[torch.Tensor]", [p.grad for p in self.params])

    def gradients(self) -> list[int]:
        """Returns the addresses of the gradients.

        Returns
        -------
        list of int
            One for each parameter; zeros if they are fake tensors.
        """
        if not has_values(self.params[0]):
            return [0] * len(self.params)
        return [x.data_ptr() for x in self._grads()]
