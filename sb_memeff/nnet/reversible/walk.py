"""The memory of a reversible chain: autograd nodes that rebuild their inputs.

A run of invertible blocks makes one autograd node for each block. The nodes
save nothing. In forward the streams travel beside the graph, in a ``Walk``
that the nodes share, while an empty token passes from node to node and fixes
their order. The last node saves the output of the run. In backward it puts the
output into the walk, and each node rebuilds the streams before its block, forms
the gradients, and leaves both for the node before it. Autograd's own loop walks
back through the chain, and the gradients of each block are ready (and on their
way through DistributedDataParallel) while the next one is computed.

Authors
 * The sb_memeff authors 2026
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from sb_memeff.nnet.replay.recorder import (
    Fingerprint,
    Recorder,
    Recording,
    check_fingerprint,
    fingerprint,
)
from sb_memeff.nnet.reversible.coupling import Invertible, Pair, Tap
from sb_memeff.nnet.reversible.evaluator import (
    RecordingEvaluator,
    ReplayingEvaluator,
)
from sb_memeff.nnet.reversible.grid import StreamFormat

__all__ = ["Observer", "run_without_storing"]


class Observer:
    """Sees the streams of one forward pass and of its backward passes."""

    def entered(self, names: list[str], streams: list[torch.Tensor]) -> None:
        """Called in forward before the first block; names lists all blocks."""

    def computed(self, name: str, streams: list[torch.Tensor]) -> None:
        """Called in forward after each block."""

    def backward_begins(self) -> None:
        """Called before the first block is undone; may raise an error."""

    def rebuilt(self, name: str, streams: list[torch.Tensor]) -> None:
        """Called in backward with the streams before each block."""

    def backward_ends(self) -> None:
        """Called after the last block that had to be undone."""


@dataclasses.dataclass
class _Step:
    """One block of a run and what its node needs in backward."""

    name: str
    block: Invertible
    # By all their names, and the first name of each that needs a gradient.
    parameters: dict[str, nn.Parameter]
    weights: list[str]
    shape: torch.Size | None = None
    strides: list[tuple[int, ...]] = dataclasses.field(default_factory=list)
    recordings: dict[str, Recording] = dataclasses.field(default_factory=dict)
    fingerprint: Fingerprint = ([], [], frozenset())


def _step(name: str, block: Invertible) -> _Step:
    parameters = dict(block.named_parameters(remove_duplicate=False))
    first = {id(p): n for n, p in reversed(parameters.items())}
    return _Step(
        name,
        block,
        parameters,
        [
            n
            for n, p in parameters.items()
            if p.requires_grad and first[id(p)] == n
        ],
    )


class Walk:
    """State shared by the nodes of one run in one forward pass.

    Arguments
    ---------
    blocks : list of tuple
        Names and blocks.
    stream_format : StreamFormat
        Dtypes and grid.
    recorder : Recorder
        Of this forward pass.
    observers : list of Observer
        For this forward pass.
    args : tuple
        Extra arguments of the functions inside the blocks.
    kwargs : dict
        The same, by name.
    """

    def __init__(
        self,
        blocks: list[tuple[str, Invertible]],
        stream_format: StreamFormat,
        recorder: Recorder,
        observers: list[Observer],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ):
        self.format: StreamFormat = stream_format
        self.recorder: Recorder = recorder
        self.observers: list[Observer] = observers
        self.steps = [_step(name, block) for name, block in blocks]
        flat, self._structure = tree_flatten((args, kwargs))
        self.extras: Sequence[torch.Tensor] | None = [
            x for x in flat if isinstance(x, torch.Tensor)
        ]
        # Tensors are saved by the last node, as autograd saves them.
        self._others: list[Any] = [
            None if isinstance(x, torch.Tensor) else x for x in flat
        ]
        self._places = [
            i for i, x in enumerate(flat) if isinstance(x, torch.Tensor)
        ]
        self._wanted = [i for i, x in enumerate(self.extras) if x.requires_grad]
        self.streams: list[torch.Tensor] = []
        self.gradients: list[torch.Tensor] = []

    def tensors(self, step: _Step) -> list[torch.Tensor]:
        """Tensors for which a block's node returns gradients."""
        extras = cast(Sequence[torch.Tensor], self.extras)
        return [extras[i] for i in self._wanted] + [
            step.parameters[name] for name in step.weights
        ]

    def forget_extras(self) -> None:
        """Leaves them to autograd, see ``begin_backward``."""
        self.extras = None

    def begin_backward(
        self,
        extras: Sequence[torch.Tensor],
        streams: list[torch.Tensor],
        gradients: list[torch.Tensor],
    ) -> None:
        """Starts from the end of the run."""
        # Before any gradient is formed; each block looks again at its own.
        for step in self.steps:
            self.check(step)
        for observer in self.observers:
            observer.backward_begins()
        self.extras = extras
        self.streams, self.gradients = streams, gradients

    def end_backward(self) -> None:
        """Frees what only this backward pass needed."""
        self.streams, self.gradients, self.extras = [], [], None
        for observer in self.observers:
            observer.backward_ends()

    @staticmethod
    def check(step: _Step) -> None:
        """Raises if weights or mode of a block changed since forward."""
        check_fingerprint(
            step.fingerprint, step.block, "ReversibleSequence", f"{step.name}."
        )

    def evaluator(self, step: _Step) -> ReplayingEvaluator:
        """For a block, in backward."""
        self.check(step)
        flat = list(self._others)
        extras = cast(Sequence[torch.Tensor], self.extras)
        for number, (place, x) in enumerate(zip(self._places, extras)):
            needs_gradient = number in self._wanted
            flat[place] = x.detach().requires_grad_(needs_gradient)
        parameters = step.parameters
        leaves = {
            id(parameters[name]): parameters[name].detach().requires_grad_()
            for name in step.weights
        }
        return ReplayingEvaluator(
            self.recorder,
            step.recordings,
            {
                name: leaves[id(parameter)]
                for name, parameter in parameters.items()
                if id(parameter) in leaves
            },
            [flat[self._places[i]] for i in self._wanted],
            step.block,
            step.name,
            self.format,
            *tree_unflatten(flat, self._structure),
        )

    def record(
        self,
        step: _Step,
        function: Callable[
            [torch.Tensor, torch.Tensor, RecordingEvaluator], Any
        ],
    ) -> Any:
        """Runs a block in forward and records what its node needs."""
        evaluator = RecordingEvaluator(
            self.recorder,
            step.block,
            step.name,
            self.format,
            *tree_unflatten(self._flat(), self._structure),
        )
        step.fingerprint = fingerprint(step.block)
        step.shape = self.streams[0].shape
        step.strides = [x.stride() for x in self.streams]
        step.recordings = evaluator.recordings
        with self.recorder.autocast():
            return function(*cast(Pair, self.streams), evaluator)

    def _flat(self) -> list[Any]:
        flat = list(self._others)
        for place, x in zip(
            self._places, cast(Sequence[torch.Tensor], self.extras)
        ):
            flat[place] = x
        return flat


class _Enter(torch.autograd.Function):
    """From tensors to streams in the walk."""

    @staticmethod
    def forward(ctx: Any, walk: Walk, *tensors: torch.Tensor) -> torch.Tensor:
        ctx.walk = walk
        ctx.dtypes = [x.dtype for x in tensors]
        walk.streams = walk.format.enter(*tensors)
        names = [s.name for s in walk.steps if not isinstance(s.block, Tap)]
        for observer in walk.observers:
            observer.entered(names, walk.streams)
        return walk.streams[0].new_empty(0)

    @staticmethod
    # pyrefly: ignore[bad-override]
    def backward(
        ctx: Any, token: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        gradients = ctx.walk.gradients
        ctx.walk.end_backward()
        if len(ctx.dtypes) == 1:
            gradients = [ctx.walk.format.join(*gradients)]
        return None, *(
            g.to(dtype) for g, dtype in zip(gradients, ctx.dtypes, strict=True)
        )


class _Undo(torch.autograd.Function):
    """An invertible block."""

    @staticmethod
    def forward(
        ctx: Any,
        walk: Walk,
        step: _Step,
        token: torch.Tensor,
        *tensors: torch.Tensor,
    ) -> torch.Tensor:
        ctx.walk, ctx.step = walk, step
        walk.streams = list(walk.record(step, step.block.forward_streams))
        for observer in walk.observers:
            observer.computed(step.name, walk.streams)
        return token.new_empty(0)

    @staticmethod
    # pyrefly: ignore[bad-override]
    def backward(
        ctx: Any, token: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        walk, step = ctx.walk, ctx.step
        evaluator = walk.evaluator(step)
        # The block empties the lists, so that memory is freed on the way.
        streams, walk.streams = walk.streams, []
        gradients, walk.gradients = walk.gradients, []
        streams, gradients = step.block.backward_streams(
            streams, gradients, evaluator, step.shape
        )
        # The functions of the block before must see the layout of forward:
        # algorithms differ between layouts, and round differently.
        walk.streams = list(map(_laid_out, streams, step.strides))
        walk.gradients = list(gradients)
        del streams, gradients
        for observer in walk.observers:
            observer.rebuilt(step.name, walk.streams)
        if not ctx.needs_input_grad[2]:
            walk.end_backward()
        return None, None, token, *evaluator.gradients()


class _Read(torch.autograd.Function):
    """A tap: what it reads is an output, the streams pass."""

    @staticmethod
    def forward(
        ctx: Any,
        walk: Walk,
        step: _Step,
        token: torch.Tensor,
        *tensors: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.walk, ctx.step = walk, step
        ctx.set_materialize_grads(False)

        def read(
            x1: torch.Tensor, x2: torch.Tensor, evaluator: RecordingEvaluator
        ) -> torch.Tensor:
            return evaluator.read("read", x1, x2)

        return token.new_empty(0), walk.record(step, read)

    @staticmethod
    # pyrefly: ignore[bad-override]
    def backward(
        ctx: Any, token: torch.Tensor, gradient: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        walk, step = ctx.walk, ctx.step
        found = [None] * (len(ctx.needs_input_grad) - 3)
        if gradient is not None:
            evaluator = walk.evaluator(step)
            more = evaluator.read_gradient("read", gradient, *walk.streams)
            walk.gradients = [
                a + b for a, b in zip(walk.gradients, more, strict=True)
            ]
            found = evaluator.gradients()
        if not ctx.needs_input_grad[2]:
            walk.end_backward()
        return None, None, token, *found


class _Leave(torch.autograd.Function):
    """From the walk to tensors: one of both streams, or two.

    A sum of what taps have read passes through, so that backward begins here
    whichever output was used.
    """

    @staticmethod
    def forward(
        ctx: Any,
        walk: Walk,
        as_one: bool,
        total: TapSumBesideGraph,
        token: torch.Tensor,
        sum_token: torch.Tensor,
        *extras: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        ctx.walk, ctx.total = walk, total
        ctx.set_materialize_grads(False)
        streams, walk.streams = walk.streams, []
        outputs = [walk.format.leave(*streams)] if as_one else streams
        # The output serves, unless its dtype has lost the exact stream.
        exact = outputs[0].dtype == walk.format.stream_dtype
        ctx.save_for_backward(*extras, *(outputs if exact else streams))
        ctx.extras = len(extras)
        ctx.strides = [x.stride() for x in streams]
        walk.forget_extras()
        return (*outputs, outputs[0].new_empty(0))

    @staticmethod
    def backward(
        ctx: Any, *gradients: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        # Here alone: each backward pass of a run begins here.
        _refuse_double_backward()
        walk = ctx.walk
        *given, sum_token = gradients
        if sum_token is None:
            # Of a backward pass before, that ended early.
            ctx.total.gradient = None
        saved = ctx.saved_tensors
        extras, saved = saved[: ctx.extras], saved[ctx.extras :]
        streams = list(saved if len(saved) == 2 else walk.format.split(*saved))
        if len(given) == 1:
            whole = given[0]
            given = [None, None] if whole is None else walk.format.split(whole)
        of_streams = [
            torch.zeros_like(s) if g is None else _alone(g.to(s.dtype))
            for g, s in zip(given, streams, strict=True)
        ]
        del given
        streams = [
            _alone(_laid_out(s, stride))
            for s, stride in zip(streams, ctx.strides, strict=True)
        ]
        walk.begin_backward(extras, streams, of_streams)
        return (
            None,
            None,
            None,
            walk.streams[0].new_empty(0),
            sum_token,
            *[None for _ in extras],
        )


def run_without_storing(
    blocks: list[tuple[str, Invertible]],
    tensors: tuple[torch.Tensor, ...],
    as_one: bool,
    stream_format: StreamFormat,
    total: TapSumBesideGraph,
    recorder: Recorder,
    observers: list[Observer],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[torch.Tensor, ...]:
    """Runs invertible blocks and stores their last output only.

    Arguments
    ---------
    blocks : list of tuple
        Names and blocks.
    tensors : tuple of torch.Tensor
        Both streams, or one tensor [N, C, ...] of both.
    as_one : bool
        Return one tensor in inner_dtype instead of two streams.
    stream_format : StreamFormat
        Dtypes and grid.
    total : TapSumBesideGraph
        What taps read is added to it.
    recorder : Recorder
        Of this forward pass.
    observers : list of Observer
        For this forward pass.
    args : tuple
        Extra arguments of the functions inside the blocks.
    kwargs : dict
        The same, by name.

    Returns
    -------
    tuple of torch.Tensor
        One tensor, or two streams.
    """
    walk = Walk(blocks, stream_format, recorder, observers, args, kwargs)
    extras = cast(Sequence[torch.Tensor], walk.extras)
    token = _Enter.apply(walk, *tensors)
    for step in walk.steps:
        node = _Read if isinstance(step.block, Tap) else _Undo
        token = node.apply(walk, step, token, *walk.tensors(step))
        if node is _Read:
            token, value = token
            total.add(value, f"{step.name}.read")
    *outputs, total.token = _Leave.apply(
        walk, as_one, total, token, total.token, *extras
    )
    return tuple(outputs)


class TapSum:
    """Sum of what the taps of a chain read, in the dtype of its streams.

    Arguments
    ---------
    stream_format : StreamFormat
        Dtypes.
    """

    def __init__(self, stream_format: StreamFormat):
        self.format = stream_format
        self.value: torch.Tensor | None = None
        self.dtype: torch.dtype | None = None

    def add(self, value: torch.Tensor, name: str) -> None:
        """Adds one more; name is the module's, for errors."""
        if self.value is not None and value.shape != self.value.shape:
            raise ValueError(
                f"{name} reads a tensor of shape {tuple(value.shape)}; the "
                f"taps before it gave {tuple(self.value.shape)}. All are added "
                f"up and must have the same shape."
            )
        self._add(value)

    def _add(self, value: torch.Tensor) -> None:
        if self.value is None:
            self.dtype = value.dtype
            # A copy: what is added to from here on has no other owner.
            self.value = value.to(self.format.stream_dtype, copy=True)
        else:
            self.value = self.value.add_(value)

    def result(self) -> torch.Tensor:
        """The sum in the dtype that the first tap read."""
        return cast(torch.Tensor, self.value).to(self.dtype)


class TapSumBesideGraph(TapSum):
    """The sum beside autograd's graph.

    All taps have one gradient, that of the result: it is held once, in the
    dtype of the result. An empty token fixes the order of the nodes.

    Arguments
    ---------
    stream_format : StreamFormat
        Dtypes.
    device : torch.device
        Where the chain computes.
    """

    def __init__(self, stream_format: StreamFormat, device: torch.device):
        super().__init__(stream_format)
        # autograd refuses a gradient on another device, even an empty one.
        self.token: torch.Tensor | None = torch.empty(0, device=device)
        self.gradient: torch.Tensor | None = None

    def _add(self, value: torch.Tensor) -> None:
        self.token = _AddToSum.apply(self, self.token, value)

    def result(self) -> torch.Tensor:
        """See TapSum; call it once."""
        return _ReadSum.apply(self, self.token)

    def release(self) -> None:
        """Ends forward, or gives it up.

        The nodes of the taps hold this object. If a token went on holding
        them, Python could free neither.
        """
        self.token = None


class _AddToSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        total: TapSumBesideGraph,
        token: torch.Tensor,
        value: torch.Tensor,
    ) -> torch.Tensor:
        ctx.total, ctx.dtype = total, value.dtype
        ctx.first = total.value is None
        TapSum._add(total, value)
        return token.new_empty(0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    # pyrefly: ignore[bad-override]
    def backward(
        ctx: Any, token: torch.Tensor
    ) -> tuple[None, torch.Tensor, torch.Tensor | None]:
        gradient = ctx.total.gradient
        if ctx.first:
            ctx.total.gradient = None
        if gradient is not None:
            gradient = gradient.to(ctx.dtype)
        # None where only the other output of the chain was used.
        return None, token, gradient


class _ReadSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, total: TapSumBesideGraph, token: torch.Tensor
    ) -> torch.Tensor:
        ctx.total = total
        value, total.value = cast(torch.Tensor, total.value), None
        return value.to(total.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, torch.Tensor]:
        ctx.total.gradient = gradient
        return None, gradient.new_empty(0)


def _laid_out(x: torch.Tensor, stride: tuple[int, ...]) -> torch.Tensor:
    """A tensor with these strides."""
    if x.stride() == stride:
        return x
    return torch.empty_strided(
        x.shape, stride, dtype=x.dtype, device=x.device
    ).copy_(x)


def _alone(x: torch.Tensor) -> torch.Tensor:
    """A tensor whose storage holds nothing else that would live as long."""
    if x.untyped_storage().nbytes() > x.numel() * x.element_size():
        return x.clone()
    return x


def _refuse_double_backward() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "ReversibleSequence: double backward (create_graph=True) is not "
            "supported while saving memory; set save_memory=False."
        )
