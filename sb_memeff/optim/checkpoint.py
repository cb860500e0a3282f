"""Checkpoints of 8-bit optimizers, in torch's and bitsandbytes' formats.

Authors
 * The sb_memeff authors 2026
"""

import copy
import logging
from typing import Any

import torch
from speechbrain.utils.logger import get_logger

from sb_memeff.ops.blocks_8bit import BLOCK, Quantized8bit
from sb_memeff.optim.layout import Group, State, laid_out_like, step_tensor
from sb_memeff.optim.misfit import BITSANDBYTES, check_fit
from sb_memeff.optim.states_8bit import States8bit

__all__ = ["Checkpoints8bit"]

logger = get_logger(__name__)


class Checkpoints8bit(States8bit):
    """Saves in torch's format; loads torch's and bitsandbytes' formats.

    Arguments
    ---------
    *args : tuple
        See States8bit.
    **kwargs : dict
        See States8bit.
    """

    def state_dict(self) -> dict[str, Any]:
        """Returns the state in the format of torch's class of the same name.

        The states are tensors on the CPU, which torch's class can load. The
        scales of the blocks are included, so that this class restores its
        8-bit codes exactly. Further training does not change the result.

        Returns
        -------
        dict
            ``state`` and ``param_groups``.
        """

        def unpack(_: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
            saved["state"] = {
                key: self._saved(value) if isinstance(value, dict) else value
                for key, value in saved["state"].items()
            }
            saved["param_groups"] = copy.deepcopy(saved["param_groups"])

        # Before the user's hooks, which then see torch's format.
        hook = self.register_state_dict_post_hook(unpack, prepend=True)
        try:
            return super().state_dict()
        finally:
            hook.remove()

    def _saved(self, state: State) -> State:
        cpu = torch.device("cpu")
        result = {}
        for name, value in state.items():
            if isinstance(value, Quantized8bit):
                # On the CPU, because float32 takes four times the memory.
                packed = Quantized8bit(
                    value.codes.cpu(), value.scales.to(cpu, copy=True)
                )
                value = self._codebook(name, cpu).dequantize(packed)
                result[_scales(name)] = packed.scales
            elif isinstance(value, torch.Tensor):
                value = value.to(cpu, copy=True)
            result[name] = value
        return result

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a checkpoint of this class, torch's or bitsandbytes'.

        As in torch, settings in the checkpoint replace those given; the
        differences are logged. Which states are in 8 bits depends on this
        optimizer, not on the checkpoint.

        Arguments
        ---------
        state_dict : dict
            As returned by ``state_dict``.

        Raises
        ------
        ValueError
            If the checkpoint is of another optimizer or of other parameters.
            The optimizer is then unchanged.
        """
        states = {}

        def restore(
            _: torch.optim.Optimizer, loaded: dict[str, Any]
        ) -> dict[str, Any]:
            check_fit(self, loaded)
            groups = self._restored_groups(loaded)
            others = self._restored_states(loaded["state"], groups, states)
            _log_differences(type(self).__name__, self.param_groups, groups)
            return {**loaded, "state": others, "param_groups": groups}

        # After the user's hooks that may change the checkpoint, and before
        # those that read the loaded state.
        hooks = [
            self.register_load_state_dict_pre_hook(restore),
            self.register_load_state_dict_post_hook(
                lambda _: self.state.update(states), prepend=True
            ),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def _restored_groups(self, loaded: dict[str, Any]) -> list[Group]:
        """The checkpoint's groups, with all settings."""
        groups = []
        for number, (new, old) in enumerate(
            zip(self.param_groups, loaded["param_groups"])
        ):
            if _is_bitsandbytes(old, loaded["state"]):
                old = self._settings_from_bitsandbytes(old)
            elif missing := self.settings - set(old):
                raise self._other_kind(
                    f"lacks the settings {sorted(missing)} in parameter "
                    f"group {number}"
                )
            # Settings that torch's class does not save keep their values.
            kept = {k: v for k, v in new.items() if k != "params"}
            groups.append({**kept, **old})
        return groups

    def _restored_states(
        self,
        saved: dict[Any, Any],
        groups: list[Group],
        states: dict[torch.Tensor, State],
    ) -> dict[Any, Any]:
        """Restores the states of all parameters; returns the other states."""
        numbers = set()
        for new, old in zip(self.param_groups, groups):
            for p, number in zip(new["params"], old["params"]):
                numbers.add(number)
                state = saved.get(number)
                state = state and self._restored(old, p, number, state)
                if state:
                    states[p] = state
        return {k: v for k, v in saved.items() if k not in numbers}

    def _other_kind(self, reason: str) -> ValueError:
        return ValueError(
            f"The checkpoint {reason}: it was written by another kind of "
            f"optimizer than {type(self).__name__}. Set opt_class to that "
            "kind, or start in a new output_folder."
        )

    def _restored(
        self, group: Group, p: torch.Tensor, number: int, saved: State
    ) -> State:
        names = list(saved)
        found = self._from_bitsandbytes(saved)
        known = {*self.states, *map(_scales, self.signed)}
        if found is None or not self.needed <= set(found) <= known:
            raise self._other_kind(
                f"has the states {sorted(names)} of parameter {number}, not "
                f"{sorted(self.states)}"
            )
        state: State = {}
        for name in self.states:
            value = found.get(name)
            if value is None:
                continue
            if name == "step":
                value = step_tensor(value, group, p)
            else:
                value = laid_out_like(p, value.clone())
            state[name] = value
        if self._in_8bit(group, p):
            self._make_finite(state)
            for name in self.signed.keys() & state.keys():
                scales = found.get(_scales(name))
                state[name] = self._packed(name, state[name], scales)
        return state

    def _settings_from_bitsandbytes(self, group: Group) -> Group:
        """The saved settings under torch's names."""
        raise NotImplementedError

    def _from_bitsandbytes(self, saved: State) -> State | None:
        """States under torch's names; None if they are of another optimizer."""
        if not _has_bitsandbytes_states(saved):
            return saved
        saved = {**saved, **saved.get(BITSANDBYTES, {})}
        saved.pop(BITSANDBYTES, None)
        result = {"step": saved.pop("step")}
        if "step" not in self.states:
            result.clear()
        for number, name in enumerate(self.bitsandbytes, 1):
            value = saved.pop(f"state{number}", None)
            scales = saved.pop(f"absmax{number}", None)
            values = saved.pop(f"qmap{number}", None)
            if value is None:
                return None
            if value.dtype == torch.uint8:
                codes = value.cpu().reshape(-1).to(torch.int32)
                scales = scales.cpu()
                values = values.cpu().index_select(0, codes)
                values *= scales.repeat_interleave(BLOCK)[: len(values)]
                result[_scales(name)] = scales
                value = values.reshape(value.shape)
            result[name] = value
        # None if a state is left, such as the norm of LARS and LAMB.
        return None if saved else result


def _has_bitsandbytes_states(state: State) -> bool:
    return "state1" in {**state, **state.get(BITSANDBYTES, {})}


def _is_bitsandbytes(group: Group, states: dict[Any, State]) -> bool:
    # torch's classes with betas have amsgrad, foreach or both.
    if not {"betas", "eps"} <= set(group) or {"amsgrad", "foreach"} & set(
        group
    ):
        return False
    of_group = [states[n] for n in group["params"] if states.get(n)]
    return all(map(_has_bitsandbytes_states, of_group))


def _scales(name: str) -> str:
    # The key of earlier versions, whose scales were magnitudes.
    return f"{name}_absmax"


def _same(a: Any, b: Any) -> bool:
    if torch.is_tensor(a) and torch.is_tensor(b):
        return torch.equal(a.cpu(), b.cpu())
    return a is b or bool(a == b)


def _log_differences(name: str, given: list[Group], saved: list[Group]) -> None:
    for number, (new, old) in enumerate(zip(given, saved)):
        differences = {
            key: f"{key}={old[key]} (given: {new[key]})"
            for key in new
            if key != "params" and not _same(old[key], new[key])
        }
        if differences:
            # Schedulers change the learning rate.
            usual = set(differences) <= {"lr", "initial_lr"}
            logger.log(
                logging.INFO if usual else logging.WARNING,
                f"{name}: the checkpoint's settings of parameter group "
                f"{number} are used: {', '.join(differences.values())}",
            )
