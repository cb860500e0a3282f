"""The step of an 8-bit optimizer: unpack, update with torch and pack; or a kernel.

Authors
 * The sb_memeff authors 2026
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.utils._pytree import tree_leaves

from sb_memeff.ops.dispatch import has_values
from sb_memeff.optim.checkpoint import Checkpoints8bit
from sb_memeff.optim.layout import Group, State, dense, laid_out_like
from sb_memeff.optim.one_launch import OneLaunch, fits, same_objects

__all__ = ["Optimizer8bit"]

# Number of values whose states are in float32 at the same time, unless a single
# parameter has more.
CHUNK = 1 << 22


@dataclass(frozen=True)
class _Plan:
    """How a group was updated in the last step, and why."""

    params: list[torch.Tensor]
    key: list[Any]
    launches: list[OneLaunch]
    others: list[torch.Tensor]


class Optimizer8bit(Checkpoints8bit):
    """Base class of the 8-bit optimizers; must precede torch's class.

    A subclass lists its states and settings, and implements ``_update`` and, with
    one launch for many parameters, ``_update_fused``.

    Arguments
    ---------
    *args : tuple
        See States8bit.
    **kwargs : dict
        See States8bit.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._plans: dict[int, _Plan] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # Copies, pickles and loaded states are other tensors.
        self._plans = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates the parameters.

        Arguments
        ---------
        closure : callable, optional
            Computes the loss again, with gradients.

        Returns
        -------
        object
            Result of closure, or None.

        Raises
        ------
        RuntimeError
            If a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        ready = [
            [p for p in group["params"] if p.grad is not None]
            for group in self.param_groups
        ]
        if any(p.grad.is_sparse for params in ready for p in params):
            raise RuntimeError(
                f"{type(self).__name__} cannot use sparse gradients: make the "
                "embedding with sparse=False."
            )
        for number, (group, params) in enumerate(zip(self.param_groups, ready)):
            launches, others = self._planned(number, group, params)
            for one in launches:
                self._update_fused(group, one)
                # autograd does not see Triton's writes.
                torch.autograd.graph.increment_version(one.params)
            direct, others = self._split(group, others)
            for chunk in _chunks(direct):
                self._step_direct(group, chunk)
            for chunk in _chunks(others):
                self._step_unpacked(group, chunk)
        return loss

    def _planned(
        self, number: int, group: Group, params: list[torch.Tensor]
    ) -> tuple[list[OneLaunch], list[torch.Tensor]]:
        """Launches of kernels, and the parameters that need the plain form.

        What was found in the last step is used again if it still holds.
        """
        # The host would wait for settings that are tensors on the GPU.
        settings = [v for name, v in group.items() if name != "params"]
        names = [name for name in self._names(group) if name in self.signed]
        if not names or any(map(torch.is_tensor, tree_leaves(settings))):
            return [], params
        # The sizes are compared with those of the last step where it matters.
        bits = [getattr(p, "optim_bits", None) for p in params]
        key = [*names, group["min_8bit_size"], *bits]

        def fitting(some: list[torch.Tensor]) -> list[torch.Tensor]:
            return [
                p
                for p in some
                if fits(
                    p, self.state.get(p, {}), names, self._in_8bit(group, p)
                )
            ]

        plan = self._plans.get(number)
        if (
            plan is not None
            and plan.key == key
            and same_objects(plan.params, params)
            and all(one.is_current(self.state) for one in plan.launches)
            and not fitting(plan.others)
        ):
            return plan.launches, plan.others
        by_device: dict[torch.device, list[torch.Tensor]] = {}
        for p in fitting(params):
            by_device.setdefault(p.device, []).append(p)
        launches = [
            OneLaunch(some, self.state, names)
            for some in by_device.values()
            if not _share_memory(some)
        ]
        done = {id(p) for one in launches for p in one.params}
        others = [p for p in params if id(p) not in done]
        self._plans[number] = _Plan(params, key, launches, others)
        return launches, others

    def _split(
        self, group: Group, params: list[torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Splits parameters into those that torch updates as they are, and others.

        torch updates parameters with 32-bit states that need no copies. The
        others are those that need copies, and all parameters in their first
        step, which creates the states.
        """
        direct, others = [], []
        names = [name for name in self._names(group) if name in self.signed]
        for p in params:
            state = self.state.get(p, {})
            states = [state.get(name) for name in names]
            grad = cast(torch.Tensor, p.grad)
            same = (
                not self._in_8bit(group, p)
                and p.dtype in (torch.float32, torch.float64)
                and p.is_contiguous()
                and grad.is_contiguous()
                and grad.dtype == p.dtype
                and all(
                    torch.is_tensor(x)
                    and x.is_contiguous()
                    and (x.dtype, x.device) == (p.dtype, p.device)
                    for x in states
                )
            )
            (direct if same else others).append(p)
        return direct, others

    def _step_direct(self, group: Group, params: list[torch.Tensor]) -> None:
        states = [self.state.get(p, {}) for p in params]
        grads = cast(list[torch.Tensor], [p.grad for p in params])
        self._update(group, params, grads, states)
        for p, state in zip(params, states):
            if state:
                self.state[p] = state

    def _step_unpacked(self, group: Group, params: list[torch.Tensor]) -> None:
        weights = [dense(p) for p in params]
        pairs = list(zip(params, weights))
        grads = [
            laid_out_like(weight, cast(torch.Tensor, p.grad))
            for p, weight in pairs
        ]
        states = [self._unpack(group, p, weight) for p, weight in pairs]
        self._update(group, weights, grads, states)
        for (p, weight), state in zip(pairs, states):
            if weight is not p:
                p.copy_(weight)
            # States that these settings do not use are kept.
            state = {**self.state.get(p, {}), **self._pack(group, p, state)}
            if state:
                self.state[p] = state

    def _update(
        self,
        group: Group,
        params: list[torch.Tensor],
        grads: list[torch.Tensor],
        states: list[State],
    ) -> None:
        """Updates parameters and their unpacked states in place."""
        raise NotImplementedError

    def _update_fused(self, group: Group, one: OneLaunch) -> None:
        """Updates parameters of one device and their states in place."""
        raise NotImplementedError


def _share_memory(params: list[torch.Tensor]) -> bool:
    """Whether two programs would update one parameter at the same time."""
    return all(map(has_values, params)) and len(
        {p.data_ptr() for p in params}
    ) < len(params)


def _chunks(params: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    chunk, values = [], 0
    for p in params:
        if chunk and values + p.numel() > CHUNK:
            yield chunk
            chunk, values = [], 0
        chunk.append(p)
        values += p.numel()
    if chunk:
        yield chunk
