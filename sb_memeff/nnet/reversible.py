"""Reversible networks: train without storing activations.

A reversible block computes its output in such a way that its input can be
computed back. A chain of them keeps only its last output; backward walks the
chain from the end, rebuilds each block's input, and forms the gradients from
it. Memory no longer grows with depth; the price is one extra forward.

An additive coupling (Dinh et al., "NICE", 2014; Gomez et al., "The Reversible
Residual Network", 2017, eq. 6 and 7) splits the channels in two streams:

    forward   y1 = x1 + f(x2)      inverse   x2 = y2 - g(y1)
              y2 = x2 + g(y1)                x1 = y1 - f(x2)

``f`` and ``g`` are ordinary modules of any kind that keep the shape.

**The exact stream.** In floating point, (x + h) - h is not x, and the errors
grow along the chain; worse, a tiny difference flips the roundings of a
low-precision ``f``. With bf16 inside f the gradient of 50 blocks is off by
0.3. Here a float32 stream lives on a fixed grid: f's output is rounded to
multiples of 2**-12, so that sums below 2**12 fit the 24 bits of a float32 and
adding and subtracting are exact. The inverse is then bit-exact at any depth,
whatever the precision of f (bf16, fp16, TF32), as long as f itself is
deterministic. Values that leave that range are reported.

Authors
 * The sb_memeff authors 2026
"""

import contextlib
import copy
import math
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from sb_memeff.nnet.arithmetic import (
    Arithmetic,
    RecordingArithmetic,
    ReplayingArithmetic,
    listed,
)
from sb_memeff.nnet.coupling import (
    AdditiveCoupling,
    Invertible,
    SpaceToDepth,
    Tap,
    halves,
)
from sb_memeff.nnet.replay import (
    Recorder,
    check_fingerprint,
    fingerprint,
    without_trace,
)

__all__ = [
    "AdditiveCoupling",
    "Invertible",
    "InvertibilityReport",
    "ReversibleSequence",
    "SpaceToDepth",
    "Tap",
    "check_invertible",
    "inversion_errors",
]


class ReversibleSequence(nn.Module):
    """Runs a chain of blocks and stores (almost) nothing for backward.

    Invertible blocks (``AdditiveCoupling``, ``SpaceToDepth``) are undone in
    backward. Any other module may stand in the chain too (a stem, a strided
    transition, a pooling): its input is stored and its output recomputed, so
    it costs one stored tensor and one extra forward. A ``Tap`` reads from the
    state where it stands, and the sum of what all taps read is a second
    output; nothing is stored for it. All of it happens in one
    autograd Function, with the same values, gradients, running statistics and
    random numbers as without saving memory.

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

    Raises
    ------
    ValueError
        If there are no blocks, or grid_bits is not in 1...23.

    Example
    -------
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

    def __init__(self, blocks, save_memory=True, exact=True, grid_bits=12):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        if len(self.blocks) == 0:
            raise ValueError("ReversibleSequence: there are no blocks.")
        if not 1 <= grid_bits <= 23:
            raise ValueError(
                f"ReversibleSequence: grid_bits must lie in 1...23, "
                f"got {grid_bits}."
            )
        self.save_memory = save_memory
        self.exact = exact
        self.grid_bits = grid_bits

    def extra_repr(self):
        """What print(module) shows."""
        return (
            f"save_memory={self.save_memory}, exact={self.exact}, "
            f"grid_bits={self.grid_bits}"
        )

    def forward(self, x, *args, **kwargs):
        """Runs the chain.

        Arguments
        ---------
        x : torch.Tensor
            [N, C, ...]; C even where the first block is invertible.
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
        if not (self.save_memory and torch.is_grad_enabled()):
            return self._forward_stored(x, args, kwargs)
        flat, spec = tree_flatten((args, kwargs))
        extras = [a for a in flat if isinstance(a, torch.Tensor)]
        weights = self._weights()
        if not any(t.requires_grad for t in (x, *extras, *weights)):
            return self._forward_stored(x, args, kwargs)
        return _SaveMemory.apply(self, (flat, spec), x, *extras, *weights)

    def inverse(self, y, *args, input_shape=None, **kwargs):
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
            run = self._arithmetic(Arithmetic, y.dtype, y.device, args, kwargs)
            y1, y2 = halves(y.to(run.stream_dtype))
            shapes = self._stream_shapes(y1.shape, input_shape)
            recorder = Recorder(y.device)
            for block, shape in zip(reversed(self.blocks), reversed(shapes)):
                (y1, y2), note = recorder.record(
                    block.inverse_streams, y1, y2, run, shape
                )
                if note.random_states is not None:
                    raise RuntimeError(
                        f"ReversibleSequence.inverse: {run.name(block)} drew "
                        f"random numbers (dropout in training mode?), which "
                        f"cannot be drawn again from the output alone; call "
                        f"eval() first."
                    )
            return run.leave((y1, y2))

    def _stream_shapes(self, last, input_shape):
        # The shape of a stream before each block.
        if input_shape is None:
            shape = last
            for block in reversed(self.blocks):
                shape = block.stream_shape_before(shape)
        else:
            shape = (input_shape[0], input_shape[1] // 2, *input_shape[2:])
        shapes = []
        for block in self.blocks:
            shapes.append(torch.Size(shape))
            shape = block.stream_shape(shape)
        if tuple(shape) != tuple(last):
            raise ValueError(
                f"ReversibleSequence.inverse: an input of shape "
                f"{tuple(input_shape)} gives streams of {tuple(shape)}, the "
                f"output holds streams of {tuple(last)}."
            )
        return shapes

    def _weights(self):
        return [p for p in self.parameters() if p.requires_grad]

    def _arithmetic(self, kind, dtype, device, args, kwargs):
        stream = torch.promote_types(dtype, torch.float32)
        bits = self.grid_bits
        if not self.exact or stream != torch.float32:
            bits = None
        # Autocast picks the precision inside f by itself; without it, the
        # modules expect what they were called with.
        inner = stream if torch.is_autocast_enabled(device.type) else dtype
        return kind(self, inner, bits, args, kwargs)

    def _forward_stored(self, x, args, kwargs):
        run = self._arithmetic(Arithmetic, x.dtype, x.device, args, kwargs)
        state = x
        for block in self.blocks:
            if isinstance(block, Tap):
                run.tap(block.read, state)
            elif isinstance(block, Invertible):
                state = block.forward_streams(*run.streams(state), run)
            else:
                state = run.call(block, state)
        if run.total is None:
            return run.leave(state)
        return run.leave(state), run.leave_total()


class _SaveMemory(torch.autograd.Function):
    """The whole chain as one node of the graph.

    The parameters are inputs, so that DistributedDataParallel finds them and
    an input that needs no gradient does not cut them off.
    """

    @staticmethod
    def forward(ctx, sequence, call, x, *tensors):
        flat, spec = call
        args, kwargs = tree_unflatten(flat, spec)
        # Fake tensors draw no random numbers and hold no values to look at.
        real = not isinstance(x, FakeTensor)
        recorder = Recorder(x.device, follow_random=real)
        run = sequence._arithmetic(
            RecordingArithmetic, x.dtype, x.device, args, kwargs
        )
        run.start(recorder, watch=real)
        tape = []
        saved = []
        state = x
        with recorder.autocast():
            for index, block in enumerate(sequence.blocks):
                if isinstance(block, Tap):
                    # Streams will be rebuilt; a tensor may be the output, or
                    # is stored for the next block anyway.
                    before = [state] if isinstance(state, torch.Tensor) else []
                    saved += before
                    run.tap(block.read, state)
                    tape.append((_TAP, block, len(before), run.take_notes()))
                elif isinstance(block, Invertible):
                    if isinstance(state, torch.Tensor):
                        tape.append((_ENTER, state.dtype))
                        state = run.streams(state)
                        run.look(index, state)
                    shape = state[0].shape
                    state = block.forward_streams(*state, run)
                    run.look(index, state)
                    tape.append((_UNDO, block, shape, run.take_notes()))
                else:
                    before = listed(state)
                    saved += before
                    state = run.call(block, state)
                    tape.append((_RERUN, block, len(before), run.take_notes()))
            output = run.leave(state)
        if not isinstance(state, torch.Tensor):
            # The output serves, unless its dtype has lost the exact stream.
            exact = output.dtype == run.stream_dtype
            saved += [output] if exact else state
            tape.append((_LEAVE, 1 if exact else 2))
        extras = [a for a in flat if isinstance(a, torch.Tensor)]
        ctx.save_for_backward(*extras, *saved)
        ctx.sequence = sequence
        ctx.call = ([None if _is_tensor(a) else a for a in flat], spec)
        ctx.places = [i for i, a in enumerate(flat) if _is_tensor(a)]
        ctx.recorder = recorder
        ctx.arithmetic = (run.inner_dtype, run.bits)
        ctx.tape = tape
        ctx.reach = run.reach
        ctx.fingerprint = fingerprint(sequence)
        # A gradient that nobody needs costs no memory.
        ctx.set_materialize_grads(False)
        if run.total is None:
            return output
        return output, run.leave_total()

    @staticmethod
    def backward(ctx, gradient, total_gradient=None):
        _refuse_double_backward()
        check_fingerprint(ctx.fingerprint, ctx.sequence, "ReversibleSequence")
        _check_reach(ctx.reach, ctx.sequence)
        # Without retain_graph what is popped below is freed when it is no
        # longer needed, and may be overwritten.
        keep = torch._C._autograd._get_current_graph_task_keep_graph()
        saved = list(ctx.saved_tensors)
        ctx.maybe_clear_saved_tensors()
        extras, saved = saved[: len(ctx.places)], saved[len(ctx.places) :]
        run, keys = _prepare_replay(ctx, extras)

        def pop(count):
            popped = [saved.pop() for _ in range(count)][::-1]
            return popped if not keep else [p.clone() for p in popped]

        state = None
        for number, (kind, *entry) in reversed(list(enumerate(ctx.tape))):
            if kind is _LEAVE:
                state = pop(entry[0])
                if len(state) == 1:
                    state = [_own(s, s.dtype) for s in halves(state[0])]
                if gradient is None:
                    gradient = [torch.zeros_like(s) for s in state]
                else:
                    gradient = [
                        _own(g, run.stream_dtype) for g in halves(gradient)
                    ]
            elif kind is _TAP:
                block, count, notes = entry
                run.notes = list(notes)
                state = pop(count)[0] if count else state
                needed = number > 0 or ctx.needs_input_grad[2]
                if total_gradient is not None:
                    read = run.rerun(block.read, state, total_gradient, needed)
                    gradient = _sum(gradient, read) if needed else None
            elif kind is _UNDO:
                block, shape, notes = entry
                run.notes = list(notes)
                state, gradient = block.backward_streams(
                    state, gradient, run, shape
                )
            elif kind is _ENTER:
                state = None
                gradient = torch.cat(gradient, dim=1).to(entry[0])
            else:
                block, count, notes = entry
                run.notes = list(notes)
                # No other name for them: they are freed with the state.
                state = pop(count)
                state = state[0] if count == 1 else state
                needed = number > 0 or ctx.needs_input_grad[2]
                # None: only what the taps before this block read was used.
                if gradient is not None:
                    gradient = run.rerun(block, state, gradient, needed)
                elif count > 1:
                    gradient = [torch.zeros_like(s) for s in state]
                if count > 1:
                    # Both may be one tensor, or the caller's.
                    gradient = [_own(g, g.dtype) for g in gradient]
        if not ctx.needs_input_grad[2]:
            gradient = None
        return None, None, gradient, *(run.gradients.get(k) for k in keys)


_ENTER, _UNDO, _TAP, _RERUN, _LEAVE = "enter undo tap rerun leave".split()


def _is_tensor(x):
    return isinstance(x, torch.Tensor)


def _sum(gradient, more):
    """Adds to the gradient of a state; those of streams are ours to change."""
    if gradient is None:
        return more
    if isinstance(gradient, torch.Tensor):
        return gradient + more
    return [a.add_(b) for a, b in zip(gradient, more, strict=True)]


def _own(x, dtype):
    return x.to(dtype, copy=True)


def _prepare_replay(ctx, extras):
    """The replaying arithmetic, and a key for each tensor given to apply."""
    flat, spec = ctx.call
    flat = list(flat)
    needs = ctx.needs_input_grad[3:]
    leaves = {}
    keys = []
    for place, extra, need in zip(ctx.places, extras, needs):
        flat[place] = extra.detach().requires_grad_(need)
        keys.append(id(flat[place]))
        if need:
            leaves[keys[-1]] = flat[place]
    extra_keys = set(leaves)
    # The module's own, in the order in which they were given to apply: within
    # another sequence those were stand-ins that are gone by now.
    for weight in ctx.sequence._weights():
        keys.append(id(weight))
        leaves[id(weight)] = weight.detach().requires_grad_()
    run = ReplayingArithmetic(
        ctx.sequence, *ctx.arithmetic, *tree_unflatten(flat, spec)
    )
    run.start(ctx.recorder, leaves, extra_keys)
    return run, keys


def _refuse_double_backward():
    if torch.is_grad_enabled():
        raise RuntimeError(
            "ReversibleSequence: double backward (create_graph=True) is not "
            "supported while saving memory; set save_memory=False."
        )


def _check_reach(reach, sequence):
    if not reach:
        return
    limit = 2.0 ** (24 - sequence.grid_bits)
    extremes = torch.stack([torch.stack(pair) for _, *pair in reach])
    farthest = extremes.abs().amax(dim=1).tolist()
    for (index, *_), value in zip(reach, farthest):
        # inf and NaN are passed on, as autograd does: what skips or counts
        # non-finite steps (GradScaler, Brain) must see them.
        if limit <= value < math.inf:
            raise RuntimeError(
                f"ReversibleSequence: at blocks.{index} the stream reached "
                f"{value:.6g}, beyond {limit:.6g}, where float32 cannot hold "
                f"multiples of 2**-{sequence.grid_bits}: the inverse would no "
                f"longer be exact. Lower the learning rate or the scale of "
                f"the blocks, or set grid_bits={sequence.grid_bits - 3} "
                f"(a coarser grid that reaches 8 times as far)."
            )


@dataclass
class InvertibilityReport:
    """What ``check_invertible`` found.

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
    blocks: dict
    parameters: dict

    def __str__(self):
        block = max(self.blocks, key=self.blocks.get, default="no block")
        parameter = max(self.parameters, key=self.parameters.get)
        return (
            f"inversion error {self.inversion_error:.3g} (most in {block}), "
            f"gradient error {self.gradient_error:.3g} against stored "
            f"activations (most in {parameter}: "
            f"{self.parameters[parameter]:.3g})"
        )


def check_invertible(module, x, *args, **kwargs):
    """Does backward see the activations that forward saw?

    Works on a copy: weights, statistics, gradients and the random state stay
    as they are. Call it inside the autocast context of the training to check
    that precision.

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
    devices = [] if x.device.type == "cpu" else [x.device]
    found, blocks = [], {}
    for save_memory in (True, False):
        copied = copy.deepcopy(module)
        with (
            torch.random.fork_rng(devices, device_type=x.device.type),
            inversion_errors(copied) as errors,
        ):
            found.append(_gradients(copied, x, args, kwargs, save_memory))
        blocks.update(errors)
    ours, stored = (
        {name: g.double() for name, g in gradients.items()}
        for gradients in found
    )
    scale = _norm(stored.values()) or 1.0
    differences = {name: ours[name] - stored[name] for name in stored}
    return InvertibilityReport(
        max(blocks.values(), default=0.0),
        _norm(differences.values()) / scale,
        blocks,
        {name: _norm([d]) / scale for name, d in differences.items()},
    )


def _norm(tensors):
    return math.sqrt(sum(t.square().sum().item() for t in tensors))


def _gradients(module, x, args, kwargs, save_memory):
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
    gradients = torch.autograd.grad(loss, named.values(), allow_unused=True)
    return {
        name: gradient
        for name, gradient in zip(named, gradients, strict=True)
        if gradient is not None
    }


@contextlib.contextmanager
def inversion_errors(module):
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
    >>> net = ReversibleSequence([AdditiveCoupling(nn.Tanh(), nn.Tanh())])
    >>> with inversion_errors(net) as errors:
    ...     net(torch.rand(2, 4, requires_grad=True)).sum().backward()
    >>> errors
    {'blocks.0': 0.0}
    """
    errors = {}
    watched = []
    for name, part in module.named_modules():
        if isinstance(part, ReversibleSequence):
            prefix = f"{name}.blocks." if name else "blocks."
            for index, block in part.blocks.named_children():
                # A tap changes nothing.
                if isinstance(block, Invertible) and not isinstance(block, Tap):
                    _watch(block, f"{prefix}{index}", errors)
                    watched.append(block)
    try:
        yield errors
    finally:
        for block in watched:
            del block.forward_streams, block.backward_streams


def _watch(block, name, errors):
    there, back = block.forward_streams, block.backward_streams
    seen = []

    def forward_streams(x1, x2, run):
        if isinstance(run, RecordingArithmetic):
            seen.append((x1.clone(), x2.clone()))
        return there(x1, x2, run)

    def backward_streams(y, dy, run, shape):
        x, dx = back(y, dy, run, shape)
        # The last call first, where the block is called several times.
        worst = max(map(_relative_error, x, seen.pop()))
        errors[name] = max(worst, errors.get(name, 0.0))
        return x, dx

    block.forward_streams = forward_streams
    block.backward_streams = backward_streams


def _relative_error(rebuilt, true):
    error = (rebuilt - true).abs().max()
    if error == 0:
        return 0.0
    return (error / true.abs().max()).nan_to_num(math.inf).item()
