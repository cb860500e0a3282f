"""Peak memory of a training step, without a GPU and without the arithmetic.

Authors
 * The sb_memeff authors 2026
"""

import bisect
import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._ops import OpOverload
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sb_memeff.memory.fake import fake_tensors
from sb_memeff.memory.leftovers import no_leftovers

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

    def __init__(
        self, size: int, born: int, phase: str, module: str, recomputed: bool
    ):
        self.size, self.born = size, born
        self.died: int | None = None
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

    def __init__(
        self,
        but: Iterable[torch.Tensor] = (),
        modules: "ModuleTracker | None" = None,
    ):
        super().__init__()
        self.alive = 0
        self.phase = "build"
        self.blocks: list[Block] = []
        self._modules = modules
        self._clock = 0
        self._known: weakref.WeakKeyDictionary[
            torch.UntypedStorage, Block | None
        ] = weakref.WeakKeyDictionary((x.untyped_storage(), None) for x in but)
        self.restart()

    def restart(self) -> None:
        """Forgets the peak so far."""
        self.peak, self._peak_time = self.alive, self._clock
        self.peak_phase, self.peak_module = self.phase, ""

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Collection[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
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

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        module, running = "", False
        if self._modules is not None:
            module, running = self._modules.current()
        self._clock += 1
        block = Block(
            storage.nbytes(),
            self._clock,
            self.phase,
            module,
            running and self.phase == "backward",
        )
        self.blocks.append(block)
        self._known[storage] = block
        self.alive += block.size
        if self.alive > self.peak:
            self.peak, self._peak_time = self.alive, self._clock
            self.peak_phase, self.peak_module = self.phase, module
        weakref.finalize(storage, self._free, block)

    def _free(self, block: Block) -> None:
        self._clock += 1
        block.died = self._clock
        self.alive -= block.size

    def label(self, kind: str, tensors: Iterable[tuple[str, object]]) -> None:
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

    def at_peak(self) -> Counter[tuple[str, str]]:
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
        self._names: weakref.WeakKeyDictionary[nn.Module, str] = (
            weakref.WeakKeyDictionary()
        )
        self._stack: list[str] = []
        self._numbers, self._makers = [0], [""]

    def name(self, model: nn.Module) -> None:
        """Learns the names of a model's modules.

        Arguments
        ---------
        model : torch.nn.Module
            The model.
        """
        self._names.update((m, name) for name, m in model.named_modules())

    def __enter__(self) -> "ModuleTracker":
        """Begins to follow."""
        self._hooks = [
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, always_call=True),
        ]
        return self

    def __exit__(self, *error: object) -> None:
        """Ends."""
        for hook in self._hooks:
            hook.remove()

    def current(self) -> tuple[str, bool]:
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

    def _enter(self, module: nn.Module, inputs: Any) -> None:
        outer = self._stack[-1] if self._stack else ""
        self._stack.append(self._names.get(module, outer))
        self._mark()

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._stack.pop()
        self._mark()

    def _mark(self) -> None:
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
    """

    parameters: int
    parameter_bytes: int
    saved_bytes: int
    peak_bytes: int
    peak_phase: str
    peak_module: str
    split: dict[tuple[str, str], int]
    allocator_bytes: int | None = None

    @property
    def activation_bytes(self) -> int:
        """The peak beyond parameters and their gradients."""
        return self.peak_bytes - 2 * self.parameter_bytes

    @property
    def by_kind(self) -> dict[str, int]:
        """Kind to bytes of the peak, in the order of KINDS; sums to it."""
        found = dict.fromkeys(KINDS, 0)
        for (_, kind), size in self.split.items():
            found[kind] += size
        return found

    def by_module(self, depth: int | None = None) -> dict[str, int]:
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
    build_model: Callable[[], nn.Module],
    step: Sequence[int] | Callable[[Any], torch.Tensor],
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
    | None = None,
    autocast: torch.dtype | None = None,
    fake: bool = True,
    device: str = "cpu",
) -> StepMemory:
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
        Takes the parameters and returns an optimizer. Forward and backward
        are run twice then, so that its states are there when activations are
        largest.
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


def _measure(
    build_model: Callable[[], nn.Module],
    step: Sequence[int] | Callable[[Any], torch.Tensor],
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None,
    autocast: torch.dtype | None,
    fake: bool,
    device: str,
) -> StepMemory:
    kind = torch.device(device).type
    on_gpu = kind == "cuda" and not fake
    saved = others = 0
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

            def run(model: nn.Module) -> torch.Tensor:
                return model(x)

        for block in tracker.blocks:
            block.kind = "inputs"
        tracker.label("parameters", _owned(model.named_parameters()))
        tracker.label("buffers", _owned(model.named_buffers()))
        weights = [p for p in model.parameters() if p.requires_grad]
        updater = optimizer(weights) if optimizer else None
        tracker.restart()
        for last in [False, True] if updater else [True]:
            tracker.phase, first = "forward", len(tracker.blocks)
            before = tracker.alive
            with torch.autocast(kind, autocast, enabled=bool(autocast)):
                y = run(model)
            saved = tracker.alive - before
            for block in tracker.blocks[first:]:
                if block.died is None:
                    block.kind = "activations"
            tracker.phase = "backward"
            # Under fake tensors sum() would do; the gradient is what counts.
            y.backward(torch.ones_like(y))
            del y
            owned = list(_owned(model.named_parameters()))
            tracker.label("gradients", ((m, p.grad) for m, p in owned))
            if not last and updater:
                tracker.phase = "step"
                updater.step()
                for module, parameter in owned:
                    states = _tensors(updater.state.get(parameter))
                    tracker.label(
                        "optimizer states", ((module, x) for x in states)
                    )
                updater.zero_grad()
    memory = StepMemory(
        parameters=sum(p.numel() for p in weights),
        parameter_bytes=sum(p.numel() * p.element_size() for p in weights),
        saved_bytes=saved,
        peak_bytes=tracker.peak,
        peak_phase=tracker.peak_phase,
        peak_module=tracker.peak_module,
        split=dict(tracker.at_peak()),
    )
    if on_gpu:
        peak = torch.cuda.max_memory_allocated(device)
        memory.allocator_bytes = peak - others
    return memory


def _tensors(state: object) -> Iterator[torch.Tensor]:
    """All tensors of an optimizer's state, those in its objects too."""
    for leaf in tree_leaves(state):
        if isinstance(leaf, torch.Tensor):
            yield leaf
        elif hasattr(leaf, "__dict__"):
            yield from _tensors(vars(leaf))


def _owned(
    named: Iterable[tuple[str, torch.Tensor]],
) -> Iterator[tuple[str, torch.Tensor]]:
    """(module, tensor) of (name, tensor)."""
    for name, tensor in named:
        yield name.rpartition(".")[0], tensor
