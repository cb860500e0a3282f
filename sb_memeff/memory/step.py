"""Peak memory of a training step, without a GPU and without the arithmetic.

Authors
 * The sb_memeff authors 2026
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from sb_memeff.memory.fake import fake_tensors
from sb_memeff.memory.leftovers import no_leftovers
from sb_memeff.memory.tracker import (
    KINDS,
    ModuleTracker,
    StorageTracker,
    Timeline,
)

__all__ = ["StepMemory", "training_step_memory"]


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
    timeline : dict
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
    split: dict[tuple[str, str], int]
    allocator_bytes: int | None = None
    timeline: Timeline = field(default_factory=dict)

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


def _highest(timeline: Timeline) -> int:
    """The peak of a timeline."""
    return max(
        sum(sizes)
        for kinds in timeline.values()
        for sizes in zip(*kinds.values(), strict=True)
    )


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
