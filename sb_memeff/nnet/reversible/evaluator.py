"""Evaluate the functions of a block: plainly, recorded, or replayed.

``coupling.py`` defines y1 = x1 + f(x2). An evaluator decides how "f(x2)" is
computed: by plain autograd; without a graph, while the state that a replay
needs is recorded; or by a replay, which restores that state and also returns
the pullback of the gradient. All three share dtypes and grid.

Authors
 * The sb_memeff authors 2026
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Union

import torch
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

from sb_memeff.nnet.recompute.segment import nothing_saved
from sb_memeff.nnet.replay.module_state import modules_of
from sb_memeff.nnet.replay.recorder import Recorder, Recording
from sb_memeff.nnet.reversible.arguments import ExtraArguments
from sb_memeff.nnet.reversible.coupling import Pullback
from sb_memeff.nnet.reversible.gradient_sums import GradientSums, is_unshared
from sb_memeff.nnet.reversible.grid import StreamFormat

__all__ = ["Evaluator", "RecordingEvaluator", "ReplayingEvaluator"]

# The argument of a module: one tensor, or both streams.
ModuleInput = Union[torch.Tensor, tuple[torch.Tensor, ...]]


class Evaluator:
    """Evaluates the functions of one block by plain autograd.

    Arguments
    ---------
    block : torch.nn.Module
        Its submodules are the functions.
    name : str
        Name of the block in its sequence, for messages.
    stream_format : StreamFormat
        Dtypes and grid.
    extra : ExtraArguments
        For the functions.
    """

    def __init__(
        self,
        block: nn.Module,
        name: str,
        stream_format: StreamFormat,
        extra: ExtraArguments,
    ):
        self.block = block
        self.name = name
        self.format = stream_format
        self.extra = extra

    def value(self, function: str, stream: torch.Tensor) -> torch.Tensor:
        """The increment that a function computes from a stream.

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
        return self.format.on_grid(self._increment(function, stream))

    def add(
        self, stream: torch.Tensor, function: str, given: torch.Tensor
    ) -> torch.Tensor:
        """See ``ValueEvaluator.add``."""
        return self.format.add(stream, self._increment(function, given))

    def subtract(
        self, stream: torch.Tensor, function: str, given: torch.Tensor
    ) -> torch.Tensor:
        """See ``ValueEvaluator.subtract``."""
        return self.format.subtract(stream, self._increment(function, given))

    def _increment(self, function: str, stream: torch.Tensor) -> torch.Tensor:
        """The increment as the function returns it, checked."""
        module_input = stream.to(self.format.module_dtype)
        increment = self.call(function, module_input, (stream,))
        self._check_increment(function, increment, stream)
        return increment

    def tap_value(self, function: str, *state: torch.Tensor) -> torch.Tensor:
        """The value that a tap computes from the state of the chain.

        Arguments
        ---------
        function : str
            Name of a submodule of the block.
        *state : torch.Tensor
            Both streams; or one tensor, if there is no coupling before.

        Returns
        -------
        torch.Tensor
            Any tensor.
        """
        module_input = self._tap_input(function, state)
        value = self.call(function, module_input, state)
        self._check_is_tensor(function, value, "a tap")
        return value

    def call(
        self,
        function: str,
        module_input: ModuleInput,
        state: Sequence[torch.Tensor],
    ) -> torch.Tensor:
        """Calls a submodule with its input and the extra arguments.

        Arguments
        ---------
        function : str
            Name of the submodule.
        module_input : torch.Tensor or tuple of torch.Tensor
            Its input, in the dtype of modules.
        state : tuple of torch.Tensor
            The streams from which the input was made.

        Returns
        -------
        torch.Tensor
            The result; it is not checked.

        Raises
        ------
        RuntimeError
            If the call changes the streams, the extra arguments or its
            parameters in place: the second call would get other values.
        """
        module = self.block.get_submodule(function)
        versions = _tensor_versions(module, state, self.extra)
        try:
            result = self._call(function, module, module_input)
        except RuntimeError as error:
            if "leaf Variable" not in str(error):
                raise
            changed = "its input or a parameter"
            raise self._in_place_error(function, changed) from error
        for changed, tensor, version in versions:
            if tensor._version != version:
                for name, parameter in module.named_parameters():
                    if parameter is tensor:
                        changed = f"its parameter {name}"
                raise self._in_place_error(function, changed)
        return result

    def _call(
        self, function: str, module: nn.Module, module_input: ModuleInput
    ) -> torch.Tensor:
        return self.extra.call(module, module_input)

    def _in_place_error(self, function: str, changed: str) -> RuntimeError:
        return RuntimeError(
            f"{self._full_name(function)} changes {changed} in place while it "
            f"runs, so that backward could not compute the same again. Set "
            f"inplace=False in it, or work on a copy; an Embedding with "
            f"max_norm may limit its norm after the optimizer's step instead."
        )

    def _tap_input(
        self, function: str, state: Sequence[torch.Tensor]
    ) -> ModuleInput:
        module = self.block.get_submodule(function)
        if not getattr(module, "takes_streams", False):
            return self.format.from_streams(*state)
        if len(state) == 1:
            state = self.format.to_streams(*state)
        return tuple(s.to(self.format.module_dtype) for s in state)

    def _full_name(self, function: str) -> str:
        return ".".join(part for part in (self.name, function) if part)

    def _check_is_tensor(
        self, function: str, value: object, block_kind: str
    ) -> None:
        if not isinstance(value, torch.Tensor):
            raise TypeError(
                f"{self._full_name(function)} returned "
                f"{type(value).__name__}; inside {block_kind} it must return "
                f"one tensor."
            )
        if not value.is_floating_point():
            raise TypeError(
                f"{self._full_name(function)} returned {value.dtype}; inside "
                f"{block_kind} it must return floating-point numbers."
            )

    def _check_increment(
        self, function: str, value: torch.Tensor, stream: torch.Tensor
    ) -> None:
        self._check_is_tensor(function, value, "a coupling")
        if value.shape != stream.shape:
            raise ValueError(
                f"{self._full_name(function)} changed the shape of its stream "
                f"from {tuple(stream.shape)} to {tuple(value.shape)}; inside a "
                f"coupling it must keep it (same padding, stride 1)."
            )


class RecordingEvaluator(Evaluator):
    """Evaluates without keeping a graph, and records the state of each call.

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
        # By function.
        self.recordings: dict[str, Recording] = {}

    # With gradients, though no tensor is saved and the graph is dropped at
    # once: without them some modules take a faster path, and torch.compile
    # builds other code. Both round differently from the replay.

    def _increment(self, function: str, stream: torch.Tensor) -> torch.Tensor:
        """The increment, computed as ``ReplayingEvaluator.vjp`` does."""
        with torch.enable_grad(), nothing_saved():
            stream = stream.detach().requires_grad_()
            return super()._increment(function, stream).detach()

    def tap_value(self, function: str, *state: torch.Tensor) -> torch.Tensor:
        """The tap's value, computed as in a replay."""
        with torch.enable_grad(), nothing_saved():
            leaves = [s.detach().requires_grad_() for s in state]
            return super().tap_value(function, *leaves).detach()

    def _call(
        self, function: str, module: nn.Module, module_input: ModuleInput
    ) -> torch.Tensor:
        if function in self.recordings:
            raise RuntimeError(
                f"{self._full_name(function)} is evaluated twice in one block. "
                f"Backward could not tell the two calls apart: register the "
                f"module under a second name for the second call."
            )
        with self.recorder.recording(module) as recording:
            result = super()._call(function, module, module_input)
        self.recordings[function] = recording
        return result


class ReplayingEvaluator(Evaluator):
    """Repeats the calls of a ``RecordingEvaluator``, with gradients.

    Modules work on leaves that share memory with their parameters. With the
    parameters themselves, autograd would call their hooks twice: here, and when
    the node of the block returns the gradients.

    Arguments
    ---------
    recorder : Recorder
        Of the forward pass.
    gradient_sums : GradientSums
        Of this chain.
    recordings : dict
        ``RecordingEvaluator.recordings`` of this block.
    parameters : dict
        The leaf of each parameter of the block that needs a gradient, by
        name; a shared parameter has several names.
    extra_tensors : list of torch.Tensor
        Those of the extra arguments that need a gradient.
    *args : tuple
        As Evaluator's.
    """

    def __init__(
        self,
        recorder: Recorder,
        gradient_sums: GradientSums,
        recordings: dict[str, Recording],
        parameters: dict[str, torch.Tensor],
        extra_tensors: list[torch.Tensor],
        *args: Any,
    ):
        super().__init__(*args)
        self.recorder = recorder
        self.gradient_sums = gradient_sums
        self.recordings = recordings
        self.parameters = parameters
        self.extra_tensors = extra_tensors
        # By id of the leaf, since a parameter may have several names.
        self._gradients: dict[int, torch.Tensor] = {}
        # Those of gradients that have been returned.
        self._used_storages: set[int] = set()

    def vjp(
        self, function: str, stream: torch.Tensor
    ) -> tuple[torch.Tensor, Pullback]:
        """The increment, and the pullback of its gradient.

        Arguments
        ---------
        function : str
            As in ``value``.
        stream : torch.Tensor
            As in ``value``.

        Returns
        -------
        tuple
            The increment, as ``value`` returns it; and the pullback, which
            also adds to the gradients of parameters and extra arguments.
        """
        increment, pullback = self._increment_vjp(function, stream)
        return self.format.on_grid(increment), pullback

    def subtract_vjp(
        self, stream: torch.Tensor, function: str, given: torch.Tensor
    ) -> tuple[torch.Tensor, Pullback]:
        """See ``VjpEvaluator.subtract_vjp``."""
        increment, pullback = self._increment_vjp(function, given)
        overwrite = is_unshared(stream)
        return self.format.subtract(stream, increment, overwrite), pullback

    def _increment_vjp(
        self, function: str, stream: torch.Tensor
    ) -> tuple[torch.Tensor, Pullback]:
        """The increment as the function returns it, and the pullback."""
        stream = stream.detach().requires_grad_()
        with torch.enable_grad():
            increment = self._increment(function, stream)
        # The pullback needs the graph of the increment, not its storage. It
        # releases the stream when it is called.
        held = [(_Graph.of(increment), stream)]

        def pullback(
            gradient: torch.Tensor, total: torch.Tensor | None = None
        ) -> torch.Tensor:
            graph, leaf = held.pop()
            (found,) = self._pull_back(function, graph, gradient, [leaf])
            if total is None:
                return found
            # The next function probably computes in the same precision.
            return self.gradient_sums.add(total, found, graph.dtype)

        return increment.detach(), pullback

    def tap_gradients(
        self, function: str, gradient: torch.Tensor, *state: torch.Tensor
    ) -> list[torch.Tensor]:
        """Gradients of the state, from that of a tap's value.

        Arguments
        ---------
        function : str
            As in ``tap_value``.
        gradient : torch.Tensor
            Gradient of the value.
        *state : torch.Tensor
            As in ``tap_value``.

        Returns
        -------
        list of torch.Tensor
            One gradient for each tensor of the state.
        """
        leaves = [s.detach().requires_grad_() for s in state]
        with torch.enable_grad():
            graph = _Graph.of(self.tap_value(function, *leaves))
        return self._pull_back(function, graph, gradient, leaves)

    def gradients(self) -> list[torch.Tensor | None]:
        """Gradients of the extra arguments and the parameters, in that order.

        There is one for each parameter, also if it has several names.
        """
        leaves = (*self.extra_tensors, *self.parameters.values())
        return [
            self._gradients.get(key) for key in dict.fromkeys(map(id, leaves))
        ]

    def _call(
        self, function: str, module: nn.Module, module_input: ModuleInput
    ) -> torch.Tensor:
        with self.recorder.replay(module, self.recordings[function]):
            return functional_call(
                module,
                self._parameters_of(function),
                (module_input, *self.extra.args),
                self.extra.named_for(module),
            )

    def _parameters_of(self, function: str) -> dict[str, torch.Tensor]:
        prefix = f"{function}."
        return {
            name[len(prefix) :]: parameter
            for name, parameter in self.parameters.items()
            if name.startswith(prefix)
        }

    def _pull_back(
        self,
        function: str,
        graph: "_Graph",
        gradient: torch.Tensor,
        streams: Sequence[torch.Tensor],
    ) -> list[torch.Tensor]:
        """Returns the gradients of streams; keeps those of other leaves."""
        if graph.edge is None:
            return [torch.zeros_like(s) for s in streams]
        leaves = {
            id(leaf): leaf
            for leaf in (
                *self.extra_tensors,
                *self._parameters_of(function).values(),
            )
        }
        gradients = torch.autograd.grad(
            [graph.edge],
            [*streams, *leaves.values()],
            [self.gradient_sums.converted(gradient, graph.dtype)],
            allow_unused=True,
        )
        of_streams = gradients[: len(streams)]
        self._used_storages.add(gradient.untyped_storage()._cdata)
        for key, found in zip(leaves, gradients[len(streams) :]):
            if found is not None:
                total = self._gradients.get(key)
                self._gradients[key] = (
                    self._own_storage(found) if total is None else total + found
                )
        return [
            torch.zeros_like(s) if g is None else g
            for s, g in zip(streams, of_streams)
        ]

    def _own_storage(self, gradient: torch.Tensor) -> torch.Tensor:
        """The gradient, copied if its storage is in use already.

        autograd returns one tensor for all parameters that are added up, and
        the gradient of the output itself for those added last. A parameter's
        ``grad``, however, may be changed in place at any time.
        """
        storage = gradient.untyped_storage()._cdata
        if storage in self._used_storages:
            return gradient.clone()
        self._used_storages.add(storage)
        return gradient


class _Graph(NamedTuple):
    """The graph of a value, without the value."""

    # None if no gradient is needed.
    edge: GradientEdge | None
    dtype: torch.dtype

    @classmethod
    def of(cls, value: torch.Tensor) -> "_Graph":
        edge = get_gradient_edge(value) if value.requires_grad else None
        return cls(edge, value.dtype)


def _tensor_versions(
    module: nn.Module, state: Sequence[torch.Tensor], extra: ExtraArguments
) -> list[tuple[str, torch.Tensor, int]]:
    """(name, tensor, version) of all that a call must not change in place."""
    if torch.compiler.is_compiling():
        return []
    tensors: list[tuple[str, Any]] = [("its input", x) for x in state]
    tensors += [
        (f"extra argument {i}", x)
        for i, x in enumerate(tree_leaves(tuple(extra)))
    ]
    # To find the name of each would take longer than calling a small function.
    tensors += [
        ("a parameter", p)
        for part in modules_of(module)
        for p in part._parameters.values()
    ]
    return [
        (name, x, x._version)
        for name, x in tensors
        if isinstance(x, torch.Tensor) and not x.is_inference()
    ]
