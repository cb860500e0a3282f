"""SGD, Adam and AdamW that keep their states in 8 bits.

Between two steps the states are 8-bit tensors (``utils.blockwise``). A step
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

import logging

import torch
from speechbrain.utils.logger import get_logger
from torch.optim.adam import adam
from torch.optim.sgd import sgd
from torch.utils._pytree import tree_leaves

from sb_memeff.utils.blockwise import BLOCK, Codebook, Quantized8bit

__all__ = [
    "AdamW8bit",
    "Adam8bit",
    "SGD8bit",
    "keep_32bit_states",
    "state_bytes",
]

logger = get_logger(__name__)

# States of so many values are in float32 at the same time, unless one
# parameter alone has more.
CHUNK = 1 << 22
# What bitsandbytes' checkpoints call the states.
BITSANDBYTES = "__bnb_optimizer_quant_state__"


def state_bytes(optimizer):
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


def keep_32bit_states(modules):
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
            module.weight.optim_bits = 32


class _States8bit(torch.optim.Optimizer):
    """What the 8-bit optimizers share; goes before torch's class.

    A subclass names its states, in the order of bitsandbytes' numbers, with
    the codebook of each, and updates some parameters in ``_update``.
    """

    signed = {}

    def __init__(self, params, *args, min_8bit_size=4096, **kwargs):
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
        self._codebooks = {}

    def __setstate__(self, state):
        super().__setstate__(state)
        # Copies and pickles do not have them.
        self._codebooks = {}

    def add_param_group(self, param_group):
        """Adds parameters, as torch's class does.

        Arguments
        ---------
        param_group : dict
            ``params`` and the settings that differ from the defaults.

        Raises
        ------
        TypeError
            If a parameter is not of floating point.
        """
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            if not p.is_floating_point():
                self.param_groups.pop()
                raise TypeError(
                    f"{type(self).__name__} updates parameters of floating "
                    f"point, not {p.dtype}."
                )

    @torch.no_grad()
    def step(self, closure=None):
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
            for some in _chunks(params):
                self._step_some(group, some)
        return loss

    def _step_some(self, group, params):
        weights = [p.to(_state_dtype(p)) for p in params]
        grads = [_laid_out_like(p, p.grad) for p in params]
        states = [self._unpack(p) for p in params]
        self._update(group, weights, grads, states)
        for p, weight, state in zip(params, weights, states):
            if weight is not p:
                p.copy_(weight)
            self.state[p] = self._pack(group, p, state)
            if not self.state[p]:
                del self.state[p]

    def _names(self, group):
        """States that a parameter has with these settings."""
        raise NotImplementedError

    def _update(self, group, params, grads, states):
        """Updates parameters and their states, all unpacked, in place."""
        raise NotImplementedError

    def _codebook(self, name, device):
        key = (self.signed[name], device)
        if key not in self._codebooks:
            self._codebooks[key] = Codebook(*key)
        return self._codebooks[key]

    def _unpack(self, p):
        state = dict(self.state.get(p, {}))
        for name, value in state.items():
            if isinstance(value, Quantized8bit):
                value = self._codebook(name, p.device).dequantize(value)
                state[name] = _laid_out_like(p, value)
        return state

    def _pack(self, group, p, state):
        if not self._in_8bit(group, p):
            return state
        return {
            name: self._packed(name, value) if name in self.signed else value
            for name, value in state.items()
        }

    @staticmethod
    def _in_8bit(group, p):
        keep = getattr(p, "optim_bits", 8) == 32
        return p.numel() >= group["min_8bit_size"] and not keep

    def state_bytes(self):
        """Bytes of all states; 0 before the first step.

        Returns
        -------
        int
            The bytes.
        """
        return state_bytes(self)

    def state_dict(self):
        """The state as torch's class of the same name would save it.

        The states are float32 tensors on the CPU, which that class can load.
        Besides, the maxima of the blocks are there, so that this class finds
        its 8 bits again exactly.

        Returns
        -------
        dict
            ``state`` and ``param_groups``.
        """
        saved = super().state_dict()
        saved["state"] = {
            key: self._saved(value) for key, value in saved["state"].items()
        }
        return saved

    def _saved(self, state):
        cpu = torch.device("cpu")
        result = {}
        for name, value in state.items():
            if isinstance(value, Quantized8bit):
                # On the CPU, for they are four times as large there.
                packed = Quantized8bit(value.codes.cpu(), value.absmax.cpu())
                value = self._codebook(name, cpu).dequantize(packed)
                result[_maxima(name)] = packed.absmax
            result[name] = value
        return result

    def load_state_dict(self, state_dict):
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
        groups = self.param_groups
        saved = state_dict["param_groups"]
        if [len(g["params"]) for g in groups] != [
            len(g["params"]) for g in saved
        ]:
            # torch's message.
            super().load_state_dict(state_dict)
        # What torch's class does not save stays as it was given.
        saved = [
            {**{k: v for k, v in group.items() if k != "params"}, **old}
            for group, old in zip(groups, saved)
        ]
        states = {
            p: self._restored(old, p, key, state_dict["state"][key])
            for group, old in zip(groups, saved)
            for p, key in zip(group["params"], old["params"])
            if state_dict["state"].get(key)
        }
        _log_differences(type(self).__name__, groups, saved)
        super().load_state_dict({"state": {}, "param_groups": saved})
        self.state.update(states)

    def _restored(self, group, p, number, saved):
        saved = self._from_bitsandbytes(saved)
        names = self._names(group)
        if not set(names) <= set(saved) <= {*names, *map(_maxima, names)}:
            raise ValueError(
                f"The checkpoint holds the states {sorted(saved)} of parameter "
                f"{number}, but {type(self).__name__} needs {sorted(names)}: "
                "it was written by another kind of optimizer. Name that one "
                "in opt_class, or begin in a new output_folder."
            )
        state = {}
        for name in names:
            value = saved[name]
            if name == "step":
                value = _step_tensor(value, group, p)
            elif value is not None:
                if value.shape != p.shape:
                    raise ValueError(
                        f"The checkpoint's {name} of parameter {number} has "
                        f"the shape {tuple(value.shape)}, the parameter "
                        f"{tuple(p.shape)}: it is of another network."
                    )
                value = _laid_out_like(p, value.clone())
                if self._in_8bit(group, p):
                    maxima = saved.get(_maxima(name))
                    value = self._packed(name, value, maxima)
            state[name] = value
        return state

    def _packed(self, name, value, maxima=None):
        codebook = self._codebook(name, value.device)
        if maxima is not None:
            packed = codebook.requantize(value, maxima)
            # torch's class carries the maxima along when it trains on.
            if torch.equal(codebook.dequantize(packed), value):
                return packed
        return codebook.quantize(value)

    def _from_bitsandbytes(self, saved):
        saved = {**saved, **saved.get(BITSANDBYTES, {})}
        if "state1" not in saved:
            return saved
        result = {"step": saved["step"]} if "exp_avg" in self.signed else {}
        for number, name in enumerate(self.signed, 1):
            if f"state{number}" not in saved:
                break
            value = saved[f"state{number}"]
            if value.dtype == torch.uint8:
                codes = value.cpu().reshape(-1).to(torch.int32)
                maxima = saved[f"absmax{number}"].cpu()
                values = saved[f"qmap{number}"].cpu().index_select(0, codes)
                values *= maxima.repeat_interleave(BLOCK)[: len(values)]
                result[_maxima(name)] = maxima
                value = values.reshape(value.shape)
            result[name] = value
        return result


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

    signed = {"momentum_buffer": True}

    def _names(self, group):
        return list(self.signed) if group["momentum"] else []

    def _update(self, group, params, grads, states):
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


class _Adam8bit(_States8bit):
    signed = {
        "exp_avg": True,
        "exp_avg_sq": False,
        "max_exp_avg_sq": False,
    }

    def _names(self, group):
        moments = ["exp_avg", "exp_avg_sq"]
        if group["amsgrad"]:
            moments.append("max_exp_avg_sq")
        return ["step", *moments]

    def _update(self, group, params, grads, states):
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


def _state_dtype(p):
    # Half precision would lose small updates of a momentum.
    return p.dtype if p.dtype == torch.float64 else torch.float32


def _laid_out_like(p, value):
    # torch's fused functions do not look at the strides.
    if value.stride() == p.stride():
        return value.to(p.device, _state_dtype(p))
    return torch.empty_like(p, dtype=_state_dtype(p)).copy_(value)


def _step_tensor(step, group, p):
    # torch's fused functions count on the parameters' device.
    return torch.tensor(
        float(step), device=p.device if group["fused"] else None
    )


def _maxima(name):
    return f"{name}_absmax"


def _chunks(params):
    chunk, values = [], 0
    for p in params:
        if chunk and values + p.numel() > CHUNK:
            yield chunk
            chunk, values = [], 0
        chunk.append(p)
        values += p.numel()
    if chunk:
        yield chunk


def _log_differences(name, given, saved):
    for number, (new, old) in enumerate(zip(given, saved)):
        differences = {
            key: f"{key}={old[key]} (given: {new[key]})"
            for key in new
            if key != "params" and old[key] != new[key]
        }
        if differences:
            # The learning rate is a scheduler's business.
            usual = set(differences) <= {"lr", "initial_lr"}
            logger.log(
                logging.INFO if usual else logging.WARNING,
                f"{name}: the checkpoint's settings of parameter group "
                f"{number} are used: {', '.join(differences.values())}",
            )
