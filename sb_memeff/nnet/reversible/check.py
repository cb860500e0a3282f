"""Check that backward reconstructs the activations of forward.

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
from sb_memeff.nnet.reversible.observer import Observer
from sb_memeff.nnet.reversible.sequence import ReversibleSequence

__all__ = ["InvertibilityReport", "check_invertible", "inversion_errors"]


@dataclass
class InvertibilityReport:
    """Result of ``check_invertible``.

    Arguments
    ---------
    inversion_error : float
        Largest |x_reconstructed - x| / max|x| over all blocks; 0 is
        bit-exact.
    gradient_error : float
        ||g - g_stored|| / ||g_stored||, where g is the gradient of the input
        and all parameters.
    blocks : dict
        Inversion error by block.
    parameters : dict
        Each parameter's share of the gradient error, ||g - g_stored|| of the
        parameter over ||g_stored|| of all; so too for "input".
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
    """Compares the activations and gradients of backward with stored ones.

    It works on a copy: weights, statistics, gradients and the random state
    stay as they are. In the copy, the parameters of chains that are zero, or
    nearly so, are drawn at random: the last layer of a residual function is
    often initialised with zeros, and then every inverse is exact. Call it
    inside the autocast context of the training to check that precision.

    Arguments
    ---------
    module : torch.nn.Module
        A ReversibleSequence, or a network with such sequences inside.
    x : torch.Tensor
        Input of the module.
    *args : tuple
        Further arguments of the module.
    **kwargs : dict
        Further arguments by name.

    Returns
    -------
    InvertibilityReport
        Inversion error by block, gradient error against stored activations
        by parameter.

    Raises
    ------
    ValueError
        If the module contains no ReversibleSequence.

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
    without_zeros = _draw_zero_parameters(copy.deepcopy(module))

    def step(save_memory: bool) -> tuple[dict[str, Any], dict[str, float]]:
        copied = copy.deepcopy(without_zeros)
        with forked_generators(x.device), inversion_errors(copied) as errors:
            gradients = _gradients(copied, x, args, kwargs, save_memory)
        return {name: g.double() for name, g in gradients.items()}, errors

    gradients, blocks = step(save_memory=True)
    stored, _ = step(save_memory=False)
    scale = _norm(stored.values()) or 1.0
    # A gradient that is missing on one side is zero.
    differences = {
        name: gradients.get(name, 0.0) - stored.get(name, torch.zeros(()))
        for name in {**gradients, **stored}
    }
    return InvertibilityReport(
        max(blocks.values(), default=0.0),
        _norm(differences.values()) / scale,
        blocks,
        {name: _norm([d]) / scale for name, d in differences.items()},
    )


# Layer scales, which are initialised with 1e-6 to 1e-4, count as zero.
_NEAR_ZERO = 1e-3


def _draw_zero_parameters(module: nn.Module) -> nn.Module:
    """Draws parameters of chains that are zero, so that no f or g is zero."""
    generator = torch.Generator().manual_seed(0)
    chains = [m for m in module.modules() if isinstance(m, ReversibleSequence)]
    parameters = {p: None for chain in chains for p in chain.parameters()}
    for p in parameters:
        if p.numel() and p.detach().abs().max() < _NEAR_ZERO:
            # A weight keeps the scale of its input; a gain halves it.
            std = p[0].numel() ** -0.5 if p.dim() > 1 else 0.5
            values = torch.randn(p.shape, generator=generator) * std
            with torch.no_grad():
                p.copy_(values)
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
    for chain in module.modules():
        if isinstance(chain, ReversibleSequence):
            chain.save_memory = save_memory
    x = x.detach().clone().requires_grad_()
    with torch.enable_grad():
        y = module(x, *args, **kwargs)
        weight = torch.randn(
            y.shape, generator=torch.Generator().manual_seed(0)
        )
        loss = (y.float() * weight.to(y.device)).sum()
    leaves = {"input": x}
    leaves.update(
        (n, p) for n, p in module.named_parameters() if p.requires_grad
    )
    gradients = torch.autograd.grad(
        loss, tuple(leaves.values()), allow_unused=True
    )
    return {
        name: gradient
        for name, gradient in zip(leaves, gradients)
        if gradient is not None
    }


@contextlib.contextmanager
def inversion_errors(
    module: nn.Module,
) -> Generator[dict[str, float], None, None]:
    """Measures inversion errors of the steps inside this context.

    For this the streams before every block are stored.

    Arguments
    ---------
    module : torch.nn.Module
        A network that contains ReversibleSequences.

    Yields
    ------
    dict
        The largest |x_reconstructed - x| / max|x| of the streams before each
        invertible block, by the name of the block, in the order of backward;
        inf if it is NaN.

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
    errors: dict[str, float] = {}
    observed = []
    for name, chain in module.named_modules():
        if isinstance(chain, ReversibleSequence):
            prefix = f"{name}." if name else ""
            make_observer = functools.partial(_InversionErrors, errors, prefix)
            chain._observer_factories.append(make_observer)
            observed.append((chain, make_observer))
    try:
        yield errors
    finally:
        for chain, make_observer in observed:
            chain._observer_factories.remove(make_observer)


class _InversionErrors(Observer):
    """Compares the streams before each block in forward and in backward."""

    def __init__(self, errors: dict[str, float], prefix: str):
        self.errors = errors
        self.prefix = prefix
        self.names: list[str] = []
        # Of the streams before each block.
        self.copies: dict[str, list[torch.Tensor]] = {}

    def forward_begins(
        self, names: list[str], streams: list[torch.Tensor]
    ) -> None:
        """Stores the streams before the first block."""
        self.names = names
        self._store(0, streams)

    def block_computed(self, name: str, streams: list[torch.Tensor]) -> None:
        """Stores the streams before the next block."""
        self._store(self.names.index(name) + 1, streams)

    def input_reconstructed(
        self, name: str, streams: list[torch.Tensor]
    ) -> None:
        """Keeps the largest error of all calls of a block."""
        error = max(map(_relative_error, streams, self.copies[name]))
        name = self.prefix + name
        self.errors[name] = max(error, self.errors.get(name, 0.0))

    def _store(self, index: int, streams: list[torch.Tensor]) -> None:
        if index < len(self.names):
            self.copies[self.names[index]] = [s.clone() for s in streams]


def _relative_error(reconstructed: torch.Tensor, true: torch.Tensor) -> float:
    if not true.numel():
        return 0.0
    error = (reconstructed - true).abs().max()
    if error == 0:
        return 0.0
    error = (error / true.abs().max()).item()
    return math.inf if math.isnan(error) else error
