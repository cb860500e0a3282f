"""SGD, Adam and AdamW that keep their states in 8 bits.

Between two steps the states are 8-bit tensors (``ops.blocks_8bit``). A step
restores those of a few parameters at a time in float32, lets torch's own
functions do the update, and packs them again: whatever torch's class of the
same name does with its arguments, these do too.

Source: Dettmers et al., 8-bit Optimizers via Block-wise Quantization
(arXiv 2110.02861); for speaker networks Liu and Qian (arXiv 2412.01195).

Example
-------
In a SpeechBrain yaml::

    opt_class: !name:sb_memeff.optim.Adam8bit
        lr: 0.001
        weight_decay: 0.000002

Authors
 * The sb_memeff authors 2026
"""

import copy
import logging
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from speechbrain.utils.logger import get_logger
from torch import nn
from torch.optim.adam import adam
from torch.optim.optimizer import ParamsT
from torch.optim.sgd import sgd
from torch.utils._pytree import tree_leaves

from sb_memeff.ops.blocks_8bit import BLOCK, Codebook, Quantized8bit
from sb_memeff.ops.dispatch import runs_fused

__all__ = [
    "AdamW8bit",
    "Adam8bit",
    "SGD8bit",
    "keep_32bit_states",
    "state_bytes",
]

logger = get_logger(__name__)

# As torch.optim has them: settings with parameters, and states by name.
Group = dict[str, Any]
State = dict[str, Any]

# States of so many values are in float32 at the same time, unless one
# parameter alone has more.
CHUNK = 1 << 22
# What bitsandbytes' checkpoints call the states.
BITSANDBYTES = "__bnb_optimizer_quant_state__"


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors in the state of an optimizer.

    Arguments
    ---------
    optimizer : torch.optim.Optimizer
        Any one, after its first step: before it there are no states.

    Returns
    -------
    int
        The bytes.

    Example
    -------
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

    Their gradients are zero but for a few rows, and of very different sizes.
    Call it before the optimizer is made. ``sb_memeff.core.MemEffBrain`` does;
    with another Brain a line of the yaml file will do::

        __keep: !apply:sb_memeff.optim.keep_32bit_states [!ref <modules>]

    Arguments
    ---------
    modules : torch.nn.Module or dict
        Where to look for torch.nn.Embedding and torch.nn.EmbeddingBag.

    Example
    -------
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
            # As bitsandbytes marks parameters.
            cast(Any, module.weight).optim_bits = 32


class _States8bit(torch.optim.Optimizer):
    """Base of the 8-bit optimizers; goes before torch's class.

    A subclass names its states and settings, and updates some parameters in
    ``_update``.
    """

    # All states, those without which a checkpoint is of another kind, and
    # those that can be in 8 bits with the codebook of each.
    states: tuple[str, ...] = ()
    needed: frozenset[str] = frozenset()
    signed: dict[str, bool] = {}
    # What bitsandbytes calls state1, state2.
    bitsandbytes: tuple[str, ...] = ()
    # Settings without which a checkpoint is of another kind. (torch adds
    # those that its older versions did not have.)
    settings: frozenset[str] = frozenset()

    def __init__(
        self,
        params: ParamsT,
        *args: Any,
        min_8bit_size: int = 4096,
        **kwargs: Any,
    ):
        super().__init__(params, *args, **kwargs)
        for name in ("capturable", "differentiable"):
            if self.defaults.get(name):
                raise ValueError(
                    f"{type(self).__name__} cannot do {name}=True: its states "
                    "are packed and unpacked at each step. Leave it out."
                )
        # GradScaler then unscales and skips steps itself, fused or not.
        self._step_supports_amp_scaling = False
        self.defaults["min_8bit_size"] = min_8bit_size
        for group in self.param_groups:
            group.setdefault("min_8bit_size", min_8bit_size)
        self._codebooks: dict[tuple[bool, torch.device], Codebook] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # Copies and pickles do not have them.
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
            If a parameter is not of floating point.
        ValueError
            If values of a parameter share memory, as those of an expanded
            tensor do.
        """
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            error = None
            if not p.is_floating_point():
                error = TypeError(
                    f"{type(self).__name__} updates parameters of floating "
                    f"point, not {p.dtype}."
                )
            elif any(
                stride == 0 and size > 1
                for stride, size in zip(p.stride(), p.shape)
            ):
                error = ValueError(
                    f"{type(self).__name__} cannot update a parameter of "
                    f"shape {tuple(p.shape)} and strides {p.stride()}: its "
                    "values share memory. Make it of a clone()."
                )
            if error is not None:
                self.param_groups.pop()
                raise error

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
            What closure returned, or None.

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
            for some in fused:
                self._update_fused(group, some)
                # Triton does not tell autograd what it has written.
                torch.autograd.graph.increment_version(some)
            for some in _chunks(direct):
                self._step_direct(group, some)
            for some in _chunks(others):
                self._step_some(group, some)
        return loss

    def _split(
        self, group: Group, params: list[torch.Tensor]
    ) -> tuple[
        list[list[torch.Tensor]], list[torch.Tensor], list[torch.Tensor]
    ]:
        """Parameters for one launch each, for torch, and others.

        torch gets those whose states are in 32 bits, if nothing need be
        copied. The others are those of which something must be, and all in
        their first step, which makes the states.
        """
        candidates, direct, others = {}, [], []
        # The host would have to wait for settings on the GPU.
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
        for some in candidates.values():
            if not runs_fused(*some, *(p.grad for p in some)):
                others += some
                continue
            addresses = [p.data_ptr() for p in some]
            if len(set(addresses)) < len(some):
                # Programs must not update one parameter at the same time.
                others += some
            else:
                fused.append(some)
        return fused, direct, others

    def _step_direct(self, group: Group, params: list[torch.Tensor]) -> None:
        states = [self.state.get(p, {}) for p in params]
        self._update(group, params, _gradients(params), states)
        for p, state in zip(params, states):
            if state:
                self.state[p] = state

    def _step_some(self, group: Group, params: list[torch.Tensor]) -> None:
        weights = [_dense(p) for p in params]
        pairs = list(zip(params, weights))
        grads = [
            _laid_out_like(weight, cast(torch.Tensor, p.grad))
            for p, weight in pairs
        ]
        states = [self._unpack(group, p, weight) for p, weight in pairs]
        self._update(group, weights, grads, states)
        for (p, weight), state in zip(pairs, states):
            if weight is not p:
                p.copy_(weight)
            # States that these settings do not use stay as they are.
            state = {**self.state.get(p, {}), **self._pack(group, p, state)}
            if state:
                self.state[p] = state

    def _names(self, group: Group) -> list[str]:
        """States that a parameter has with these settings."""
        raise NotImplementedError

    def _update(
        self,
        group: Group,
        params: list[torch.Tensor],
        grads: list[torch.Tensor],
        states: list[State],
    ) -> None:
        """Updates parameters and their states, all unpacked, in place."""
        raise NotImplementedError

    def _update_fused(self, group: Group, params: list[torch.Tensor]) -> None:
        """Updates parameters of one device, and their 8 bits, in place."""
        raise NotImplementedError

    def _quantized(
        self, params: list[torch.Tensor], name: str
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Codes and maxima of a state of some parameters."""
        states = [self.state[p][name] for p in params]
        return [x.codes for x in states], [x.absmax for x in states]

    def _codebook(self, name: str, device: torch.device) -> Codebook:
        key = (self.signed[name], device)
        if key not in self._codebooks:
            self._codebooks[key] = Codebook(*key)
        return self._codebooks[key]

    def _unpack(
        self, group: Group, p: torch.Tensor, weight: torch.Tensor
    ) -> State:
        state = {}
        for name in self._names(group):
            value = self.state.get(p, {}).get(name)
            if isinstance(value, Quantized8bit):
                codebook = self._codebook(name, value.codes.device)
                value = codebook.dequantize(value)
            if value is not None:
                # The layout of the parameter may have changed since.
                state[name] = (
                    value if name == "step" else _laid_out_like(weight, value)
                )
        return state

    def _pack(self, group: Group, p: torch.Tensor, state: State) -> State:
        if not self._in_8bit(group, p):
            return state
        return {
            name: self._packed(name, value) if name in self.signed else value
            for name, value in state.items()
        }

    @staticmethod
    def _in_8bit(group: Group, p: torch.Tensor) -> bool:
        keep = getattr(p, "optim_bits", 8) == 32
        return p.numel() >= group["min_8bit_size"] and not keep

    def state_bytes(self) -> int:
        """Bytes of all states; 0 before the first step.

        Returns
        -------
        int
            The bytes.
        """
        return state_bytes(self)

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
                value = _step_tensor(value, group, p)
            else:
                if value.shape != p.shape:
                    raise ValueError(
                        f"The checkpoint's {name} of parameter {number} has "
                        f"the shape {tuple(value.shape)}, the parameter "
                        f"{tuple(p.shape)}: it is of another network."
                    )
                value = _laid_out_like(p, value.clone())
                if self._in_8bit(group, p):
                    maxima = found.get(_maxima(name))
                    value = self._packed(name, value, maxima)
            state[name] = value
        return state

    def _packed(
        self, name: str, value: torch.Tensor, maxima: torch.Tensor | None = None
    ) -> Quantized8bit:
        codebook = self._codebook(name, value.device)
        if maxima is not None:
            packed = codebook.requantize(value, maxima)
            # torch's class carries the maxima along when it trains on.
            if torch.equal(codebook.dequantize(packed), value):
                return packed
        return codebook.quantize(value)

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


class SGD8bit(_States8bit, torch.optim.SGD):
    """torch.optim.SGD with its momentum in 8 bits.

    Momentum, dampening, weight decay, Nesterov and maximize as there; without
    momentum there is no state.

    Arguments
    ---------
    params : iterable
        Parameters or groups of parameters.
    *args : tuple
        As torch.optim.SGD's.
    min_8bit_size : int
        Parameters with fewer values keep a 32-bit state.
    **kwargs : dict
        As torch.optim.SGD's.

    Raises
    ------
    ValueError
        For settings that torch.optim.SGD refuses, and for differentiable.

    Example
    -------
    >>> net = torch.nn.Linear(100, 100)
    >>> optimizer = SGD8bit(
    ...     net.parameters(), lr=0.1, momentum=0.9, nesterov=True
    ... )
    >>> net(torch.ones(1, 100)).sum().backward()
    >>> optimizer.step()
    >>> optimizer.state_bytes()
    10560
    """

    states = ("momentum_buffer",)
    signed = {"momentum_buffer": True}
    bitsandbytes = ("momentum_buffer",)
    settings = frozenset(
        ("lr", "momentum", "dampening", "weight_decay", "nesterov")
    )

    def _names(self, group: Group) -> list[str]:
        return list(self.states) if group["momentum"] else []

    def _settings_from_bitsandbytes(self, group: Group) -> Group:
        # RMSprop, Adagrad and Lion call their only state by the same name.
        momentum, *others = group["betas"]
        if group["eps"] or any(others):
            raise self._other_kind(
                f"has betas={group['betas']} and eps={group['eps']}, while "
                "bitsandbytes' SGD8bit saves its momentum and 0, and eps=0"
            )
        names = ("lr", "weight_decay", "params")
        return {name: group[name] for name in names} | {"momentum": momentum}

    def _update(
        self,
        group: Group,
        params: list[torch.Tensor],
        grads: list[torch.Tensor],
        states: list[State],
    ) -> None:
        momenta = [state.get("momentum_buffer") for state in states]
        sgd(
            params,
            grads,
            momenta,
            lr=group["lr"],
            momentum=group["momentum"],
            dampening=group["dampening"],
            weight_decay=group["weight_decay"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
            foreach=group["foreach"],
            fused=group["fused"],
        )
        if group["momentum"]:
            for state, momentum in zip(states, momenta):
                state["momentum_buffer"] = momentum

    def _update_fused(self, group: Group, params: list[torch.Tensor]) -> None:
        from sb_memeff.ops.triton.sgd_8bit import sgd_8bit

        codebook = self._codebook("momentum_buffer", params[0].device)
        sgd_8bit(
            params,
            _gradients(params),
            *self._quantized(params, "momentum_buffer"),
            codebook.values,
            codebook.middles,
            lr=group["lr"],
            momentum=group["momentum"],
            dampening=group["dampening"],
            weight_decay=group["weight_decay"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
        )


class _Adam8bit(_States8bit):
    states = ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    needed = frozenset(states[:3])
    signed = {
        "exp_avg": True,
        "exp_avg_sq": False,
        "max_exp_avg_sq": False,
    }
    bitsandbytes = ("exp_avg", "exp_avg_sq")
    settings = frozenset(("lr", "betas", "eps", "weight_decay", "amsgrad"))

    def _names(self, group: Group) -> list[str]:
        return list(self.states[: 4 if group["amsgrad"] else 3])

    def _settings_from_bitsandbytes(self, group: Group) -> Group:
        # AdEMAMix has a third beta; its alpha is 0 in the other classes.
        if len(group["betas"]) != 2 or group.get("alpha"):
            raise self._other_kind(
                f"has betas={group['betas']} and alpha={group.get('alpha')}, "
                "while bitsandbytes' Adam8bit saves two betas and alpha=0"
            )
        names = ("lr", "betas", "eps", "weight_decay", "params")
        return {name: group[name] for name in names}

    def _update(
        self,
        group: Group,
        params: list[torch.Tensor],
        grads: list[torch.Tensor],
        states: list[State],
    ) -> None:
        for p, state in zip(params, states):
            for name in self._names(group):
                if name in state:
                    continue
                state[name] = (
                    _step_tensor(0, group, p)
                    if name == "step"
                    else torch.zeros_like(p)
                )
        adam(
            params,
            grads,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [s["max_exp_avg_sq"] for s in states if group["amsgrad"]],
            [state["step"] for state in states],
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            decoupled_weight_decay=group["decoupled_weight_decay"],
            amsgrad=group["amsgrad"],
            maximize=group["maximize"],
            foreach=group["foreach"],
            fused=group["fused"],
        )

    def _update_fused(self, group: Group, params: list[torch.Tensor]) -> None:
        from sb_memeff.ops.triton.adam_8bit import adam_8bit

        moments, codebooks = [], []
        for name in self._names(group):
            if name == "step":
                continue
            moments += self._quantized(params, name)
            codebooks.append(self._codebook(name, params[0].device))
        steps = [self.state[p]["step"] for p in params]
        torch._foreach_add_(steps, 1)
        adam_8bit(
            params,
            _gradients(params),
            moments,
            torch.stack(steps),
            *((x.values, x.middles) for x in codebooks[:2]),
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            decoupled_weight_decay=group["decoupled_weight_decay"],
            amsgrad=group["amsgrad"],
            maximize=group["maximize"],
        )


class Adam8bit(_Adam8bit, torch.optim.Adam):
    """torch.optim.Adam with its moments in 8 bits.

    Weight decay is an L2 penalty, as in torch.optim.Adam. (That of
    bitsandbytes' class of this name is AdamW's.)

    Arguments
    ---------
    params : iterable
        Parameters or groups of parameters.
    *args : tuple
        As torch.optim.Adam's.
    min_8bit_size : int
        Parameters with fewer values keep 32-bit states.
    **kwargs : dict
        As torch.optim.Adam's.

    Raises
    ------
    ValueError
        For settings that torch.optim.Adam refuses, and for capturable and
        differentiable.

    Example
    -------
    >>> net = torch.nn.Linear(100, 100)
    >>> optimizer = Adam8bit(net.parameters(), lr=0.001, weight_decay=2e-6)
    >>> net(torch.ones(1, 100)).sum().backward()
    >>> optimizer.step()
    >>> optimizer.state_bytes()
    21128
    """


class AdamW8bit(_Adam8bit, torch.optim.AdamW):
    """torch.optim.AdamW with its moments in 8 bits.

    Arguments
    ---------
    params : iterable
        Parameters or groups of parameters.
    *args : tuple
        As torch.optim.AdamW's.
    min_8bit_size : int
        Parameters with fewer values keep 32-bit states.
    **kwargs : dict
        As torch.optim.AdamW's.

    Raises
    ------
    ValueError
        For settings that torch.optim.AdamW refuses, and for capturable and
        differentiable.

    Example
    -------
    >>> net = torch.nn.Linear(100, 100)
    >>> optimizer = AdamW8bit(net.parameters(), lr=0.001, weight_decay=0.01)
    >>> net(torch.ones(1, 100)).sum().backward()
    >>> optimizer.step()
    >>> optimizer.state_bytes()
    21128
    """


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


def _gradients(params: list[torch.Tensor]) -> list[torch.Tensor]:
    """Gradients of parameters that have one."""
    return cast(list[torch.Tensor], [p.grad for p in params])


def _state_dtype(p: torch.Tensor) -> torch.dtype:
    # Half precision would lose small updates of a momentum.
    return p.dtype if p.dtype == torch.float64 else torch.float32


def _dense(p: torch.Tensor) -> torch.Tensor:
    """The values of a parameter in the precision of its states.

    It is the parameter itself where it can be. torch's fused functions take
    the values at the first address and those behind it: of a slice others.
    """
    if not p.is_contiguous() and (
        torch.empty_like(p, device="meta").stride() != p.stride()
    ):
        return torch.empty_like(p, dtype=_state_dtype(p)).copy_(p)
    return p.to(_state_dtype(p))


def _laid_out_like(p: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    # torch's fused functions do not look at the strides.
    if value.stride() == p.stride():
        return value.to(p.device, _state_dtype(p))
    return torch.empty_like(p, dtype=_state_dtype(p)).copy_(value)


def _step_tensor(
    step: torch.Tensor | float, group: Group, p: torch.Tensor
) -> torch.Tensor:
    # torch's fused functions count on the parameters' device.
    return torch.tensor(
        float(step), device=p.device if group["fused"] else None
    )


def _maxima(name: str) -> str:
    return f"{name}_absmax"


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
