"""How a block evaluates its functions: plainly, recorded, or replayed.

``coupling.py`` says y1 = x1 + f(x2). An evaluator decides how "f(x2)" is
computed: by plain autograd; once, recording what a replay needs;
or as a replay with the recorded random numbers, which also returns the pullback
of the gradient. All three share dtypes and grid.

Authors
 * The sb_memeff authors 2026
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

from sb_memeff.nnet.recompute.segment import nothing_saved
from sb_memeff.nnet.replay.module_state import modules_of
from sb_memeff.nnet.replay.recorder import Recorder, Recording
from sb_memeff.nnet.reversible.grid import StreamFormat

__all__ = ["Evaluator", "RecordingEvaluator", "ReplayingEvaluator"]


class Evaluator:
    """Evaluates the functions of one block by plain autograd.

    Arguments
    ---------
    block : torch.nn.Module
        Whose submodules are evaluated.
    name : str
        Name of the block in its sequence, for messages.
    stream_format : StreamFormat
        Dtypes and grid.
    args : tuple
        Extra arguments of every function.
    kwargs : dict
        The same, by name.
    """

    def __init__(
        self,
        block: nn.Module,
        name: str,
        stream_format: StreamFormat,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ):
        self.block = block
        self.name = name
        self.format = stream_format
        self.args = args
        self.kwargs = kwargs or {}

    def value(self, function: str, stream: torch.Tensor) -> torch.Tensor:
        """The increment that a function adds to a stream.

        Arguments
        ---------
        function : str
            Name of a submodule of the block, such as "f" or "g.0". It keeps
            the shape of the stream.
        stream : torch.Tensor
            [N, C/2, ...].

        Returns
        -------
        torch.Tensor
            A tensor of that shape in the dtype and on the grid of the streams.
        """
        given = stream.to(self.format.inner_dtype)
        value = self.call(function, given, (stream,))
        self._check_increment(function, value, stream)
        return self.format.on_grid(value)

    def read(self, function: str, *streams: torch.Tensor) -> torch.Tensor:
        """Returns what a function computes from the state of the chain.

        Arguments
        ---------
        function : str
            Name of a submodule of the block.
        *streams : torch.Tensor
            Both streams; or one tensor, where no coupling stands before.

        Returns
        -------
        torch.Tensor
            Any tensor.
        """
        given = self._given(function, streams)
        value = self.call(function, given, streams)
        self._check_tensor(function, value, "a tap")
        return value

    def call(
        self,
        function: str,
        given: torch.Tensor | tuple[torch.Tensor, ...],
        streams: Sequence[torch.Tensor],
    ) -> torch.Tensor:
        """Calls a submodule with its argument and the extra ones.

        Arguments
        ---------
        function : str
            Name of the submodule.
        given : torch.Tensor or tuple of torch.Tensor
            Its argument, in the inner dtype.
        streams : tuple of torch.Tensor
            What the argument was made of.

        Returns
        -------
        torch.Tensor
            The result; not checked.

        Raises
        ------
        RuntimeError
            If it changes them or its weights in place: others need them as
            they were, and a second call would find something else.
        """
        module = self.block.get_submodule(function)
        watched = _versions(module, streams, self.args, self.kwargs)
        try:
            result = self._call(function, module, given)
        except RuntimeError as error:
            if "leaf Variable" not in str(error):
                raise
            what = "its input or a parameter"
            raise self._in_place(function, what) from error
        for what, tensor, version in watched:
            if tensor._version != version:
                for name, p in module.named_parameters():
                    if p is tensor:
                        what = f"its parameter {name}"
                raise self._in_place(function, what)
        return result

    def _call(
        self,
        function: str,
        module: nn.Module,
        given: torch.Tensor | tuple[torch.Tensor, ...],
    ) -> torch.Tensor:
        return module(given, *self.args, **self.kwargs)

    def _in_place(self, function: str, what: str) -> RuntimeError:
        return RuntimeError(
            f"{self._full_name(function)} changes {what} in place while it "
            f"runs, so that backward could not compute the same again. Set "
            f"inplace=False in it, or work on a copy; an Embedding with "
            f"max_norm may limit its norm after the optimizer's step instead."
        )

    def _given(
        self, function: str, streams: Sequence[torch.Tensor]
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        if not getattr(
            self.block.get_submodule(function), "takes_streams", False
        ):
            return self.format.leave(*streams)
        if len(streams) == 1:
            streams = self.format.enter(*streams)
        return tuple(s.to(self.format.inner_dtype) for s in streams)

    def _full_name(self, function: str) -> str:
        return ".".join(part for part in (self.name, function) if part)

    def _check_tensor(self, function: str, value: object, place: str) -> None:
        if not isinstance(value, torch.Tensor):
            raise TypeError(
                f"{self._full_name(function)} returned "
                f"{type(value).__name__}; inside {place} it must return one "
                f"tensor."
            )

    def _check_increment(
        self, function: str, value: torch.Tensor, stream: torch.Tensor
    ) -> None:
        self._check_tensor(function, value, "a coupling")
        if value.shape != stream.shape:
            raise ValueError(
                f"{self._full_name(function)} changed the shape of its stream "
                f"from {tuple(stream.shape)} to {tuple(value.shape)}; inside a "
                f"coupling it must keep it (same padding, stride 1)."
            )


class RecordingEvaluator(Evaluator):
    """Evaluates, saves nothing for gradients, and records what a replay needs.

    Arguments
    ---------
    recorder : Recorder
        Of this forward pass.
    *args : tuple
        As Evaluator's.
    """

    def __init__(self, recorder: Recorder, *args: Any):
        super().__init__(*args)
        self.recorder = recorder
        self.recordings: dict[str, Recording] = {}

    # With gradients, though nothing is saved for the graph and it is dropped at
    # once: some modules take a faster path without, and torch.compile builds
    # other code, both of which round differently.

    def value(self, function: str, stream: torch.Tensor) -> torch.Tensor:
        """The increment, computed as ``ReplayingEvaluator.vjp`` does."""
        with torch.enable_grad(), nothing_saved():
            stream = stream.detach().requires_grad_()
            return super().value(function, stream).detach()

    def read(self, function: str, *streams: torch.Tensor) -> torch.Tensor:
        """Returns what a function reads, computed as in a replay."""
        with torch.enable_grad(), nothing_saved():
            leaves = [s.detach().requires_grad_() for s in streams]
            return super().read(function, *leaves).detach()

    def _call(
        self,
        function: str,
        module: nn.Module,
        given: torch.Tensor | tuple[torch.Tensor, ...],
    ) -> torch.Tensor:
        with self.recorder.recording(module) as recording:
            result = super()._call(function, module, given)
        self.recordings[function] = recording
        return result


class ReplayingEvaluator(Evaluator):
    """Evaluates once more, with gradients.

    Modules see leaves that share memory with their parameters: with the
    parameters themselves autograd would call their hooks here, and again when
    the node of the block returns the gradient.

    Arguments
    ---------
    recorder : Recorder
        Of the forward pass.
    recordings : dict
        What ``RecordingEvaluator`` recorded for this block.
    weights : dict
        Name of each parameter of the block that needs a gradient to a leaf;
        a shared one has several names.
    extras : list of torch.Tensor
        Those of the extra arguments that need a gradient.
    *args : tuple
        As Evaluator's.
    """

    def __init__(
        self,
        recorder: Recorder,
        recordings: dict[str, Recording],
        weights: dict[str, torch.Tensor],
        extras: list[torch.Tensor],
        *args: Any,
    ):
        super().__init__(*args)
        self.recorder = recorder
        self.recordings = recordings
        self.weights = weights
        self.extras = extras
        # By identity, since a weight may have several names.
        self._gradients: dict[int, torch.Tensor] = {}
        # Of gradients that have been handed out.
        self._storages: set[int] = set()

    def _call(
        self,
        function: str,
        module: nn.Module,
        given: torch.Tensor | tuple[torch.Tensor, ...],
    ) -> torch.Tensor:
        with self.recorder.replay(module, self.recordings[function]):
            return functional_call(
                module,
                self._weights_of(function),
                (given, *self.args),
                self.kwargs,
            )

    def vjp(
        self, function: str, stream: torch.Tensor
    ) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
        """The increment, and the pullback of its gradient.

        Arguments
        ---------
        function : str
            As for ``value``.
        stream : torch.Tensor
            As for ``value``.

        Returns
        -------
        tuple
            The increment, as ``value`` returns it; and a function from the
            gradient of the increment to that of the stream, which collects the
            gradients of weights and extra arguments. Call it once.
        """
        stream = stream.detach().requires_grad_()
        with torch.enable_grad():
            given = stream.to(self.format.inner_dtype)
            value = self.call(function, given, (stream,))
        increment = self.format.on_grid(value.detach())
        # The pullback needs the graph of the value, not its storage.
        graph = _edge(value)

        def pullback(gradient: torch.Tensor) -> torch.Tensor:
            return self._pull(function, graph, gradient, [stream])[0]

        return increment, pullback

    def read_gradient(
        self,
        function: str,
        gradient: torch.Tensor,
        *streams: torch.Tensor,
    ) -> list[torch.Tensor]:
        """Gradients of the streams from that of what ``read`` returned.

        Arguments
        ---------
        function : str
            As for ``read``.
        gradient : torch.Tensor
            Gradient of the value.
        *streams : torch.Tensor
            As for ``read``.

        Returns
        -------
        list of torch.Tensor
            One for each stream.
        """
        leaves = [s.detach().requires_grad_() for s in streams]
        with torch.enable_grad():
            graph = _edge(self.read(function, *leaves))
        return self._pull(function, graph, gradient, leaves)

    def gradients(self) -> list[torch.Tensor | None]:
        """Gradients of the extra arguments and the weights, in that order.

        One for each weight, also if it has several names.
        """
        wanted = (*self.extras, *self.weights.values())
        return [self._gradients.get(key) for key in {id(x): 0 for x in wanted}]

    def _own(self, gradient: torch.Tensor) -> torch.Tensor:
        """A gradient with memory of its own.

        autograd hands out one tensor for several weights that are added up,
        and hands on that of the stream to those added last. What becomes a
        weight's ``grad`` may be changed in place at any time.
        """
        place = gradient.untyped_storage()._cdata
        if place in self._storages:
            return gradient.clone()
        self._storages.add(place)
        return gradient

    def _weights_of(self, function: str) -> dict[str, torch.Tensor]:
        prefix = f"{function}."
        return {
            name.removeprefix(prefix): weight
            for name, weight in self.weights.items()
            if name.startswith(prefix)
        }

    def _pull(
        self,
        function: str,
        graph: tuple[GradientEdge | None, torch.dtype],
        gradient: torch.Tensor,
        streams: Sequence[torch.Tensor],
    ) -> list[torch.Tensor]:
        edge, dtype = graph
        if edge is None:
            return [torch.zeros_like(s) for s in streams]
        leaves = {
            id(x): x
            for x in (*self.extras, *self._weights_of(function).values())
        }
        found = torch.autograd.grad(
            [edge],
            [*streams, *leaves.values()],
            [gradient.to(dtype)],
            allow_unused=True,
        )
        count = len(streams)
        self._storages.add(gradient.untyped_storage()._cdata)
        for key, value in zip(leaves, found[count:], strict=True):
            if value is not None:
                known = self._gradients.get(key)
                self._gradients[key] = (
                    self._own(value) if known is None else known + value
                )
        return [
            torch.zeros_like(s) if value is None else value
            for s, value in zip(streams, found[:count], strict=True)
        ]


def _versions(
    module: nn.Module,
    streams: Sequence[torch.Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> list[tuple[str, torch.Tensor, int]]:
    """(name, tensor, version) of all that a call must not change in place."""
    if torch.compiler.is_compiling():
        return []
    found = [("its input", x) for x in streams]
    found += [
        (f"extra argument {i}", x)
        for i, x in enumerate(tree_leaves((args, kwargs)))
    ]
    # Naming them all would take longer than the call of a small function.
    found += [
        ("a parameter", p)
        for part in modules_of(module)
        for p in part._parameters.values()
    ]
    return [
        (what, x, x._version)
        for what, x in found
        if isinstance(x, torch.Tensor) and not x.is_inference()
    ]


def _edge(value: torch.Tensor) -> tuple[GradientEdge | None, torch.dtype]:
    edge = get_gradient_edge(value) if value.requires_grad else None
    return edge, value.dtype
