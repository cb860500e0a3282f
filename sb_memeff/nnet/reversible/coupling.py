"""Invertible maps of two streams: the mathematics of reversible networks.

This module defines what is computed. ``nodes.py`` evaluates it in little
memory.

Authors
 * The sb_memeff authors 2026
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from sb_memeff.nnet.reversible.arguments import ExtraArguments
from sb_memeff.nnet.reversible.layout import split_streams

__all__ = [
    "AdditiveCoupling",
    "Invertible",
    "Tap",
    "ValueEvaluator",
    "VjpEvaluator",
]

# Both streams, or their gradients.
Pair = tuple[torch.Tensor, torch.Tensor]


class ValueEvaluator(Protocol):
    """Evaluates the functions of a block.

    ``add`` and ``subtract`` equal a sum or difference with ``value``, in one
    pass over memory where there is a kernel.
    """

    def value(self, function: str, stream: torch.Tensor) -> torch.Tensor:
        """The increment that a function computes from a stream.

        Arguments
        ---------
        function : str
            Name of a submodule of the block, such as "f" or "g.0".
        stream : torch.Tensor
            [N, C/2, ...].

        Returns
        -------
        torch.Tensor
            Same shape.
        """
        raise NotImplementedError

    def add(
        self, stream: torch.Tensor, function: str, given: torch.Tensor
    ) -> torch.Tensor:
        """stream + function(given).

        Arguments
        ---------
        stream : torch.Tensor
            [N, C/2, ...].
        function : str
            As in ``value``.
        given : torch.Tensor
            The other stream, same shape.

        Returns
        -------
        torch.Tensor
            A new stream.
        """
        return stream + self.value(function, given)

    def subtract(
        self, stream: torch.Tensor, function: str, given: torch.Tensor
    ) -> torch.Tensor:
        """stream - function(given).

        Arguments
        ---------
        stream : torch.Tensor
            [N, C/2, ...].
        function : str
            As in ``value``.
        given : torch.Tensor
            The other stream, same shape.

        Returns
        -------
        torch.Tensor
            A new stream.
        """
        return stream - self.value(function, given)


class Pullback(Protocol):
    """Maps the gradient of an increment to that of the stream it depends on.

    Call it once.
    """

    def __call__(
        self, gradient: torch.Tensor, total: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The gradient of the stream.

        Arguments
        ---------
        gradient : torch.Tensor
            Of the increment.
        total : torch.Tensor, optional
            Add to this gradient, which may be overwritten.

        Returns
        -------
        torch.Tensor
            The gradient, or the sum.
        """
        raise NotImplementedError


class VjpEvaluator(Protocol):
    """Evaluates and differentiates the functions of a block."""

    def vjp(
        self, function: str, stream: torch.Tensor
    ) -> tuple[torch.Tensor, Pullback]:
        """The increment, and the pullback of its gradient.

        Arguments
        ---------
        function : str
            As in ``ValueEvaluator.value``.
        stream : torch.Tensor
            As in ``ValueEvaluator.value``.

        Returns
        -------
        tuple
            The increment, and its pullback.
        """
        raise NotImplementedError

    def subtract_vjp(
        self, stream: torch.Tensor, function: str, given: torch.Tensor
    ) -> tuple[torch.Tensor, Pullback]:
        """stream - function(given), and the pullback of the function.

        Arguments
        ---------
        stream : torch.Tensor
            [N, C/2, ...]. It may be overwritten.
        function : str
            As in ``vjp``.
        given : torch.Tensor
            The other stream, same shape.

        Returns
        -------
        tuple
            The difference, and the pullback as of ``vjp``.
        """
        raise NotImplementedError


class _PlainEvaluator(ValueEvaluator):
    """Evaluates a block outside of a chain: plain autograd, no grid."""

    def __init__(self, block: "Invertible", extra: ExtraArguments):
        extra.check(block.functions())
        self.block = block
        self.extra = extra

    def value(self, function: str, stream: torch.Tensor) -> torch.Tensor:
        """See ``ValueEvaluator.value``."""
        return self.extra.call(self.block.get_submodule(function), stream)


class Invertible(nn.Module):
    """A map of two streams that can be inverted.

    Subclasses define the map in each direction. They get the increments of
    their submodules from an evaluator (``sb_memeff.nnet.reversible.
    evaluator``), which decides on gradients, dtypes and rounding.
    """

    def functions(self) -> Iterator[nn.Module]:
        """The submodules that are evaluated, with extra arguments.

        Yields
        ------
        torch.nn.Module
            Each child; of a list of modules, each member.
        """
        for child in self.children():
            if isinstance(child, nn.ModuleList):
                yield from child
            else:
                yield child

    def forward_streams(
        self, x1: torch.Tensor, x2: torch.Tensor, evaluator: ValueEvaluator
    ) -> Pair:
        """Applies the map.

        Arguments
        ---------
        x1 : torch.Tensor
            First stream [N, C/2, ...].
        x2 : torch.Tensor
            Second stream, same shape.
        evaluator : ValueEvaluator
            ``evaluator.value("f", x)`` is the increment f(x), and
            ``evaluator.add(y, "f", x)`` is y + f(x).

        Returns
        -------
        tuple of torch.Tensor
            Both streams after the map.
        """
        raise NotImplementedError

    def inverse_streams(
        self,
        y1: torch.Tensor,
        y2: torch.Tensor,
        evaluator: ValueEvaluator,
        shape: tuple[int, ...],
    ) -> Pair:
        """Inverts the map.

        Arguments
        ---------
        y1 : torch.Tensor
            First stream after the map.
        y2 : torch.Tensor
            Second stream after the map.
        evaluator : ValueEvaluator
            As in ``forward_streams``.
        shape : torch.Size
            Shape of one stream before the map.

        Returns
        -------
        tuple of torch.Tensor
            Both streams before the map.
        """
        raise NotImplementedError

    def backward_streams(
        self,
        y: list[torch.Tensor],
        dy: list[torch.Tensor],
        evaluator: VjpEvaluator,
        shape: tuple[int, ...],
    ) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
        """Inverts and differentiates the map; evaluates each function once.

        Arguments
        ---------
        y : list of torch.Tensor
            Both streams after the map. Take them out of the list, so that
            each is freed as soon as it is replaced.
        dy : list of torch.Tensor
            Their gradients. Take them out as well.
        evaluator : VjpEvaluator
            ``evaluator.vjp("f", x)`` returns the increment f(x) and the
            pullback of its gradient; ``evaluator.subtract_vjp(y, "f", x)``
            returns y - f(x) and the same pullback. ``pullback(d1, total=d2)``
            is d2 + pullback(d1).
        shape : torch.Size
            Shape of one stream before the map.

        Returns
        -------
        tuple
            Both streams before the map, and the gradients of both.
        """
        raise NotImplementedError

    def forward_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of one stream after the map.

        Arguments
        ---------
        shape : tuple of int
            Shape of one stream before the map.

        Returns
        -------
        tuple of int
            Shape of one stream after the map.
        """
        return shape

    def inverse_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of one stream before the map, if the map pads nothing.

        Arguments
        ---------
        shape : tuple of int
            Shape of one stream after the map.

        Returns
        -------
        tuple of int
            Shape of one stream before the map.
        """
        return shape

    def forward(
        self, x: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Applies the map with plain autograd, without rounding.

        Arguments
        ---------
        x : torch.Tensor
            Both streams, [N, C, ...] with C even.
        *args : tuple
            Extra arguments of the modules inside.
        **kwargs : dict
            Extra arguments by name.

        Returns
        -------
        torch.Tensor
            Both streams after the map.
        """
        plain = _PlainEvaluator(self, ExtraArguments(args, kwargs))
        return torch.cat(self.forward_streams(*split_streams(x), plain), dim=1)

    def inverse(
        self,
        y: torch.Tensor,
        *args: Any,
        input_shape: tuple[int, ...] | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Inverts ``forward``, without rounding.

        Arguments
        ---------
        y : torch.Tensor
            An output of ``forward``.
        *args : tuple
            The extra arguments of that call.
        input_shape : tuple of int, optional
            Shape of the input; needed only where an odd size was padded.
        **kwargs : dict
            The extra arguments by name.

        Returns
        -------
        torch.Tensor
            The input.
        """
        y1, y2 = split_streams(y)
        if input_shape is None:
            shape = self.inverse_shape(y1.shape)
        else:
            shape = (input_shape[0], input_shape[1] // 2, *input_shape[2:])
        plain = _PlainEvaluator(self, ExtraArguments(args, kwargs))
        return torch.cat(self.inverse_streams(y1, y2, plain, shape), dim=1)


class AdditiveCoupling(Invertible):
    """y1 = x1 + f(x2), y2 = x2 + g(y1) (Gomez et al. 2017, eq. 6).

    Arguments
    ---------
    f : torch.nn.Module or torch.nn.ModuleList
        Maps a stream [N, C/2, ...] to an increment of the same shape. It gets
        the extra arguments of the sequence. A list stands for the sum of its
        members: they are evaluated one after another, so that a sequence needs
        the memory of one.
    g : torch.nn.Module or torch.nn.ModuleList
        The same, for the other stream.

    Raises
    ------
    TypeError
        If f or g is not a Module.
    ValueError
        If it is an empty list.

    Example
    -------
    >>> block = AdditiveCoupling(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    >>> block(torch.rand(2, 8)).shape
    torch.Size([2, 8])
    """

    def __init__(self, f: nn.Module, g: nn.Module):
        super().__init__()
        for name, module in (("f", f), ("g", g)):
            if not isinstance(module, nn.Module):
                raise TypeError(
                    f"AdditiveCoupling: {name} must be a torch.nn.Module, "
                    f"not {type(module).__name__}; wrap the function in one."
                )
            if isinstance(module, nn.ModuleList) and len(module) == 0:
                raise ValueError(f"AdditiveCoupling: {name} is an empty list.")
        self.f = f
        self.g = g

    def forward_streams(
        self, x1: torch.Tensor, x2: torch.Tensor, evaluator: ValueEvaluator
    ) -> Pair:
        """y1 = x1 + f(x2), y2 = x2 + g(y1)."""
        y1, y2 = x1, x2
        for f in self._summands("f"):
            y1 = evaluator.add(y1, f, x2)
        for g in self._summands("g"):
            y2 = evaluator.add(y2, g, y1)
        return y1, y2

    def inverse_streams(
        self,
        y1: torch.Tensor,
        y2: torch.Tensor,
        evaluator: ValueEvaluator,
        shape: tuple[int, ...],
    ) -> Pair:
        """x2 = y2 - g(y1), x1 = y1 - f(x2)."""
        x1, x2 = y1, y2
        for g in self._summands("g"):
            x2 = evaluator.subtract(x2, g, y1)
        for f in self._summands("f"):
            x1 = evaluator.subtract(x1, f, x2)
        return x1, x2

    def backward_streams(
        self,
        y: list[torch.Tensor],
        dy: list[torch.Tensor],
        evaluator: VjpEvaluator,
        shape: tuple[int, ...],
    ) -> tuple[Pair, Pair]:
        """dx1 = dy1 + g'(y1)^T dy2, dx2 = dy2 + f'(x2)^T dx1."""
        y2, y1 = y.pop(), y.pop()
        d2, d1 = dy.pop(), dy.pop()
        # In the order in which autograd adds up the gradients.
        for g in reversed(self._summands("g")):
            y2, pullback = evaluator.subtract_vjp(y2, g, y1)
            d1 = pullback(d2, total=d1)
        for f in reversed(self._summands("f")):
            y1, pullback = evaluator.subtract_vjp(y1, f, y2)
            d2 = pullback(d1, total=d2)
        return (y1, y2), (d1, d2)

    def _summands(self, name: str) -> list[str]:
        function = getattr(self, name)
        if isinstance(function, nn.ModuleList):
            return [f"{name}.{i}" for i in range(len(function))]
        return [name]


class Tap(Invertible):
    """Computes a value from the state inside a chain, which stays as it is.

    A sequence with taps returns, besides its output, the sum of their values:
    s = r_1(x_1) + r_2(x_2) + ..., where x_k is the state at tap k. A
    convolution over the concatenated x_k is such a sum, with one slice of the
    weight for each. Backward needs the gradient of the sum, which is the same
    for all taps, and each x_k, which is reconstructed on the way. So the
    concatenation is never in memory.

    Arguments
    ---------
    read : torch.nn.Module
        Maps the state [N, C, ...] (both streams joined) to any tensor. It
        gets the extra arguments of the sequence.

    Raises
    ------
    TypeError
        If read is not a Module.

    Example
    -------
    >>> from sb_memeff.nnet.reversible import ReversibleSequence
    >>> def block():
    ...     return AdditiveCoupling(torch.nn.Tanh(), torch.nn.Tanh())
    >>> chain = [block(), Tap(torch.nn.Linear(4, 7)), block()]
    >>> chain.append(Tap(torch.nn.Linear(4, 7)))
    >>> y, total = ReversibleSequence(chain)(torch.rand(2, 4))
    >>> total.shape
    torch.Size([2, 7])
    """

    def __init__(self, read: nn.Module):
        super().__init__()
        if not isinstance(read, nn.Module):
            raise TypeError(
                f"Tap: read must be a torch.nn.Module, not "
                f"{type(read).__name__}; wrap the function in one."
            )
        self.read = read

    def forward_streams(
        self, x1: torch.Tensor, x2: torch.Tensor, evaluator: ValueEvaluator
    ) -> Pair:
        """Returns both streams."""
        return x1, x2

    def inverse_streams(
        self,
        y1: torch.Tensor,
        y2: torch.Tensor,
        evaluator: ValueEvaluator,
        shape: tuple[int, ...],
    ) -> Pair:
        """Returns both streams."""
        return y1, y2

    def backward_streams(
        self,
        y: list[torch.Tensor],
        dy: list[torch.Tensor],
        evaluator: VjpEvaluator,
        shape: tuple[int, ...],
    ) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
        """Returns streams and gradients."""
        return y, dy
