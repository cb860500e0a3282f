"""The step of an 8-bit optimizer: unpack, update with torch and pack; or a kernel.

Authors
 * The sb_memeff authors 2026
"""

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch.utils._pytree import tree_leaves

from sb_memeff.ops.blocks_8bit import Quantized8bit
from sb_memeff.ops.dispatch import has_values, runs_fused
from sb_memeff.optim.checkpoint import Checkpoints8bit
from sb_memeff.optim.layout import Group, State, dense, laid_out_like

__all__ = ["Optimizer8bit", "gradients"]

# Number of values whose states are in float32 at the same time, unless a single
# parameter has more.
CHUNK = 1 << 22


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
        for group, params in zip(self.param_groups, ready):
            fused, direct, others = self._split(group, params)
            for chunk in fused:
                self._update_fused(group, chunk)
                # autograd does not see Triton's writes.
                torch.autograd.graph.increment_version(chunk)
            for chunk in _chunks(direct):
                self._step_direct(group, chunk)
            for chunk in _chunks(others):
                self._step_unpacked(group, chunk)
        return loss

    def _split(
        self, group: Group, params: list[torch.Tensor]
    ) -> tuple[
        list[list[torch.Tensor]], list[torch.Tensor], list[torch.Tensor]
    ]:
        """Splits parameters into lists for one launch, for torch, and others.

        torch updates parameters with 32-bit states that need no copies. The
        others are those that need copies, and all parameters in their first
        step, which creates the states.
        """
        candidates, direct, others = {}, [], []
        # The host would wait for settings that are tensors on the GPU.
        settings = [v for name, v in group.items() if name != "params"]
        can_fuse = not any(map(torch.is_tensor, tree_leaves(settings)))
        names = [name for name in self._names(group) if name in self.signed]
        for p in params:
            state = self.state.get(p, {})
            states = [state.get(name) for name in names]
            if not (
                p.dtype in (torch.float32, torch.float64)
                and p.is_contiguous()
                and cast(torch.Tensor, p.grad).is_contiguous()
                and cast(torch.Tensor, p.grad).dtype == p.dtype
            ):
                others.append(p)
            elif not self._in_8bit(group, p):
                same = all(
                    torch.is_tensor(x)
                    and x.is_contiguous()
                    and (x.dtype, x.device) == (p.dtype, p.device)
                    for x in states
                )
                (direct if same else others).append(p)
            elif (
                can_fuse
                and states
                and p.dtype == torch.float32
                and all(
                    isinstance(x, Quantized8bit) and x.codes.device == p.device
                    for x in states
                )
            ):
                candidates.setdefault(p.device, []).append(p)
            else:
                others.append(p)
        fused = []
        for chunk in candidates.values():
            if not runs_fused(*chunk, *(p.grad for p in chunk)):
                others += chunk
                continue
            # Programs must not update one parameter at the same time.
            if all(map(has_values, chunk)) and len(
                {p.data_ptr() for p in chunk}
            ) < len(chunk):
                others += chunk
            else:
                fused.append(chunk)
        return fused, direct, others

    def _step_direct(self, group: Group, params: list[torch.Tensor]) -> None:
        states = [self.state.get(p, {}) for p in params]
        self._update(group, params, gradients(params), states)
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

    def _update_fused(self, group: Group, params: list[torch.Tensor]) -> None:
        """Updates parameters of one device and their 8-bit states in place."""
        raise NotImplementedError


def gradients(params: list[torch.Tensor]) -> list[torch.Tensor]:
    """Returns the gradients of parameters.

    Arguments
    ---------
    params : list of torch.Tensor
        Parameters with gradients.

    Returns
    -------
    list of torch.Tensor
        Their gradients.
    """
    return cast(list[torch.Tensor], [p.grad for p in params])


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
