"""How the maths of a reversible chain is carried out.

``sb_memeff.nnet.coupling`` says y1 = x1 + f(x2); the classes here decide what
"f(x2)" and "+" mean: differentiable, recorded without gradients, or
replayed with gradients. All share the dtypes and the grid of the
exact stream (see ``sb_memeff.nnet.reversible``).

Authors
 * The sb_memeff authors 2026
"""

import contextlib

import torch
from torch.autograd.graph import get_gradient_edge

from sb_memeff.nnet.coupling import halves

__all__ = [
    "Arithmetic",
    "RecordingArithmetic",
    "ReplayingArithmetic",
    "listed",
]


class RoundToGrid(torch.autograd.Function):
    """Rounds to multiples of 2**-bits; the gradient passes unchanged."""

    @staticmethod
    def forward(ctx, x, bits):
        return round_to_grid(x, bits)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def round_to_grid(x, bits):
    # Scaling by a power of two is exact; only round() rounds.
    return (x * 2.0**bits).round_().mul_(2.0**-bits)


class Arithmetic:
    """How the maths of the blocks is carried out: dtypes, grid, arguments.

    The state between two blocks is a tensor (outside) or two streams in
    ``stream_dtype``, on the grid (inside). This class is plain and
    differentiable; its subclasses record and replay.
    """

    add = staticmethod(torch.add)

    def __init__(self, owner, inner_dtype, bits, args, kwargs):
        self.owner = owner
        self.inner_dtype = inner_dtype
        self.stream_dtype = torch.promote_types(inner_dtype, torch.float32)
        self.bits = bits
        self.args = args
        self.kwargs = kwargs
        self.total = None

    def __call__(self, module, stream):
        """The increment of a coupling: module(stream), on the grid."""
        value = self.evaluate(module, stream.to(self.inner_dtype))
        self.check_increment(module, value, stream)
        return self.on_grid(value.to(self.stream_dtype))

    def call(self, module, state):
        """The state after a module that is not invertible."""
        result = self.evaluate(module, self.given(module, state))
        if isinstance(result, torch.Tensor):
            return result
        return self.enter(result)

    def tap(self, module, state):
        """Adds what the module reads from the state to the total."""
        value = self.evaluate(module, self.given(module, state))
        self.check_tensor(module, value, "a tap")
        if self.total is None:
            self.total_dtype = value.dtype
            # What is added to from here on must be nobody else's.
            self.total = value.to(self.stream_dtype, copy=True)
        elif value.shape == self.total.shape:
            self.total = self.add(self.total, value)
        else:
            raise ValueError(
                f"{self.name(module)} reads a tensor of shape "
                f"{tuple(value.shape)}; the taps before it gave "
                f"{tuple(self.total.shape)}. All are added up and must have "
                f"the same shape."
            )

    def leave_total(self):
        """The total, summed in stream_dtype, in the dtype that taps read."""
        return self.total.to(self.total_dtype)

    def evaluate(self, module, value):
        return module(value, *self.args, **self.kwargs)

    def given(self, module, state):
        """The state in the form in which a non-invertible module takes it."""
        if getattr(module, "takes_streams", False):
            return tuple(s.to(self.inner_dtype) for s in self.streams(state))
        return self.leave(state)

    def streams(self, state):
        """The state as two streams."""
        if isinstance(state, torch.Tensor):
            return self.enter(halves(state))
        return state

    def enter(self, streams):
        return tuple(self.on_grid(s.to(self.stream_dtype)) for s in streams)

    def leave(self, state):
        """The state as one tensor."""
        if isinstance(state, torch.Tensor):
            return state
        return torch.cat(state, dim=1).to(self.inner_dtype)

    def on_grid(self, x):
        if self.bits is None:
            return x
        if torch.is_grad_enabled() and x.requires_grad:
            return RoundToGrid.apply(x, self.bits)
        return round_to_grid(x, self.bits)

    def name(self, module):
        """Where a module stands in the sequence, for messages."""
        for name, candidate in self.owner.named_modules():
            if candidate is module:
                return name
        return type(module).__name__

    def check_tensor(self, module, value, place):
        if not isinstance(value, torch.Tensor):
            raise TypeError(
                f"{self.name(module)} returned {type(value).__name__}; "
                f"inside {place} it must return one tensor."
            )

    def check_increment(self, module, value, stream):
        self.check_tensor(module, value, "a coupling")
        if value.shape != stream.shape:
            raise ValueError(
                f"{self.name(module)} changed the shape of its stream from "
                f"{tuple(stream.shape)} to {tuple(value.shape)}; inside a "
                f"coupling it must keep it (same padding, stride 1)."
            )


class RecordingArithmetic(Arithmetic):
    """The forward pass without gradients: in place, noting what replay needs."""

    def start(self, recorder, watch):
        self.recorder = recorder
        self.watch = watch and self.bits is not None
        self.notes = []
        self.reach = []

    def evaluate(self, module, value):
        result, note = self.recorder.record(
            module, value, *self.args, **self.kwargs
        )
        self.notes.append(note)
        return result

    def add(self, a, b):
        return a.add_(b)

    def enter(self, streams):
        if self.bits is None:
            # What is changed in place from here on must be nobody else's.
            return tuple(s.to(self.stream_dtype, copy=True) for s in streams)
        return super().enter(streams)

    def take_notes(self):
        notes, self.notes = self.notes, []
        return notes

    def look(self, index, streams):
        """Notes how far the streams reach. Read once, in backward: no sync."""
        if self.watch:
            for stream in streams:
                self.reach.append((index, *stream.aminmax()))


class ReplayingArithmetic(Arithmetic):
    """The backward pass: every module once more, with gradients.

    Modules see leaves that share memory with their parameters instead of the
    parameters: autograd would call a parameter's hooks here and then again
    when the Function returns its gradient.
    """

    def start(self, recorder, leaves, extras):
        self.recorder = recorder
        self.leaves = leaves
        self.extras = extras
        self.notes = []
        self.gradients = {}

    def __call__(self, module, stream):
        """The increment, and a function that pulls its gradient back."""
        stream = stream.detach().requires_grad_()
        with torch.enable_grad():
            value = self.evaluate(module, stream.to(self.inner_dtype))
        increment = self.on_grid(value.detach().to(self.stream_dtype))
        # From here on only the graph of the value is needed, not its storage.
        graph = _graph([value])

        def pull(gradient):
            return self.pull(module, graph, [gradient], [stream])[0]

        return increment, pull

    def rerun(self, module, state, gradient, needs_gradient):
        """The gradient of the state before a module that is not invertible."""
        inputs = [
            s.detach().requires_grad_(needs_gradient) for s in listed(state)
        ]
        with torch.enable_grad():
            one = isinstance(state, torch.Tensor)
            result = self.call(module, inputs[0] if one else tuple(inputs))
        graph = _graph(listed(result))
        del result
        found = self.pull(module, graph, listed(gradient), inputs)
        return found[0] if one else tuple(found)

    def evaluate(self, module, value):
        with (
            self.recorder.replay(module, self.notes.pop()),
            _parameters_replaced(module, self.leaves),
        ):
            return super().evaluate(module, value)

    def pull(self, module, graph, gradients, inputs):
        """Gradients of the inputs; those of the parameters are collected."""
        keys = {id(p) for p in module.parameters()} | self.extras
        keys = [key for key in self.leaves if key in keys]
        wanted = [x for x in inputs if x.requires_grad]
        gradients = [
            g.to(dtype)
            for g, (edge, dtype) in zip(gradients, graph, strict=True)
            if edge is not None
        ]
        edges = [edge for edge, _ in graph if edge is not None]
        leaves = [self.leaves[key] for key in keys]
        found = [None] * (len(wanted) + len(keys))
        if edges and found:
            found = torch.autograd.grad(
                edges, wanted + leaves, gradients, allow_unused=True
            )
        for key, gradient in zip(keys, found[len(wanted) :], strict=True):
            if gradient is not None:
                known = self.gradients.get(key)
                self.gradients[key] = (
                    gradient if known is None else known + gradient
                )
        found = iter(found[: len(wanted)])
        return [
            _zeros_if_none(next(found), x) if x.requires_grad else None
            for x in inputs
        ]


def listed(state):
    return [state] if isinstance(state, torch.Tensor) else list(state)


def _graph(values):
    return [
        (get_gradient_edge(v) if v.requires_grad else None, v.dtype)
        for v in values
    ]


def _zeros_if_none(gradient, like):
    return torch.zeros_like(like) if gradient is None else gradient


@contextlib.contextmanager
def _parameters_replaced(module, leaves):
    replaced = []
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if id(parameter) in leaves:
                replaced.append((part._parameters, name, parameter))
    for where, name, parameter in replaced:
        where[name] = leaves[id(parameter)]
    try:
        yield
    finally:
        for where, name, parameter in replaced:
            where[name] = parameter
