"""Does backward see the activations that forward saw?

Authors
 * The sb_memeff authors 2026
"""

import contextlib
import copy
import functools
import math
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sb_memeff.nnet.replay.random_states import forked_generators
from sb_memeff.nnet.reversible.sequence import ReversibleSequence
from sb_memeff.nnet.reversible.walk import Observer

__all__ = ["InvertibilityReport", "check_invertible", "inversion_errors"]


@dataclass
class InvertibilityReport:
    """Result of ``check_invertible``.

    Arguments
    ---------
    inversion_error : float
        Largest |x_rebuilt - x| / max|x| over all blocks; 0 is bit-exact.
    gradient_error : float
        ||g - g_stored|| / ||g_stored|| over input and parameters together.
    blocks : dict
        Inversion error by block.
    parameters : dict
        Each parameter's part of it, ||g - g_stored|| over the same norm of
        all together; "input" is among them.
    """

    inversion_error: float
    gradient_error: float
    blocks: dict[str, float]
    parameters: dict[str, float]

    def __str__(self) -> str:
        block = max(
            self.blocks, key=self.blocks.__getitem__, default="no block"
        )
        parameter = max(self.parameters, key=self.parameters.__getitem__)
        return (
            f"inversion error {self.inversion_error:.3g} (most in {block}), "
            f"gradient error {self.gradient_error:.3g} against stored "
            f"activations (most in {parameter}: "
            f"{self.parameters[parameter]:.3g})"
        )


def check_invertible(
    module: nn.Module, x: torch.Tensor, *args: Any, **kwargs: Any
) -> InvertibilityReport:
    """Compares backward's activations and gradients with stored ones.

    It works on a copy: weights, statistics, gradients and the random state
    stay as they are. In the copy, parameters of chains that begin at zero, or
    nearly so, are drawn at random: the last layer of a residual function often begins as zero, and
    then every inversion is exact. Call it inside the autocast context of the
    training to check that precision.

    Arguments
    ---------
    module : torch.nn.Module
        A ReversibleSequence, or a network with such sequences inside.
    x : torch.Tensor
        Input of the module.
    *args : tuple
        Further arguments of the module.
    **kwargs : dict
        The same, by name.

    Returns
    -------
    InvertibilityReport
        Inversion error by block, gradient error against stored activations
        by parameter.

    Raises
    ------
    ValueError
        If there is no ReversibleSequence in the module.

    Example
    -------
    >>> from sb_memeff.nnet.reversible import AdditiveCoupling
    >>> def body():
    ...     return torch.nn.Conv1d(4, 4, 3, padding=1)
    >>> net = ReversibleSequence([AdditiveCoupling(body(), body())])
    >>> check_invertible(net, torch.rand(2, 8, 10)).inversion_error
    0.0
    """
    if not any(isinstance(m, ReversibleSequence) for m in module.modules()):
        raise ValueError(
            f"check_invertible: {type(module).__name__} holds no "
            f"ReversibleSequence."
        )
    found, blocks = [], {}
    awake = _awake(copy.deepcopy(module))
    for save_memory in (True, False):
        copied = copy.deepcopy(awake)
        with (
            forked_generators(x.device),
            inversion_errors(copied) as errors,
        ):
            found.append(_gradients(copied, x, args, kwargs, save_memory))
        blocks.update(errors)
    ours, stored = (
        {name: g.double() for name, g in gradients.items()}
        for gradients in found
    )
    scale = _norm(stored.values()) or 1.0
    # A gradient that one of the two lacks is zero there.
    differences = {
        name: ours.get(name, 0.0) - stored.get(name, torch.zeros(()))
        for name in {**ours, **stored}
    }
    return InvertibilityReport(
        max(blocks.values(), default=0.0),
        _norm(differences.values()) / scale,
        blocks,
        {name: _norm([d]) / scale for name, d in differences.items()},
    )


# Below this a parameter counts as zero: layer scales begin at 1e-6 to 1e-4.
_ASLEEP = 1e-3


def _awake(module: nn.Module) -> nn.Module:
    """Draws what is zero, so that every f and g of the chains does something."""
    generator = torch.Generator().manual_seed(0)
    chains = [m for m in module.modules() if isinstance(m, ReversibleSequence)]
    parameters = {p: None for chain in chains for p in chain.parameters()}
    for p in parameters:
        if p.numel() and p.detach().abs().max() < _ASLEEP:
            # A weight passes on the scale of its input; a gain halves it.
            std = p[0].numel() ** -0.5 if p.dim() > 1 else 0.5
            drawn = torch.randn(p.shape, generator=generator) * std
            with torch.no_grad():
                p.copy_(drawn)
    return module


def _norm(tensors: Iterable[torch.Tensor]) -> float:
    return math.sqrt(sum(t.square().sum().item() for t in tensors))


def _gradients(
    module: nn.Module,
    x: torch.Tensor,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    save_memory: bool,
) -> dict[str, torch.Tensor]:
    for part in module.modules():
        if isinstance(part, ReversibleSequence):
            part.save_memory = save_memory
    x = x.detach().clone().requires_grad_()
    with torch.enable_grad():
        y = module(x, *args, **kwargs)
        weight = torch.randn(
            y.shape, generator=torch.Generator().manual_seed(0)
        )
        loss = (y.float() * weight.to(y.device)).sum()
    named = {"input": x}
    named.update(
        (n, p) for n, p in module.named_parameters() if p.requires_grad
    )
    gradients = torch.autograd.grad(
        loss, tuple(named.values()), allow_unused=True
    )
    return {
        name: gradient
        for name, gradient in zip(named, gradients, strict=True)
        if gradient is not None
    }


@contextlib.contextmanager
def inversion_errors(
    module: nn.Module,
) -> Generator[dict[str, float], None, None]:
    """Compares what backward rebuilds with what forward saw, meanwhile.

    For this the streams before every block are stored.

    Arguments
    ---------
    module : torch.nn.Module
        A network with ReversibleSequences inside.

    Yields
    ------
    dict
        Filled by backward, in its order: name of each invertible block in the
        module to the largest |x_rebuilt - x| / max|x| of its streams; inf
        where that is no number.

    Example
    -------
    >>> from sb_memeff.nnet.reversible import AdditiveCoupling
    >>> coupling = AdditiveCoupling(torch.nn.Tanh(), torch.nn.Tanh())
    >>> net = ReversibleSequence([coupling])
    >>> with inversion_errors(net) as errors:
    ...     net(torch.rand(2, 4, requires_grad=True)).sum().backward()
    >>> errors
    {'blocks.0': 0.0}
    """
    errors = {}
    watched = []
    for name, part in module.named_modules():
        if isinstance(part, ReversibleSequence):
            prefix = f"{name}." if name else ""
            observer = functools.partial(_InversionErrors, errors, prefix)
            part._observers.append(observer)
            watched.append((part, observer))
    try:
        yield errors
    finally:
        for part, observer in watched:
            part._observers.remove(observer)


class _InversionErrors(Observer):
    """Compares the streams before each block in forward and in backward."""

    def __init__(self, errors: dict[str, float], prefix: str):
        self.errors, self.prefix = errors, prefix
        self.before = {}

    def entered(self, names: list[str], streams: list[torch.Tensor]) -> None:
        """Stores the streams before the first block."""
        self.names = names
        self.computed(None, streams)

    def computed(self, name: str | None, streams: list[torch.Tensor]) -> None:
        """Stores the streams before the next block."""
        number = 0 if name is None else self.names.index(name) + 1
        if number < len(self.names):
            self.before[self.names[number]] = [s.clone() for s in streams]

    def rebuilt(self, name: str, streams: list[torch.Tensor]) -> None:
        """Keeps the largest error of all calls of a block."""
        worst = max(map(_relative_error, streams, self.before[name]))
        name = self.prefix + name
        self.errors[name] = max(worst, self.errors.get(name, 0.0))


def _relative_error(rebuilt: torch.Tensor, true: torch.Tensor) -> float:
    if not true.numel():
        return 0.0
    error = (rebuilt - true).abs().max()
    if error == 0:
        return 0.0
    error = (error / true.abs().max()).item()
    return math.inf if math.isnan(error) else error
