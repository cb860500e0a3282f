"""The step of an 8-bit optimizer: unpack, update with torch and pack; or a kernel.

Authors
 * The sb_memeff authors 2026
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.utils._pytree import tree_leaves

from sb_memeff.ops.blocks_8bit import Quantized8bit, dither_phase
from sb_memeff.ops.dispatch import has_values, holds_its_values
from sb_memeff.optim.checkpoint import Checkpoints8bit
from sb_memeff.optim.layout import Group, State, dense, laid_out_like
from sb_memeff.optim.one_launch import (
    OneLaunch,
    contiguous_copy,
    fits,
    same_objects,
)

__all__ = ["Optimizer8bit"]

# Number of values whose states are in float32 at the same time, unless a single
# parameter that is not contiguous has more. On a CPU they stay in its cache.
CHUNK = 1 << 22
CPU_CHUNK = 1 << 18


@dataclass(frozen=True)
class _Plan:
    """How a group was updated in the last step, and why."""

    params: list[torch.Tensor]
    key: list[Any]
    launches: list[OneLaunch]
    others: list[torch.Tensor]


@dataclass(frozen=True)
class _Part:
    """A range of a parameter's values.

    The parameter, its gradient and 8-bit states are contiguous, or the range is
    the whole parameter.
    """

    p: torch.Tensor
    start: int
    stop: int
    # States of the whole parameter before and after the step.
    old: State
    new: State

    @property
    def is_whole(self) -> bool:
        """Whether the range has all values."""
        return self.stop - self.start == self.p.numel()

    def of(self, x: Any) -> Any:
        """The range of a tensor or state of the parameter's shape; None of None."""
        if self.is_whole or x is None:
            return x
        if isinstance(x, Quantized8bit):
            return x.part(self.start, self.stop)
        return x.reshape(-1)[self.start : self.stop]


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
            If a gradient is sparse, or if a parameter has another shape than
            its gradient or its 8-bit states. Nothing has changed then.
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
        self._check_shapes(ready)
        # Those of other groups would keep their parameters alive.
        plans, self._plans = self._plans, {}
        for number, (group, params) in enumerate(zip(self.param_groups, ready)):
            plan = plans.pop(number, None)
            launches, others = self._planned(number, group, params, plan)
            for one in launches:
                self._update_fused(group, one)
                # autograd does not see the writes of kernels.
                torch.autograd.graph.increment_version(one.params)
            direct, others = self._split(group, others)
            self._step_direct(group, direct)
            others = self._step_copies(group, others)
            for some in self._rounds(group, others):
                for chunk in _chunks(self._parts(group, some)):
                    self._step_unpacked(group, chunk)
        return loss

    def _check_shapes(self, ready: list[list[torch.Tensor]]) -> None:
        for number, params in enumerate(ready):
            for i, p in enumerate(params):
                grad = cast(torch.Tensor, p.grad)
                if grad.shape != p.shape:
                    raise RuntimeError(
                        f"Parameter {i} with a gradient in group {number} has "
                        f"the shape {tuple(p.shape)}, its gradient "
                        f"{tuple(grad.shape)}: one of them was replaced."
                    )
                for name in self.signed:
                    value = self.state.get(p, {}).get(name)
                    if (
                        isinstance(value, Quantized8bit)
                        and value.codes.shape != p.shape
                    ):
                        raise RuntimeError(
                            f"Parameter {i} with a gradient in group {number} "
                            f"has the shape {tuple(p.shape)}, its {name} "
                            f"{tuple(value.codes.shape)}: its data was "
                            "replaced. Make a new optimizer."
                        )

    def _planned(
        self,
        number: int,
        group: Group,
        params: list[torch.Tensor],
        plan: _Plan | None,
    ) -> tuple[list[OneLaunch], list[torch.Tensor]]:
        """Launches of kernels, and the other parameters.

        What was found in the last step is used again if it still holds.
        """
        names = self._names_for_kernels(group)
        if not names:
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

        if (
            plan is not None
            and plan.key == key
            and same_objects(plan.params, params)
            and all(one.is_current(self.state) for one in plan.launches)
            and not fitting(plan.others)
        ):
            self._plans[number] = plan
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

    def _names_for_kernels(self, group: Group) -> list[str]:
        """Names of the states that a kernel updates; none if it cannot."""
        # The host would wait for settings that are tensors on the GPU.
        settings = [v for name, v in group.items() if name != "params"]
        if any(map(torch.is_tensor, tree_leaves(settings))):
            return []
        return [name for name in self._names(group) if name in self.signed]

    def _step_copies(
        self, group: Group, params: list[torch.Tensor]
    ) -> list[torch.Tensor]:
        """Updates contiguous copies of parameters on a CPU; returns the others.

        So the layout of a parameter does not change its update by a bit.
        """
        names = self._names_for_kernels(group)
        others = []
        for p in params:
            state = self.state.get(p, {})
            copy = None
            if names and self._in_8bit(group, p):
                copy = contiguous_copy(p, state, names)
            if copy is None:
                others.append(p)
            else:
                one = OneLaunch([copy], {copy: state}, names)
                self._update_fused(group, one)
                p.copy_(copy)
        return others

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
                and _is_plain(p)
                and grad.is_contiguous()
                and holds_its_values(grad)
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
        grads = cast("list[torch.Tensor]", [p.grad for p in params])
        self._update(group, params, grads, states)
        for p, state in zip(params, states):
            if state:
                self.state[p] = state

    def _rounds(
        self, group: Group, params: list[torch.Tensor]
    ) -> list[list[torch.Tensor]]:
        """Parameters of the first update, the second one, and so on.

        There is more than one round if a parameter is listed more than once, or
        if parameters overlap in memory. torch then updates the same values more
        than once. Here an update of unpacked copies would overwrite another.
        """
        if not _overlap(params):
            return [params]
        rounds: list[list[torch.Tensor]] = []
        updated: list[tuple[int, tuple[str, int, int]]] = []
        for p in params:
            number = 0
            # torch updates the others in place.
            if self._in_8bit(group, p) or not _is_plain(p):
                place = _memory_range(p)
                number = 1 + max(
                    (n for n, other in updated if _meet(place, other)),
                    default=-1,
                )
                updated.append((number, place))
            if number == len(rounds):
                rounds.append([])
            rounds[number].append(p)
        return rounds

    def _parts(
        self, group: Group, params: list[torch.Tensor]
    ) -> Iterator[_Part]:
        for p in params:
            state, new = self.state.get(p, {}), {}
            size = p.numel()
            if self._in_8bit(group, p):
                for name in self._names(group):
                    if name in self.signed:
                        new[name] = _reusable(p, state.get(name))
                if p.is_contiguous() and cast(Any, p.grad).is_contiguous():
                    size = _chunk_size(p)
            starts = range(0, max(1, p.numel()), max(1, size))
            for start in starts:
                stop = min(start + size, p.numel())
                yield _Part(p, start, stop, state, new)

    def _step_unpacked(self, group: Group, parts: list[_Part]) -> None:
        views = [part.of(part.p) for part in parts]
        weights = [dense(x) for x in views]
        grads = [
            laid_out_like(weight, part.of(part.p.grad))
            for part, weight in zip(parts, weights)
        ]
        states = [
            self._unpack(group, part, weight)
            for part, weight in zip(parts, weights)
        ]
        self._update(group, weights, grads, states)
        for part, view, weight, state in zip(parts, views, weights, states):
            self._pack(group, part, weight, state)
            if weight is not view:
                view.copy_(weight)
            if part.stop == part.p.numel() and part.new:
                names = [x for x in self._names(group) if x in part.new]
                # States that these settings do not use are kept.
                self.state[part.p] = {
                    **part.old,
                    **{name: part.new[name] for name in names},
                }

    def _unpack(self, group: Group, part: _Part, weight: torch.Tensor) -> State:
        state = {}
        for name in self._names(group):
            value = part.old.get(name)
            if name == "step" and value is not None:
                # torch counts one step for each part.
                state[name] = value if part.is_whole else value.clone()
            elif value is not None:
                value = part.of(value)
                if isinstance(value, Quantized8bit):
                    codebook = self._codebook(name, value.codes.device)
                    value = codebook.dequantize(value)
                # The parameter's layout may have changed.
                state[name] = laid_out_like(weight, value)
        return state

    def _pack(
        self, group: Group, part: _Part, weight: torch.Tensor, state: State
    ) -> None:
        if part.new:
            self._make_finite(state)
        for name, value in state.items():
            packed = part.of(part.new.get(name))
            if not isinstance(packed, Quantized8bit):
                part.new[name] = value
                continue
            codebook = self._codebook(name, value.device)
            phase = None
            if name in self.dithered:
                phase = dither_phase(state["step"])
            codebook.quantize_into(packed, value, phase)
            if name == self.bitsandbytes[0]:
                stored = codebook.dequantize(packed).view(value.shape)
                self._add_residual(group, weight, state, value - stored)

    def _update(
        self,
        group: Group,
        params: list[torch.Tensor],
        grads: list[torch.Tensor],
        states: list[State],
    ) -> None:
        """Updates parameters and their unpacked states in place."""
        raise NotImplementedError

    def _add_residual(
        self,
        group: Group,
        weight: torch.Tensor,
        state: State,
        residual: torch.Tensor,
    ) -> None:
        """Adds to a parameter what rounding its first moment takes from it.

        In further steps the residual would have decayed, and moved the parameter
        each time. All of this is done at once. Rounding errors then do not add
        up: at any time the parameter differs from that of torch's class by what
        the last one amounts to.
        """
        raise NotImplementedError

    def _update_fused(self, group: Group, one: OneLaunch) -> None:
        """Updates parameters of one device and their states in place."""
        raise NotImplementedError


def _share_memory(params: list[torch.Tensor]) -> bool:
    """Whether two programs would update one value at the same time."""
    return all(map(has_values, params)) and _overlap(params)


def _overlap(params: list[torch.Tensor]) -> bool:
    ranges = sorted(map(_memory_range, params))
    return any(map(_meet, ranges, ranges[1:]))


def _meet(some: tuple[str, int, int], others: tuple[str, int, int]) -> bool:
    """Whether two ranges of memory overlap."""
    (device, start, stop), (other_device, other_start, other_stop) = (
        some,
        others,
    )
    return device == other_device and start < other_stop and other_start < stop


def _is_plain(p: torch.Tensor) -> bool:
    """Whether torch can update a parameter without a copy."""
    return (
        p.dtype in (torch.float32, torch.float64)
        and p.is_contiguous()
        and holds_its_values(p)
    )


def _memory_range(x: torch.Tensor) -> tuple[str, int, int]:
    """Device, address of the first byte, and address behind the last one."""
    last = sum((n - 1) * s for n, s in zip(x.shape, x.stride()))
    values = last + 1 if x.numel() else 0
    start = x.data_ptr() if has_values(x) else id(x)
    return str(x.device), start, start + values * x.element_size()


def _reusable(p: torch.Tensor, value: Any) -> Quantized8bit:
    """The state's memory if it fits, or new memory."""
    if isinstance(value, Quantized8bit) and (
        (value.codes.shape, value.codes.device) == (p.shape, p.device)
    ):
        return value
    return Quantized8bit.empty_like(p)


def _chunk_size(p: torch.Tensor) -> int:
    return CPU_CHUNK if p.device.type == "cpu" else CHUNK


def _chunks(parts: Iterable[_Part]) -> Iterator[list[_Part]]:
    chunk, values = [], 0
    for part in parts:
        size = part.stop - part.start
        if chunk and values + size > _chunk_size(part.p):
            yield chunk
            chunk, values = [], 0
        chunk.append(part)
        values += size
    if chunk:
        yield chunk
