"""A chain of blocks that stores (almost) nothing for backward.

Authors
 * The sb_memeff authors 2026
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import nn

from sb_memeff.nnet.recompute.segment import Segment
from sb_memeff.nnet.replay.recorder import Recorder, without_trace
from sb_memeff.nnet.reversible.coupling import (
    Invertible,
    Pair,
    SpaceToDepth,
    Tap,
)
from sb_memeff.nnet.reversible.evaluator import Evaluator
from sb_memeff.nnet.reversible.grid import StreamFormat
from sb_memeff.nnet.reversible.guards import StreamGuard
from sb_memeff.nnet.reversible.walk import (
    Observer,
    TapSum,
    TapSumBesideGraph,
    run_without_storing,
)
from sb_memeff.ops.dispatch import has_values

__all__ = ["ReversibleSequence"]


class ReversibleSequence(nn.Module):
    """Runs a chain of blocks and stores (almost) nothing for backward.

    Invertible blocks (``AdditiveCoupling``, ``SpaceToDepth``) are undone in
    backward. Any other module may stand in the chain too (a stem, a strided
    transition, a pooling): its input is stored and its output recomputed, so
    it costs one stored tensor and one extra forward. A ``Tap`` reads from the
    state where it stands, and the sum of what all taps read is a second
    output; nothing is stored for it. Values, gradients, running statistics and
    random numbers are those of the chain that stores everything.

    Arguments
    ---------
    blocks : iterable of torch.nn.Module
        The chain. A module that is not Invertible takes and returns a tensor
        [N, C, ...], or two streams if it has the attribute
        ``takes_streams = True``.
    save_memory : bool
        False computes the same function with the same weights by plain
        autograd: the reference, and the form to export. May be changed at
        any time.
    exact : bool
        Keep float32 streams on a grid of 2**-grid_bits, which makes the
        inverse bit-exact whatever the precision inside the blocks (module
        docstring). float16 and bfloat16 inputs are carried in a float32
        stream. A float64 stream is left as it is.
    grid_bits : int
        Finer grids leave less room: values must stay below
        2**(24 - grid_bits).
    axis : int
        The dimension that the two streams share: 1 for [N, C, ...], -1 or 2
        for sequences [N, T, C], whose layers work on the last one.

    Raises
    ------
    ValueError
        If there are no blocks, grid_bits is not in 1...23, axis is that of
        the batch, or a block moves space into another axis.

    Example
    -------
    >>> from sb_memeff.nnet.reversible import AdditiveCoupling
    >>> def body():
    ...     return torch.nn.Sequential(
    ...         torch.nn.Conv1d(4, 4, 3, padding=1),
    ...         torch.nn.BatchNorm1d(4),
    ...         torch.nn.ReLU(),
    ...     )
    >>> net = ReversibleSequence(
    ...     [AdditiveCoupling(body(), body()) for _ in range(3)]
    ... )
    >>> x = torch.rand(2, 8, 20)
    >>> y = net(x)
    >>> y.sum().backward()
    >>> net.eval().inverse(net(x)).shape
    torch.Size([2, 8, 20])
    """

    def __init__(
        self,
        blocks: Iterable[nn.Module],
        save_memory: bool = True,
        exact: bool = True,
        grid_bits: int = 12,
        axis: int = 1,
    ):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        if len(self.blocks) == 0:
            raise ValueError("ReversibleSequence: there are no blocks.")
        if not 1 <= grid_bits <= 23:
            raise ValueError(
                f"ReversibleSequence: grid_bits must lie in 1...23, "
                f"got {grid_bits}."
            )
        if axis == 0:
            raise ValueError(
                "ReversibleSequence: axis=0 is the batch; name that of the "
                "channels."
            )
        if axis != 1 and any(isinstance(b, SpaceToDepth) for b in self.blocks):
            raise ValueError(
                f"ReversibleSequence: SpaceToDepth moves space into dimension "
                f"1, so axis must be 1, not {axis}."
            )
        self.save_memory = save_memory
        self.exact = exact
        self.grid_bits = grid_bits
        self.axis = axis
        # Called without arguments, each makes an Observer of one forward pass.
        self._observers = []

    def extra_repr(self) -> str:
        """Text that print(module) shows."""
        return (
            f"save_memory={self.save_memory}, exact={self.exact}, "
            f"grid_bits={self.grid_bits}, axis={self.axis}"
        )

    def forward(
        self, x: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Runs the chain.

        Arguments
        ---------
        x : torch.Tensor
            [N, C, ...], or C at axis; even where the first block is
            invertible.
        *args : tuple
            Extra arguments (lengths, masks) for every f, g and module.
        **kwargs : dict
            The same, by name.

        Returns
        -------
        torch.Tensor or tuple of torch.Tensor
            What the last block returns; both streams joined, if it is
            invertible. Under autocast the streams are float32. With taps in
            the chain a pair: that, and the sum of what they read, in the
            dtype in which they read.

        Raises
        ------
        ValueError
            For an odd number of channels, or if f or g changes the shape.
        TypeError
            If x is not a floating-point tensor.
        RuntimeError
            In backward: if the stream left the grid; if weights or the
            training mode changed since forward; for double backward.
        """
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            kind = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
            raise TypeError(
                f"ReversibleSequence: x must be a floating-point tensor, "
                f"got {kind}."
            )
        if self.save_memory and torch.is_grad_enabled():
            return self._forward_reversible(x, args, kwargs)
        return self._forward_stored(x, args, kwargs)

    def inverse(
        self,
        y: torch.Tensor,
        *args: Any,
        input_shape: tuple[int, ...] | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Computes the input back from the output, without gradients.

        Batch norms in training mode use the statistics of the batch and count
        nothing. Modules that draw random numbers cannot be undone in training
        mode.

        Arguments
        ---------
        y : torch.Tensor
            An output of ``forward``; of a pair, the first.
        *args : tuple
            The extra arguments of that call.
        input_shape : tuple of int, optional
            Shape of the input. Needed only where down-sampling padded an odd
            size.
        **kwargs : dict
            The extra arguments by name.

        Returns
        -------
        torch.Tensor
            The input.

        Raises
        ------
        ValueError
            If a block of the chain cannot be inverted.
        RuntimeError
            If a block drew random numbers.
        """
        for name, block in self.blocks.named_children():
            if not isinstance(block, Invertible):
                raise ValueError(
                    f"ReversibleSequence.inverse: blocks.{name} "
                    f"({type(block).__name__}) is not invertible."
                )
        with torch.no_grad(), without_trace(self):
            stream_format = self._format(y)
            y1, y2 = stream_format.split(y.to(stream_format.stream_dtype))
            shapes = self._stream_shapes(y1.shape, input_shape)
            recorder = Recorder(y.device)
            for (name, block), shape in zip(
                reversed(self._named_blocks()), reversed(shapes)
            ):
                evaluator = Evaluator(block, name, stream_format, args, kwargs)
                (y1, y2), recording = recorder.record(
                    cast(Invertible, block).inverse_streams,
                    y1,
                    y2,
                    evaluator,
                    shape,
                )
                if recording.random_states:
                    raise RuntimeError(
                        f"ReversibleSequence.inverse: {name} drew random "
                        f"numbers (dropout in training mode?), which cannot "
                        f"be drawn again from the output alone; call eval() "
                        f"first."
                    )
            return stream_format.leave(y1, y2)

    def _stream_shapes(
        self, last: tuple[int, ...], input_shape: tuple[int, ...] | None
    ) -> list[torch.Size]:
        # The shape of a stream before each block.
        blocks = cast(Sequence[Invertible], self.blocks)
        if input_shape is None:
            shape = last
            for block in reversed(blocks):
                shape = block.stream_shape_before(shape)
        else:
            shape = self._with_channels(input_shape, lambda c: c // 2)
        shapes = []
        for block in blocks:
            shapes.append(torch.Size(shape))
            shape = block.stream_shape(shape)
        if tuple(shape) != tuple(last):
            first = self._with_channels(shapes[0], lambda c: 2 * c)
            given = first if input_shape is None else input_shape
            raise ValueError(
                f"ReversibleSequence.inverse: an input of shape "
                f"{tuple(given)} gives streams of {tuple(shape)}, the "
                f"output holds streams of {tuple(last)}."
            )
        return shapes

    def _with_channels(
        self, shape: tuple[int, ...], change: Callable[[int], int]
    ) -> tuple[int, ...]:
        sizes = list(shape)
        sizes[self.axis] = change(sizes[self.axis])
        return tuple(sizes)

    def _named_blocks(self) -> list[tuple[str, nn.Module]]:
        return [
            (f"blocks.{name}", block)
            for name, block in self.blocks.named_children()
        ]

    def _format(self, x: torch.Tensor) -> StreamFormat:
        # Autocast picks the precision inside f by itself; without it, the
        # modules expect what they were called with.
        inner = x.dtype
        if torch.is_autocast_enabled(x.device.type):
            inner = torch.promote_types(x.dtype, torch.float32)
        stream = torch.promote_types(inner, torch.float32)
        exact = self.exact and stream == torch.float32
        return StreamFormat(inner, self.grid_bits if exact else None, self.axis)

    def _forward_stored(
        self, x: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        stream_format = self._format(x)
        total = TapSum(stream_format)
        state: Sequence[torch.Tensor] = (x,)
        for name, block in self._named_blocks():
            evaluator = Evaluator(block, name, stream_format, args, kwargs)
            if isinstance(block, Tap):
                total.add(evaluator.read("read", *state), f"{name}.read")
            elif isinstance(block, Invertible):
                if len(state) == 1:
                    state = stream_format.enter(*state)
                state = block.forward_streams(*cast(Pair, state), evaluator)
            else:
                state = _call(block, stream_format, args, kwargs, *state)
        output = stream_format.leave(*state)
        return output if total.value is None else (output, total.result())

    # In a compiled network the chain runs as it is: a compiler would build
    # other code for the replay, which rounds differently.
    @functools.partial(
        torch.compiler.disable,
        reason="a reversible chain is not compiled; save_memory=False, which "
        "stores its activations, can be",
    )
    def _forward_reversible(
        self, x: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        stream_format = self._format(x)
        # Fake tensors draw no random numbers and hold no values to look at.
        real = has_values(x)
        recorder = Recorder(x.device, follow_random=real)
        observers = [make() for make in self._observers]
        guarded = self.exact or stream_format.stream_dtype == torch.float64
        if real and guarded:
            # Whoever observes has asked for the differences.
            guard = StreamGuard(stream_format.bits, compare=not observers)
            observers.append(guard)
        total = TapSumBesideGraph(stream_format, x.device)
        try:
            state = self._run_blocks(
                (x,), stream_format, total, recorder, observers, args, kwargs
            )
            output = stream_format.leave(*state)
            return output if total.value is None else (output, total.result())
        finally:
            total.release()

    def _run_blocks(
        self,
        state: tuple[torch.Tensor, ...],
        stream_format: StreamFormat,
        total: TapSumBesideGraph,
        recorder: Recorder,
        observers: list[Observer],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[torch.Tensor, ...]:
        """The state after all blocks; what taps read is added to total."""
        blocks = self._named_blocks()
        while blocks:
            run = _leading_run(blocks, state)
            if run:
                del blocks[: len(run)]
                state = run_without_storing(
                    run,
                    state,
                    not blocks,
                    stream_format,
                    total,
                    recorder,
                    observers,
                    args,
                    kwargs,
                )
                continue
            name, block = blocks.pop(0)
            if isinstance(block, Tap):
                value = Segment().call(
                    name,
                    block,
                    _read,
                    (block, name, stream_format, args, kwargs, *state),
                    {},
                )
                total.add(value, f"{name}.read")
            else:
                state = Segment().call(
                    name,
                    block,
                    _call,
                    (block, stream_format, args, kwargs, *state),
                    {},
                )
        return state


def _leading_run(
    blocks: list[tuple[str, nn.Module]], state: tuple[torch.Tensor, ...]
) -> list[tuple[str, Invertible]]:
    """The invertible blocks at the head of what is left of the chain."""
    run = []
    for name, block in blocks:
        if not isinstance(block, Invertible):
            break
        if not run and len(state) == 1 and isinstance(block, Tap):
            # It reads a tensor that need not have two halves.
            break
        run.append((name, block))
    return run


def _read(
    block: nn.Module,
    name: str,
    stream_format: StreamFormat,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *state: torch.Tensor,
) -> torch.Tensor:
    """Value that a tap reads."""
    evaluator = Evaluator(block, name, stream_format, args, kwargs)
    return evaluator.read("read", *state)


def _call(
    block: nn.Module,
    stream_format: StreamFormat,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *state: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """The state after a block that is not invertible."""
    if getattr(block, "takes_streams", False):
        if len(state) == 1:
            state = cast(Pair, stream_format.enter(*state))
        given = tuple(s.to(stream_format.inner_dtype) for s in state)
    else:
        given = stream_format.leave(*state)
    result = block(given, *args, **kwargs)
    if isinstance(result, torch.Tensor):
        return (result,)
    return tuple(stream_format.enter(*result))
