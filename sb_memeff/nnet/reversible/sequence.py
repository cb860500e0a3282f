"""A chain of blocks that stores (almost) nothing for backward.

Authors
 * The sb_memeff authors 2026
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import nn

from sb_memeff.nnet.recompute.segment import Segment
from sb_memeff.nnet.replay.recorder import Recorder, without_trace
from sb_memeff.nnet.reversible.arguments import ExtraArguments
from sb_memeff.nnet.reversible.coupling import Invertible, Pair, Tap
from sb_memeff.nnet.reversible.evaluator import Evaluator
from sb_memeff.nnet.reversible.grid import StreamFormat
from sb_memeff.nnet.reversible.guards import StreamGuard
from sb_memeff.nnet.reversible.nodes import apply_invertible_blocks
from sb_memeff.nnet.reversible.observer import Observer
from sb_memeff.nnet.reversible.space_to_depth import SpaceToDepth
from sb_memeff.nnet.reversible.tap_sum import DetachedTapSum, TapSum
from sb_memeff.ops.dispatch import has_values
from sb_memeff.utils.settings import check_integer, check_switches
from sb_memeff.utils.sharding import check_gathered

__all__ = ["ReversibleSequence"]


class ReversibleSequence(nn.Module):
    """A chain of blocks that stores (almost) nothing for backward.

    Invertible blocks (``AdditiveCoupling``, ``SpaceToDepth``) are inverted in
    backward. Any other module may be part of the chain too (a stem, a strided
    transition, a pooling): its input is stored and the module is recomputed,
    which costs one stored tensor and one extra forward. A ``Tap`` computes a
    value from the state at its position, and the sum of these values is a
    second output; nothing is stored for it. Values, gradients, running
    statistics and random numbers are those of a chain that stores everything.

    Extra arguments reach every f, g and module. A module may declare those that
    it takes, for example ``takes_arguments = ("lengths",)``; of the arguments
    that are passed by name it then gets only these.

    Arguments
    ---------
    blocks : iterable of torch.nn.Module
        The chain. A module that is not Invertible takes and returns a tensor
        [N, C, ...], or two streams if it has the attribute
        ``takes_streams = True``.
    save_memory : bool
        False computes the same function with the same weights by plain
        autograd: the reference, and the form to export. It may be changed at
        any time.
    exact : bool
        Keep float32 streams on a grid of 2**-grid_bits, which makes the
        inverse bit-exact whatever the precision inside the blocks (see
        ``sb_memeff.nnet.reversible``). float16 and bfloat16 inputs become
        float32 streams. A float64 stream has no grid.
    grid_bits : int
        The finer the grid, the smaller its range: values must stay below
        2**(24 - grid_bits).
    axis : int
        The dimension that is split into two streams: 1 for [N, C, ...], -1
        or 2 for sequences [N, T, C], whose layers work on the last one.

    Raises
    ------
    TypeError
        If save_memory or exact is neither True nor False.
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
        check_switches(save_memory=save_memory, exact=exact)
        self.blocks = nn.ModuleList(_checked_blocks(blocks))
        if len(self.blocks) == 0:
            raise ValueError("ReversibleSequence: there are no blocks.")
        check_integer("grid_bits", grid_bits, 1, 23)
        check_integer("axis", axis, -8, 8)
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
        # Each, called without arguments, returns an Observer of one forward
        # pass.
        self._observer_factories: list[Callable[[], Observer]] = []

    def extra_repr(self) -> str:
        """Text that print(module) shows."""
        return (
            f"save_memory={self.save_memory}, exact={self.exact}, "
            f"grid_bits={self.grid_bits}, axis={self.axis}"
        )

    def forward(
        self, x: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Applies the chain.

        Arguments
        ---------
        x : torch.Tensor
            [N, C, ...], or with C at axis; C is even if the first block is
            invertible.
        *args : tuple
            Extra arguments (lengths, masks) for every f, g and module.
        **kwargs : dict
            Extra arguments by name.

        Returns
        -------
        torch.Tensor or tuple of torch.Tensor
            The output of the last block; both streams joined, if it is
            invertible. Under autocast the streams are float32. If the chain
            has taps, a pair: this output, and the sum of the taps' values in
            their dtype.

        Raises
        ------
        ValueError
            For an odd number of channels, or if f or g changes the shape.
        TypeError
            If x is not a floating-point tensor, or if no function takes an
            argument.
        RuntimeError
            If functions are sharded one by one by fully_shard.
            In backward: if the stream left the grid; if weights or the
            training mode changed since forward; for double backward.
        """
        if not _is_state(x):
            raise TypeError(
                f"ReversibleSequence: x must be a floating-point tensor, "
                f"got {_kind(x)}."
            )
        extra = ExtraArguments(args, kwargs)
        extra.check(self._functions())
        if self.save_memory and torch.is_grad_enabled():
            return self._forward_reversible(x, extra)
        return self._forward_stored(x, extra)

    def inverse(
        self,
        y: torch.Tensor,
        *args: Any,
        input_shape: tuple[int, ...] | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Reconstructs the input from the output, without gradients.

        Batch norms in training mode use the statistics of the batch and do not
        update their running statistics. Modules that draw random numbers cannot
        be inverted in training mode.

        Arguments
        ---------
        y : torch.Tensor
            An output of ``forward``; the first of a pair.
        *args : tuple
            The extra arguments of that call.
        input_shape : tuple of int, optional
            Shape of the input; needed only if down-sampling padded an odd
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
        extra = ExtraArguments(args, kwargs)
        extra.check(self._functions())
        with torch.no_grad(), without_trace(self):
            stream_format = self._stream_format(y)
            y1, y2 = stream_format.split(y.to(stream_format.stream_dtype))
            shapes = self._stream_shapes(y1.shape, input_shape)
            recorder = Recorder(y.device)
            for (name, block), shape in zip(
                reversed(self._named_blocks()), reversed(shapes)
            ):
                evaluator = Evaluator(block, name, stream_format, extra)
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
            return stream_format.from_streams(y1, y2)

    def _stream_shapes(
        self, last: tuple[int, ...], input_shape: tuple[int, ...] | None
    ) -> list[torch.Size]:
        """Shape of a stream before each block, from that after the last."""
        blocks = cast("Sequence[Invertible]", self.blocks)
        if input_shape is None:
            shape = last
            for block in reversed(blocks):
                shape = block.inverse_shape(shape)
        else:
            shape = self._with_channels(input_shape, lambda c: c // 2)
        shapes = []
        for block in blocks:
            shapes.append(torch.Size(shape))
            shape = block.forward_shape(shape)
        if tuple(shape) != tuple(last):
            if input_shape is None:
                input_shape = self._with_channels(shapes[0], lambda c: 2 * c)
            raise ValueError(
                f"ReversibleSequence.inverse: an input of shape "
                f"{tuple(input_shape)} gives streams of {tuple(shape)}, the "
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

    def _functions(self) -> Iterator[nn.Module]:
        """Modules that are called with extra arguments."""
        for block in self.blocks:
            if isinstance(block, Invertible):
                yield from block.functions()
            else:
                yield block

    def _stream_format(self, x: torch.Tensor) -> StreamFormat:
        # Autocast chooses the precision inside f by itself. Without it, modules
        # expect the dtype of the input.
        module_dtype = x.dtype
        if torch.is_autocast_enabled(x.device.type):
            module_dtype = torch.promote_types(x.dtype, torch.float32)
        stream_dtype = torch.promote_types(module_dtype, torch.float32)
        has_grid = self.exact and stream_dtype == torch.float32
        grid_bits = self.grid_bits if has_grid else None
        return StreamFormat(module_dtype, grid_bits, self.axis)

    def _forward_stored(
        self, x: torch.Tensor, extra: ExtraArguments
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Plain autograd."""
        stream_format = self._stream_format(x)
        tap_sum = TapSum(stream_format)
        state: Sequence[torch.Tensor] = (x,)
        for name, block in self._named_blocks():
            if isinstance(block, Tap):
                value = _tap_value(block, name, stream_format, extra, *state)
                tap_sum.add(value, f"{name}.read")
            elif isinstance(block, Invertible):
                if len(state) == 1:
                    state = stream_format.to_streams(*state)
                evaluator = Evaluator(block, name, stream_format, extra)
                state = block.forward_streams(*cast(Pair, state), evaluator)
            else:
                state = _call_module(block, stream_format, extra, *state)
        output = stream_format.from_streams(*state)
        return output if tap_sum.value is None else (output, tap_sum.result())

    # In a compiled network the chain stays in eager mode: a compiler would
    # build other code for the replay, which rounds differently.
    @functools.partial(
        torch.compiler.disable,
        reason="a reversible chain is not compiled; save_memory=False, which "
        "stores its activations, can be",
    )
    def _forward_reversible(
        self, x: torch.Tensor, extra: ExtraArguments
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Autograd nodes that reconstruct or recompute their inputs."""
        for name, block in self._named_blocks():
            if isinstance(block, Invertible):
                check_gathered(
                    block, f"ReversibleSequence.{name}", "the whole sequence"
                )
        stream_format = self._stream_format(x)
        # Fake tensors draw no random numbers and have no values to check.
        real = has_values(x)
        recorder = Recorder(x.device, follow_random=real)
        observers = [
            make_observer() for make_observer in self._observer_factories
        ]
        checkable = self.exact or stream_format.stream_dtype == torch.float64
        if real and checkable:
            # Other observers compare the streams themselves.
            compare = not observers
            guard = StreamGuard(stream_format.grid_bits, compare)
            observers.append(guard)
            stream_format = dataclasses.replace(
                stream_format, summaries=guard.summaries
            )
        tap_sum = DetachedTapSum(stream_format, x.device)
        try:
            state = self._apply_blocks(
                (x,), stream_format, tap_sum, recorder, observers, extra
            )
            output = stream_format.from_streams(*state)
            if tap_sum.value is None:
                return output
            return output, tap_sum.result()
        finally:
            tap_sum.release()

    def _apply_blocks(
        self,
        state: tuple[torch.Tensor, ...],
        stream_format: StreamFormat,
        tap_sum: DetachedTapSum,
        recorder: Recorder,
        observers: list[Observer],
        extra: ExtraArguments,
    ) -> tuple[torch.Tensor, ...]:
        """The state after all blocks; adds the taps' values to tap_sum."""
        blocks = self._named_blocks()
        while blocks:
            invertible = _leading_invertible_blocks(blocks, state)
            if invertible:
                del blocks[: len(invertible)]
                state = apply_invertible_blocks(
                    invertible,
                    state,
                    not blocks,
                    stream_format,
                    tap_sum,
                    recorder,
                    observers,
                    extra,
                )
                continue
            name, block = blocks.pop(0)
            if isinstance(block, Tap):
                arguments = (block, name, stream_format, extra, *state)
                value = Segment().call(name, block, _tap_value, arguments, {})
                tap_sum.add(value, f"{name}.read")
                # Not kept until the next tap.
                del value
            else:
                arguments = (block, stream_format, extra, *state)
                state = Segment().call(name, block, _call_module, arguments, {})
        return state


def _leading_invertible_blocks(
    blocks: list[tuple[str, nn.Module]], state: tuple[torch.Tensor, ...]
) -> list[tuple[str, Invertible]]:
    """The invertible blocks at the beginning of a list, up to any other."""
    leading = []
    for name, block in blocks:
        if not isinstance(block, Invertible):
            break
        if not leading and len(state) == 1 and isinstance(block, Tap):
            # A tensor before the first coupling may have no two halves.
            break
        leading.append((name, block))
    return leading


def _tap_value(
    block: nn.Module,
    name: str,
    stream_format: StreamFormat,
    extra: ExtraArguments,
    *state: torch.Tensor,
) -> torch.Tensor:
    """The value of a tap."""
    evaluator = Evaluator(block, name, stream_format, extra)
    return evaluator.tap_value("read", *state)


def _call_module(
    block: nn.Module,
    stream_format: StreamFormat,
    extra: ExtraArguments,
    *state: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """The state after a block that is not invertible."""
    if getattr(block, "takes_streams", False):
        if len(state) == 1:
            state = cast(Pair, stream_format.to_streams(*state))
        module_input = tuple(s.to(stream_format.module_dtype) for s in state)
    else:
        module_input = stream_format.from_streams(*state)
    result = extra.call(block, module_input)
    if _is_state(result):
        return (result,)
    is_pair = isinstance(result, (tuple, list)) and len(result) == 2
    if not is_pair or not all(map(_is_state, result)):
        found = list(map(_kind, result)) if is_pair else _kind(result)
        raise TypeError(
            f"ReversibleSequence: {type(block).__name__} must return a "
            f"floating-point tensor, or two streams, got {found}."
        )
    if result[0].shape != result[1].shape:
        raise ValueError(
            f"ReversibleSequence: {type(block).__name__} returned two streams "
            f"of shapes {tuple(result[0].shape)} and {tuple(result[1].shape)}; "
            f"they must be the same."
        )
    return tuple(stream_format.to_streams(*result))


def _is_state(x: object) -> bool:
    return (
        isinstance(x, torch.Tensor)
        and x.is_floating_point()
        and x.layout == torch.strided
    )


def _kind(x: object) -> str:
    if not isinstance(x, torch.Tensor):
        return type(x).__name__
    return str(x.dtype if x.layout == torch.strided else x.layout)


def _checked_blocks(blocks: Iterable[nn.Module]) -> list[nn.Module]:
    found = blocks
    if isinstance(blocks, Iterable):
        found = list(blocks)
        wrong = [x for x in found if not isinstance(x, nn.Module)]
        if not wrong:
            return found
        found = wrong[0]
    raise TypeError(
        f"ReversibleSequence: blocks must be torch.nn.Modules, got "
        f"{type(found).__name__}."
    )
