"""Peak memory of a training step, without a GPU and without the arithmetic.

Authors
 * The sb_memeff authors 2026
"""

import bisect
import contextlib
import weakref
from collections import Counter
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sb_memeff.utils.fake import fake_tensors
from sb_memeff.utils.leftovers import no_leftovers

__all__ = ["KINDS", "StepMemory", "StorageTracker", "training_step_memory"]

# What memory is for, in the order of tables and pictures. "inputs" is the
# batch; "activations" were made in forward and wait for backward; "recomputed"
# ones were made by a module that backward ran once more; "temporaries" is all
# else that lives for a moment, gradients of activations above all.
KINDS = (
    "parameters",
    "buffers",
    "gradients",
    "optimizer states",
    "inputs",
    "activations",
    "recomputed",
    "temporaries",
)
# Of a phase in a timeline; a picture shows no more.
POINTS = 160


class Block:
    """A storage: its size, when it was alive, and where it was made.

    Arguments
    ---------
    size : int
        Bytes.
    born : int
        Time of allocation, counted in allocations and frees.
    phase : str
        "build", "forward", "backward" or "step".
    module : str
        Name of the module.
    recomputed : bool
        Made in backward by a module's forward.
    """

    __slots__ = ("size", "born", "died", "phase", "module", "kind")

    def __init__(self, size, born, phase, module, recomputed):
        self.size, self.born, self.died = size, born, None
        self.phase, self.module = phase, module
        self.kind = "recomputed" if recomputed else "temporaries"


class StorageTracker(TorchDispatchMode):
    """Adds up the storages that are alive, and remembers the most.

    Every tensor that an operator takes or returns while the mode is on is
    counted until its storage is freed; views and in-place results share a
    storage and count once. What an operator uses inside itself (a convolution's
    workspace) is not seen.

    Arguments
    ---------
    but : iterable of torch.Tensor
        Tensors that were there before and do not count, nor do their views.
    modules : ModuleTracker, optional
        Knows which module runs.

    Example
    -------
    >>> with StorageTracker() as tracker:
    ...     x = torch.zeros(1000)
    ...     y = x + 1
    ...     del x
    >>> tracker.alive, tracker.peak
    (4000, 8000)
    """

    def __init__(self, but=(), modules=None):
        super().__init__()
        self.alive = 0
        self.phase = "build"
        self.blocks = []
        self.clock = 0
        self._modules = modules
        self._known = weakref.WeakKeyDictionary(
            (x.untyped_storage(), None) for x in but
        )
        self.restart()

    def restart(self):
        """Forgets the peak so far."""
        self.peak, self._peak_time = self.alive, self.clock
        self.peak_phase, self.peak_module = self.phase, ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Runs the operator and counts what it takes and returns."""
        result = func(*args, **(kwargs or {}))
        tensors = [result]
        if func is not torch.ops.aten.lift_fresh.default:
            # What a cache holds was not made here.
            tensors += [args, kwargs]
        for leaf in tree_leaves(tensors):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage):
        if storage in self._known:
            return
        module, running = "", False
        if self._modules is not None:
            module, running = self._modules.current()
        self.clock += 1
        block = Block(
            storage.nbytes(),
            self.clock,
            self.phase,
            module,
            running and self.phase == "backward",
        )
        self.blocks.append(block)
        self._known[storage] = block
        self.alive += block.size
        if self.alive > self.peak:
            self.peak, self._peak_time = self.alive, self.clock
            self.peak_phase, self.peak_module = self.phase, module
        weakref.finalize(storage, self._free, block)

    def _free(self, block):
        self.clock += 1
        block.died = self.clock
        self.alive -= block.size

    def label(self, kind, tensors):
        """Says what tensors are for.

        Arguments
        ---------
        kind : str
            One of KINDS.
        tensors : iterable of tuple
            (name of the module, tensor); what is not a tensor, or was there
            before, is passed over.
        """
        for module, tensor in tensors:
            block = None
            if isinstance(tensor, torch.Tensor):
                block = self._known.get(tensor.untyped_storage())
            if block is not None:
                block.kind, block.module = kind, module

    def at_peak(self):
        """Storages that were alive at the peak.

        Returns
        -------
        collections.Counter
            (module, kind) to bytes.
        """
        found = Counter()
        for block in self.blocks:
            if block.born <= self._peak_time and (
                block.died is None or block.died > self._peak_time
            ):
                found[block.module, block.kind] += block.size
        return found

    def timeline(self, starts, end):
        """What was alive during a step.

        Ask when the kinds are known: a gradient is a temporary until backward
        has given it to its parameter.

        Arguments
        ---------
        starts : dict
            Phase to the time of its start, in order.
        end : int
            Time of the last one's end.

        Returns
        -------
        dict
            Phase to kind to a list of bytes. Each point stands for an equal
            part of the phase, counted in allocations and frees, and is the
            moment of that part when most was alive.
        """
        times = [*starts.values(), end]
        begin = times[0]
        changes = {kind: [0] * (end - begin + 1) for kind in KINDS}
        for block in self.blocks:
            died = end + 1 if block.died is None else block.died
            if block.born <= end and died > begin:
                changes[block.kind][max(block.born - begin, 0)] += block.size
                if died <= end:
                    changes[block.kind][died - begin] -= block.size
        alive = {kind: list(accumulate(x)) for kind, x in changes.items()}
        totals = [sum(sizes) for sizes in zip(*alive.values(), strict=True)]
        found = {}
        for phase, (first, last) in zip(starts, pairwise(times), strict=True):
            moments = range(first - begin, last - begin + 1)
            count = min(POINTS, len(moments))
            cuts = [len(moments) * i // count for i in range(count + 1)]
            # Thinning must not hide a peak.
            shown = [
                max(moments[i:j], key=totals.__getitem__)
                for i, j in pairwise(cuts)
            ]
            found[phase] = {
                kind: [sizes[i] for i in shown] for kind, sizes in alive.items()
            }
        return found


class ModuleTracker:
    """Which module runs; in backward, whose forward is undone.

    Nodes of the graph are numbered as they are made; the numbers tell in
    backward which module made a node.

    Example
    -------
    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU())
    >>> seen = []
    >>> with ModuleTracker() as modules:
    ...     modules.name(net)
    ...     hook = net[1].register_forward_pre_hook(
    ...         lambda *_: seen.append(modules.current())
    ...     )
    ...     y = net(torch.rand(1, 2))
    >>> seen
    [('1', True)]
    """

    def __init__(self):
        self._names = weakref.WeakKeyDictionary()
        self._stack = []
        self._numbers, self._makers = [0], [""]

    def name(self, model):
        """Learns the names of a model's modules.

        Arguments
        ---------
        model : torch.nn.Module
            The model.
        """
        self._names.update((m, name) for name, m in model.named_modules())

    def __enter__(self):
        """Begins to follow."""
        self._hooks = [
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, always_call=True),
        ]
        return self

    def __exit__(self, *error):
        """Ends."""
        for hook in self._hooks:
            hook.remove()

    def current(self):
        """The module at work.

        Returns
        -------
        tuple
            Its name ("" for none that is known), and whether its forward is
            running.
        """
        if self._stack:
            return self._stack[-1], True
        node = torch._C._current_autograd_node()
        if node is None:
            return "", False
        number = node._sequence_nr()
        place = bisect.bisect_right(self._numbers, number) - 1
        return self._makers[place], False

    def _enter(self, module, inputs):
        outer = self._stack[-1] if self._stack else ""
        self._stack.append(self._names.get(module, outer))
        self._mark()

    def _leave(self, module, inputs, output):
        self._stack.pop()
        self._mark()

    def _mark(self):
        self._numbers.append(torch._C._autograd._get_sequence_nr())
        self._makers.append(self._stack[-1] if self._stack else "")


@dataclass
class StepMemory:
    """Memory of one training step, in bytes.

    Arguments
    ---------
    parameters : int
        Number of trainable parameters (a count, not bytes).
    parameter_bytes : int
        What they take.
    saved_bytes : int
        Activations alive between forward and backward.
    peak_bytes : int
        The most that was alive at any time of a step: parameters, buffers,
        gradients, optimizer states, activations and temporaries.
    peak_phase : str
        When that was: "forward", "backward" or "step".
    peak_module : str
        The module that was running then, or whose gradients were being
        computed.
    split : dict
        (module, kind) to bytes of the peak; for the kinds see KINDS.
    allocator_bytes : int or None
        On a GPU, the most that torch's allocator held for this step.
    timeline : dict or None
        What was alive during the step that has the peak: phase ("forward",
        "backward" and, with an optimizer, "step") to kind to a list of bytes,
        at most 160 moments of each phase, evenly spread over its allocations
        and frees. Their largest sum is the peak.
    """

    parameters: int
    parameter_bytes: int
    saved_bytes: int
    peak_bytes: int
    peak_phase: str
    peak_module: str
    split: dict
    allocator_bytes: int | None = None
    timeline: dict | None = None

    @property
    def activation_bytes(self):
        """The peak beyond parameters and their gradients."""
        return self.peak_bytes - 2 * self.parameter_bytes

    @property
    def by_kind(self):
        """Kind to bytes of the peak, in the order of KINDS; sums to it."""
        found = dict.fromkeys(KINDS, 0)
        for (_, kind), size in self.split.items():
            found[kind] += size
        return found

    def by_module(self, depth=None):
        """Module to bytes of the peak, the largest first.

        Arguments
        ---------
        depth : int, optional
            Cut names after so many parts: 1 gives the model's own children.

        Returns
        -------
        dict
            Name to bytes; "" is what belongs to no module. Sums to the peak.
        """
        found = Counter()
        for (name, _), size in self.split.items():
            found[".".join(name.split(".")[:depth])] += size
        return dict(found.most_common())


def training_step_memory(
    build_model, step, optimizer=None, autocast=None, fake=True, device="cpu"
):
    """Measures forward, backward and (if asked) the optimizer's step.

    Arguments
    ---------
    build_model : callable
        Returns the torch.nn.Module; called without arguments. Tensors that it
        makes besides the module's own count as inputs.
    step : tuple of int or callable
        Shape of the float32 input; or a function that takes the model, calls
        it and returns its output or loss, a tensor.
    optimizer : callable, optional
        Takes the parameters and returns an optimizer. Two steps are run then,
        so that its states are there when activations are largest.
    autocast : torch.dtype, optional
        Run forward under autocast with this dtype.
    fake : bool
        Fake tensors: no arithmetic, no memory. False runs the step. None of
        them stays behind: see ``no_leftovers`` for objects outside the model
        that build_model, step or the network itself keep some in.
    device : str
        Where the step runs with fake=False. On "cuda" the allocator's figure
        is taken too.

    Returns
    -------
    StepMemory
        What was counted.

    Raises
    ------
    ValueError
        If the step asks for a value that fake tensors do not know.

    Example
    -------
    >>> build = lambda: torch.nn.Linear(1000, 1000)
    >>> memory = training_step_memory(build, (8, 1000))
    >>> memory.parameters
    1001000
    >>> memory.by_kind["gradients"]
    4004000

    A step of one's own, here with a loss:

    >>> def step(model):
    ...     return model(torch.zeros(8, 1000)).square().mean()
    >>> memory = training_step_memory(build, step, torch.optim.Adam)
    >>> memory.by_kind["optimizer states"]
    8008008
    """
    measure = _measure if not fake else no_leftovers()(_measure)
    return measure(build_model, step, optimizer, autocast, fake, device)


def _measure(build_model, step, optimizer, autocast, fake, device):
    kind = torch.device(device).type
    on_gpu = kind == "cuda" and not fake
    if on_gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        others = torch.cuda.memory_allocated(device)
    modules = ModuleTracker()
    with (
        fake_tensors() if fake else contextlib.nullcontext(),
        StorageTracker(modules=modules) as tracker,
        modules,
    ):
        model = build_model()
        if not fake:
            model.to(device)
        modules.name(model)
        if callable(step):
            run = step
        else:
            x = torch.zeros(step, device="cpu" if fake else device)

            def run(model):
                return model(x)

        for block in tracker.blocks:
            block.kind = "inputs"
        tracker.label("parameters", _owned(model.named_parameters()))
        tracker.label("buffers", _owned(model.named_buffers()))
        weights = [p for p in model.parameters() if p.requires_grad]
        updater = optimizer(weights) if optimizer else None
        tracker.restart()
        steps = []
        for _ in range(2 if updater else 1):
            tracker.phase, first = "forward", len(tracker.blocks)
            starts = {"forward": tracker.clock}
            before = tracker.alive
            with torch.autocast(kind, autocast, enabled=bool(autocast)):
                y = run(model)
            saved = tracker.alive - before
            for block in tracker.blocks[first:]:
                if block.died is None:
                    block.kind = "activations"
            tracker.phase = "backward"
            starts["backward"] = tracker.clock
            # Under fake tensors sum() would do; the gradient is what counts.
            y.backward(torch.ones_like(y))
            del y
            owned = list(_owned(model.named_parameters()))
            tracker.label("gradients", ((m, p.grad) for m, p in owned))
            if updater:
                tracker.phase = "step"
                starts["step"] = tracker.clock
                updater.step()
                for module, parameter in owned:
                    states = _tensors(updater.state.get(parameter))
                    tracker.label(
                        "optimizer states", ((module, x) for x in states)
                    )
            steps.append((starts, tracker.clock))
            if updater:
                updater.zero_grad()
    # The last step has the peak, unless the first one needs more to make the
    # optimizer's states than a later one to use them.
    timeline = max(
        (tracker.timeline(*step) for step in reversed(steps)), key=_highest
    )
    memory = StepMemory(
        parameters=sum(p.numel() for p in weights),
        parameter_bytes=sum(p.numel() * p.element_size() for p in weights),
        saved_bytes=saved,
        peak_bytes=tracker.peak,
        peak_phase=tracker.peak_phase,
        peak_module=tracker.peak_module,
        split=dict(tracker.at_peak()),
        timeline=timeline,
    )
    if on_gpu:
        peak = torch.cuda.max_memory_allocated(device)
        memory.allocator_bytes = peak - others
    return memory


def _highest(timeline):
    """The peak of a timeline."""
    return max(
        sum(sizes)
        for kinds in timeline.values()
        for sizes in zip(*kinds.values(), strict=True)
    )


def _tensors(state):
    """All tensors of an optimizer's state, those in its objects too."""
    for leaf in tree_leaves(state):
        if isinstance(leaf, torch.Tensor):
            yield leaf
        elif hasattr(leaf, "__dict__"):
            yield from _tensors(vars(leaf))


def _owned(named):
    """(module, tensor) of (name, tensor)."""
    for name, tensor in named:
        yield name.rpartition(".")[0], tensor
