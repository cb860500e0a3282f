"""The memory of a reversible chain: autograd nodes that rebuild their inputs.

Consecutive invertible blocks make one autograd node each. The nodes save
nothing. In forward the streams travel outside the graph, in a ``ChainState``
that the nodes share, while an empty tensor, the token, passes from node to node
and fixes their order:

    input -> block -> tap -> block -> ... -> output

Only the output node saves tensors, the streams at the end. In backward it puts
them into the shared state; each node then reconstructs the streams before its
block, computes the gradients, and leaves both for the node before it. So
autograd's own loop walks back through the chain, and the gradients of a block
are ready (and on their way through DistributedDataParallel) while the next one
is computed.

``apply_invertible_blocks`` is the forward pass. The nodes follow in its order,
each with its backward pass.

Authors
 * The sb_memeff authors 2026
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import nn

from sb_memeff.nnet.replay.recorder import (
    Fingerprint,
    Recorder,
    Recording,
    check_fingerprint,
    fingerprint,
)
from sb_memeff.nnet.reversible.arguments import ExtraArguments
from sb_memeff.nnet.reversible.coupling import Invertible, Pair, Tap
from sb_memeff.nnet.reversible.evaluator import (
    RecordingEvaluator,
    ReplayingEvaluator,
)
from sb_memeff.nnet.reversible.gradient_sums import GradientSums
from sb_memeff.nnet.reversible.grid import StreamFormat
from sb_memeff.nnet.reversible.observer import Observer
from sb_memeff.nnet.reversible.tap_sum import DetachedTapSum
from sb_memeff.utils.autograd import refuse_double_backward

__all__ = ["apply_invertible_blocks"]


def apply_invertible_blocks(
    named_blocks: list[tuple[str, Invertible]],
    tensors: tuple[torch.Tensor, ...],
    joined: bool,
    stream_format: StreamFormat,
    tap_sum: DetachedTapSum,
    recorder: Recorder,
    observers: list[Observer],
    extra: ExtraArguments,
) -> tuple[torch.Tensor, ...]:
    """Applies invertible blocks and stores their last output only.

    Arguments
    ---------
    named_blocks : list of tuple
        Names and blocks.
    tensors : tuple of torch.Tensor
        Both streams, or one tensor [N, C, ...] of both.
    joined : bool
        Return one tensor in the modules' dtype instead of two streams.
    stream_format : StreamFormat
        Dtypes and grid.
    tap_sum : DetachedTapSum
        The values of taps are added to it.
    recorder : Recorder
        Of this forward pass.
    observers : list of Observer
        For this forward pass.
    extra : ExtraArguments
        For the functions inside the blocks.

    Returns
    -------
    tuple of torch.Tensor
        One tensor, or two streams.
    """
    state = ChainState(named_blocks, stream_format, recorder, observers, extra)
    extra_tensors = cast("Sequence[torch.Tensor]", state.extra_tensors)
    token = _InputNode.apply(state, *tensors)
    for block in state.blocks:
        inputs = state, block, token, *state.inputs_with_gradients(block)
        if isinstance(block.module, Tap):
            token, value = _TapNode.apply(*inputs)
            tap_sum.add(value, f"{block.name}.read")
            # Not kept until the next tap.
            del value
        else:
            token = _BlockNode.apply(*inputs)
    *outputs, tap_sum.token = _OutputNode.apply(
        state, joined, tap_sum, token, tap_sum.token, *extra_tensors
    )
    return tuple(outputs)


class _Block:
    """A block, its name and its parameters."""

    def __init__(self, name: str, module: Invertible):
        self.name = name
        self.module = module
        # By all names, since parameters may be shared.
        self.parameters: dict[str, nn.Parameter] = dict(
            module.named_parameters(remove_duplicate=False)
        )
        first_names: dict[int, str] = {}
        for parameter_name, parameter in self.parameters.items():
            first_names.setdefault(id(parameter), parameter_name)
        # One name of each parameter that needs a gradient.
        self.trainable = [
            n for n in first_names.values() if self.parameters[n].requires_grad
        ]


@dataclasses.dataclass
class _ForwardRecord:
    """State of a block in forward, which its backward pass needs."""

    block: _Block
    # Of one stream, and of each stream, before the block.
    shape: torch.Size
    strides: list[tuple[int, ...]]
    recordings: dict[str, Recording]
    fingerprint: Fingerprint

    def check(self) -> None:
        """Raises if parameters or mode of the block changed since forward."""
        check_fingerprint(
            self.fingerprint,
            self.block.module,
            "ReversibleSequence",
            f"{self.block.name}.",
        )


class ChainState:
    """State that the nodes of consecutive blocks share in one forward pass.

    Between two nodes, ``streams`` holds both streams and, in backward,
    ``gradients`` holds their gradients.

    Arguments
    ---------
    named_blocks : list of tuple
        Names and blocks.
    stream_format : StreamFormat
        Dtypes and grid.
    recorder : Recorder
        Of this forward pass.
    observers : list of Observer
        For this forward pass.
    extra : ExtraArguments
        For the functions inside the blocks.
    """

    def __init__(
        self,
        named_blocks: list[tuple[str, Invertible]],
        stream_format: StreamFormat,
        recorder: Recorder,
        observers: list[Observer],
        extra: ExtraArguments,
    ):
        self.format: StreamFormat = stream_format
        self.recorder: Recorder = recorder
        self.observers: list[Observer] = observers
        self.blocks = [_Block(name, block) for name, block in named_blocks]
        self.records: list[_ForwardRecord] = []
        self.streams: list[torch.Tensor] = []
        self.gradients: list[torch.Tensor] = []
        self.gradient_sums = GradientSums()
        # Between forward and backward the output node saves these tensors, so
        # that autograd notices changes in place.
        self.extra_tensors: Sequence[torch.Tensor] | None
        self.extra_tensors, self._with_tensors = extra.split_tensors()
        self._need_gradients = [x.requires_grad for x in self.extra_tensors]

    def inputs_with_gradients(self, block: _Block) -> list[torch.Tensor]:
        """Tensors for which a block's node returns gradients."""
        extra_tensors = cast("Sequence[torch.Tensor]", self.extra_tensors)
        return [x for x in extra_tensors if x.requires_grad] + [
            block.parameters[name] for name in block.trainable
        ]

    def record(
        self,
        block: _Block,
        function: Callable[
            [torch.Tensor, torch.Tensor, RecordingEvaluator], Any
        ],
    ) -> tuple[Any, _ForwardRecord]:
        """Evaluates a block in forward and records the state of backward.

        Arguments
        ---------
        block : _Block
            The block.
        function : callable
            (x1, x2, evaluator) to any value.

        Returns
        -------
        tuple
            The value, and the record.
        """
        extra_tensors = cast("Sequence[torch.Tensor]", self.extra_tensors)
        evaluator = RecordingEvaluator(
            self.recorder,
            block.module,
            block.name,
            self.format,
            self._with_tensors(extra_tensors),
        )
        record = _ForwardRecord(
            block,
            self.streams[0].shape,
            [x.stride() for x in self.streams],
            evaluator.recordings,
            fingerprint(block.module),
        )
        self.records.append(record)
        with self.recorder.autocast():
            return function(*cast(Pair, self.streams), evaluator), record

    def end_forward(self) -> None:
        """Leaves streams and extra arguments to the output node."""
        self.streams, self.extra_tensors = [], None

    def begin_backward(
        self,
        extra_tensors: Sequence[torch.Tensor],
        streams: list[torch.Tensor],
        gradients: list[torch.Tensor],
    ) -> None:
        """Sets the state after the last block.

        Arguments
        ---------
        extra_tensors : tuple of torch.Tensor
            Those of forward.
        streams : list of torch.Tensor
            Both streams.
        gradients : list of torch.Tensor
            Their gradients.
        """
        # Before there is any gradient. Each block checks its own state again.
        for record in self.records:
            record.check()
        for observer in self.observers:
            observer.backward_begins()
        self.extra_tensors = extra_tensors
        self.streams, self.gradients = streams, gradients

    def replaying_evaluator(self, record: _ForwardRecord) -> ReplayingEvaluator:
        """Evaluator of a block in backward.

        Arguments
        ---------
        record : _ForwardRecord
            State of the block in forward.

        Returns
        -------
        ReplayingEvaluator
            It works on leaves that share memory with the parameters and
            the extra arguments.
        """
        record.check()
        extra_tensors = [
            x.detach().requires_grad_(needed)
            for x, needed in zip(
                cast("Sequence[torch.Tensor]", self.extra_tensors),
                self._need_gradients,
            )
        ]
        block = record.block
        parameters = block.parameters
        leaves = {
            id(parameters[name]): parameters[name].detach().requires_grad_()
            for name in block.trainable
        }
        return ReplayingEvaluator(
            self.recorder,
            self.gradient_sums,
            record.recordings,
            {
                name: leaves[id(parameter)]
                for name, parameter in parameters.items()
                if id(parameter) in leaves
            },
            [x for x in extra_tensors if x.requires_grad],
            block.module,
            block.name,
            self.format,
            self._with_tensors(extra_tensors),
        )

    def end_backward(self) -> None:
        """Frees the tensors of this backward pass."""
        self.streams, self.gradients, self.extra_tensors = [], [], None
        # The last copies, which no block needs.
        self.gradient_sums = GradientSums()
        for observer in self.observers:
            observer.backward_ends()


class _InputNode(torch.autograd.Function):
    """From tensors to streams in the shared state."""

    @staticmethod
    def forward(
        ctx: Any, state: ChainState, *tensors: torch.Tensor
    ) -> torch.Tensor:
        ctx.state = state
        ctx.dtypes = [x.dtype for x in tensors]
        state.streams = state.format.to_streams(*tensors)
        names = [b.name for b in state.blocks if not isinstance(b.module, Tap)]
        for observer in state.observers:
            observer.forward_begins(names, state.streams)
        return state.streams[0].new_empty(0)

    @staticmethod
    # pyrefly: ignore[bad-override]
    def backward(
        ctx: Any, token: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        gradients = ctx.state.gradients
        ctx.state.end_backward()
        if len(ctx.dtypes) == 1:
            gradients = [ctx.state.format.join(*gradients)]
        return None, *(g.to(dtype) for g, dtype in zip(gradients, ctx.dtypes))


class _BlockNode(torch.autograd.Function):
    """An invertible block."""

    @staticmethod
    def forward(
        ctx: Any,
        state: ChainState,
        block: _Block,
        token: torch.Tensor,
        *inputs: torch.Tensor,
    ) -> torch.Tensor:
        ctx.state = state
        streams, ctx.record = state.record(block, block.module.forward_streams)
        state.streams = list(streams)
        for observer in state.observers:
            observer.block_computed(block.name, state.streams)
        return token.new_empty(0)

    @staticmethod
    # pyrefly: ignore[bad-override]
    def backward(
        ctx: Any, token: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        state, record = ctx.state, ctx.record
        evaluator = state.replaying_evaluator(record)
        # The block empties the lists, so that memory is freed on the way.
        streams, state.streams = state.streams, []
        gradients, state.gradients = state.gradients, []
        streams, gradients = record.block.module.backward_streams(
            streams, gradients, evaluator, record.shape
        )
        # The functions of the block before must get the layout of forward:
        # algorithms differ between layouts, and round differently.
        state.streams = list(map(_with_strides, streams, record.strides))
        state.gradients = list(gradients)
        del streams, gradients
        for observer in state.observers:
            observer.input_reconstructed(record.block.name, state.streams)
        if not _token_needs_gradient(ctx):
            state.end_backward()
        return None, None, token, *evaluator.gradients()


class _TapNode(torch.autograd.Function):
    """A tap. Its value is an output; the streams stay as they are."""

    @staticmethod
    def forward(
        ctx: Any,
        state: ChainState,
        block: _Block,
        token: torch.Tensor,
        *inputs: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.state = state
        ctx.set_materialize_grads(False)

        def tap_value(
            x1: torch.Tensor, x2: torch.Tensor, evaluator: RecordingEvaluator
        ) -> torch.Tensor:
            return evaluator.tap_value("read", x1, x2)

        value, ctx.record = state.record(block, tap_value)
        return token.new_empty(0), value

    @staticmethod
    # pyrefly: ignore[bad-override]
    def backward(
        ctx: Any, token: torch.Tensor, gradient: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        state = ctx.state
        input_gradients = [None] * (len(ctx.needs_input_grad) - 3)
        if gradient is not None:
            evaluator = state.replaying_evaluator(ctx.record)
            through_tap = evaluator.tap_gradients(
                "read", gradient, *state.streams
            )
            state.gradients = [
                a + b for a, b in zip(state.gradients, through_tap)
            ]
            input_gradients = evaluator.gradients()
        if not _token_needs_gradient(ctx):
            state.end_backward()
        return None, None, token, *input_gradients


class _OutputNode(torch.autograd.Function):
    """From streams in the shared state to tensors: one of both, or two.

    The token of the tap sum passes through, so that backward begins here
    whichever output was used.
    """

    @staticmethod
    def forward(
        ctx: Any,
        state: ChainState,
        joined: bool,
        tap_sum: DetachedTapSum,
        token: torch.Tensor,
        sum_token: torch.Tensor,
        *extra_tensors: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        ctx.state, ctx.tap_sum = state, tap_sum
        ctx.set_materialize_grads(False)
        streams = state.streams
        state.end_forward()
        outputs = [state.format.from_streams(*streams)] if joined else streams
        # The output will do, unless its dtype is too narrow for the streams.
        exact = outputs[0].dtype == state.format.stream_dtype
        ctx.save_for_backward(*extra_tensors, *(outputs if exact else streams))
        ctx.num_extra_tensors = len(extra_tensors)
        ctx.strides = [x.stride() for x in streams]
        return (*outputs, outputs[0].new_empty(0))

    @staticmethod
    def backward(
        ctx: Any, *gradients: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        # This is the first node in each backward pass.
        refuse_double_backward(
            "ReversibleSequence",
            "set save_memory=False, which stores activations",
        )
        state = ctx.state
        *output_gradients, sum_token = gradients
        if sum_token is None:
            # Left by an earlier backward pass that ended before all taps.
            ctx.tap_sum.gradient = None
        saved = ctx.saved_tensors
        extra_tensors = saved[: ctx.num_extra_tensors]
        # Of their own: the graph may hold the saved ones for another backward
        # pass, and blocks overwrite a stream that nobody else holds.
        outputs = [x.detach() for x in saved[ctx.num_extra_tensors :]]
        streams = list(
            outputs if len(outputs) == 2 else state.format.split(*outputs)
        )
        if len(output_gradients) == 1:
            (whole,) = output_gradients
            output_gradients = (
                [None, None] if whole is None else state.format.split(whole)
            )
        stream_gradients = [
            torch.zeros_like(s)
            if g is None
            # An alias, because blocks overwrite a gradient that has none.
            else _own_storage(g.detach().to(s.dtype))
            for g, s in zip(output_gradients, streams)
        ]
        del output_gradients
        streams = [
            _own_storage(_with_strides(s, strides))
            for s, strides in zip(streams, ctx.strides)
        ]
        state.begin_backward(extra_tensors, streams, stream_gradients)
        return (
            None,
            None,
            None,
            state.streams[0].new_empty(0),
            sum_token,
            # The nodes of the blocks return their gradients.
            *[None for _ in extra_tensors],
        )


def _token_needs_gradient(ctx: Any) -> bool:
    """Whether a node before this one takes part in backward."""
    return ctx.needs_input_grad[2]


def _with_strides(x: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
    """The tensor, copied if it has other strides."""
    if x.stride() == strides:
        return x
    return torch.empty_strided(
        x.shape, strides, dtype=x.dtype, device=x.device
    ).copy_(x)


def _own_storage(x: torch.Tensor) -> torch.Tensor:
    """The tensor, copied if it would keep a larger storage alive."""
    if x.untyped_storage().nbytes() > x.numel() * x.element_size():
        return x.clone()
    return x
