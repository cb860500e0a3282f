"""Checkpoints of 8-bit optimizers: torch's format, and bitsandbytes'.

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
from sb_memeff.optim.states_8bit import States8bit

__all__ = ["Checkpoints8bit"]

logger = get_logger(__name__)

# What bitsandbytes' checkpoints call the states.
BITSANDBYTES = "__bnb_optimizer_quant_state__"


class Checkpoints8bit(States8bit):
    """Saves what torch's class can load, and loads what others have saved.

    Arguments
    ---------
    *args : tuple
        As States8bit's.
    **kwargs : dict
        As States8bit's.
    """

    def state_dict(self) -> dict[str, Any]:
        """The state as torch's class of the same name would save it.

        The states are tensors on the CPU, which that class can load. Besides,
        the maxima of the blocks are there, so that this class finds its 8
        bits again exactly. Nothing in it changes when the training goes on.

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

        # Before the user's hooks, which then see what torch's class shows.
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
                # On the CPU, for they are four times as large there.
                packed = Quantized8bit(
                    value.codes.cpu(), value.absmax.to(cpu, copy=True)
                )
                value = self._codebook(name, cpu).dequantize(packed)
                result[_maxima(name)] = packed.absmax
            elif isinstance(value, torch.Tensor):
                value = value.to(cpu, copy=True)
            result[name] = value
        return result

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what this class, torch's or bitsandbytes' has saved.

        The settings in the checkpoint replace those given, as in torch; a
        line of the log says which. Whether a state is kept in 8 bits is
        decided anew.

        Arguments
        ---------
        state_dict : dict
            As ``state_dict`` returned it.

        Raises
        ------
        ValueError
            If it is of another optimizer or of other parameters. Nothing has
            been changed then.
        """
        states = {}

        def restore(
            _: torch.optim.Optimizer, loaded: dict[str, Any]
        ) -> dict[str, Any] | None:
            groups = self._restored_groups(loaded)
            if groups is None:
                # torch's class says what is wrong.
                return None
            others = self._restored_states(loaded["state"], groups, states)
            _log_differences(type(self).__name__, self.param_groups, groups)
            return {**loaded, "state": others, "param_groups": groups}

        # After the user's hooks, which may change what is loaded, and before
        # those that look at what has been loaded.
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

    def _restored_groups(self, loaded: dict[str, Any]) -> list[Group] | None:
        """Settings and numbers of the parameters; None if they do not fit."""
        given, saved = self.param_groups, loaded["param_groups"]
        if [len(g["params"]) for g in given] != [
            len(g["params"]) for g in saved
        ]:
            return None
        groups = []
        for number, (new, old) in enumerate(zip(given, saved)):
            if _is_bitsandbytes(old, loaded["state"]):
                old = self._settings_from_bitsandbytes(old)
            elif missing := self.settings - set(old):
                raise self._other_kind(
                    f"lacks the settings {sorted(missing)} in parameter "
                    f"group {number}"
                )
            # What torch's class does not save stays as it was given.
            kept = {k: v for k, v in new.items() if k != "params"}
            groups.append({**kept, **old})
        return groups

    def _restored_states(
        self,
        saved: dict[Any, Any],
        groups: list[Group],
        states: dict[torch.Tensor, State],
    ) -> dict[Any, Any]:
        """Fills in the states of all parameters; gives what is left."""
        numbers = set()
        for new, old in zip(self.param_groups, groups):
            for p, number in zip(new["params"], old["params"]):
                numbers.add(number)
                state = saved.get(number)
                state = state and self._restored(old, p, number, state)
                if state:
                    states[p] = state
        return {k: v for k, v in saved.items() if k not in numbers}

    def _other_kind(self, what: str) -> ValueError:
        return ValueError(
            f"The checkpoint {what}: it was written by another kind of "
            f"optimizer than {type(self).__name__}. Name that one in "
            "opt_class, or begin in a new output_folder."
        )

    def _restored(
        self, group: Group, p: torch.Tensor, number: int, saved: State
    ) -> State:
        names = list(saved)
        found = self._from_bitsandbytes(saved)
        known = {*self.states, *map(_maxima, self.signed)}
        if found is None or not self.needed <= set(found) <= known:
            raise self._other_kind(
                f"holds the states {sorted(names)} of parameter {number}, not "
                f"{sorted(self.states)}"
            )
        state = {}
        for name in self.states:
            value = found.get(name)
            if value is None:
                continue
            if name == "step":
                value = step_tensor(value, group, p)
            else:
                if value.shape != p.shape:
                    raise ValueError(
                        f"The checkpoint's {name} of parameter {number} has "
                        f"the shape {tuple(value.shape)}, the parameter "
                        f"{tuple(p.shape)}: it is of another network."
                    )
                value = laid_out_like(p, value.clone())
                if self._in_8bit(group, p):
                    maxima = found.get(_maxima(name))
                    value = self._packed(name, value, maxima)
            state[name] = value
        return state

    def _settings_from_bitsandbytes(self, group: Group) -> Group:
        """Settings by torch's names; what it does not say is left out."""
        raise NotImplementedError

    def _from_bitsandbytes(self, saved: State) -> State | None:
        """States by torch's names; None if they are of another kind."""
        if not _has_bitsandbytes_states(saved):
            return saved
        saved = {**saved, **saved.get(BITSANDBYTES, {})}
        saved.pop(BITSANDBYTES, None)
        result = {"step": saved.pop("step")}
        if "step" not in self.states:
            result.clear()
        for number, name in enumerate(self.bitsandbytes, 1):
            value = saved.pop(f"state{number}", None)
            maxima = saved.pop(f"absmax{number}", None)
            values = saved.pop(f"qmap{number}", None)
            if value is None:
                return None
            if value.dtype == torch.uint8:
                codes = value.cpu().reshape(-1).to(torch.int32)
                maxima = maxima.cpu()
                values = values.cpu().index_select(0, codes)
                values *= maxima.repeat_interleave(BLOCK)[: len(values)]
                result[_maxima(name)] = maxima
                value = values.reshape(value.shape)
            result[name] = value
        # A second state, for example, or the norm that LARS and LAMB keep.
        return None if saved else result


def _has_bitsandbytes_states(state: State) -> bool:
    return "state1" in {**state, **state.get(BITSANDBYTES, {})}


def _is_bitsandbytes(group: Group, states: dict[Any, State]) -> bool:
    # torch's classes with betas have these two, or one of them.
    if not {"betas", "eps"} <= set(group) or {"amsgrad", "foreach"} & set(
        group
    ):
        return False
    of_group = [states[n] for n in group["params"] if states.get(n)]
    return all(map(_has_bitsandbytes_states, of_group))


def _maxima(name: str) -> str:
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
            # The learning rate is a scheduler's business.
            usual = set(differences) <= {"lr", "initial_lr"}
            logger.log(
                logging.INFO if usual else logging.WARNING,
                f"{name}: the checkpoint's settings of parameter group "
                f"{number} are used: {', '.join(differences.values())}",
            )
