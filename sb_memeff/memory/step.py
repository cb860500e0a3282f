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

# What a step leaves behind besides gradients and states is negligible if it is
# smaller than the peak by this factor.
NEGLIGIBLE = 1000


@dataclass
class StepMemory:
    """Memory of one training step, in bytes.

    Arguments
    ---------
    parameters : int
        Number of trainable parameters (a count, not bytes).
    parameter_bytes : int
        Their bytes.
    saved_bytes : int
        Activations alive between forward and backward.
    peak_bytes : int
        Largest number of bytes in use at any time of a step: parameters,
        buffers, gradients, optimizer states, activations and temporaries.
    peak_phase : str
        Phase of the peak: "forward", "backward" or "step".
    peak_module : str
        Module that was running at the peak, or whose gradients were being
        computed.
    split : dict
        Maps (module, kind) to bytes at the peak; for the kinds see KINDS.
    allocator_bytes : int or None
        On a GPU, the peak of torch's allocator in this step.
    timeline : dict
        Memory in use during the step that has the peak. Maps phases
        ("forward", "backward" and, with an optimizer, "step") to kinds to lists
        of bytes. Each phase has at most 160 points, evenly spread over its
        allocations and frees. The largest sum of a point is the peak.
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
        """Bytes of the peak beyond parameters and their gradients."""
        return self.peak_bytes - 2 * self.parameter_bytes

    @property
    def by_kind(self) -> dict[str, int]:
        """Maps kinds to bytes at the peak, in the order of KINDS."""
        found = dict.fromkeys(KINDS, 0)
        for (_, kind), size in self.split.items():
            found[kind] += size
        return found

    def by_module(self, depth: int | None = None) -> dict[str, int]:
        """Maps modules to bytes at the peak, the largest first.

        Arguments
        ---------
        depth : int, optional
            Number of parts of a name to keep: 1 for the model's children.

        Returns
        -------
        dict
            Maps names to bytes, "" for memory outside modules. Sums to the
            peak.
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
    """Counts the memory of forward, backward and, optionally, the optimizer.

    Arguments
    ---------
    build_model : callable
        Returns the torch.nn.Module; called without arguments. Other tensors
        that it makes count as inputs.
    step : tuple of int or callable
        Shape of the float32 input, or a function that calls the model, its
        argument, and returns its output or loss, a tensor.
    optimizer : callable, optional
        Makes an optimizer from the parameters. Two steps then count, so that
        its states exist when activations are largest. On fake tensors the
        passes of the second are taken from the first, unless the first leaves
        tensors behind that could make the second another.
    autocast : torch.dtype, optional
        Dtype of autocast in forward.
    fake : bool
        Whether to use fake tensors, which need no memory and no arithmetic;
        False runs the step. ``no_leftovers`` removes fake tensors that
        build_model, step or the network store in other objects.
    device : str
        Where the step runs with fake=False. On "cuda" the allocator's peak
        is measured too.

    Returns
    -------
    StepMemory
        The counted memory.

    Raises
    ------
    ValueError
        If the step reads a value that fake tensors do not have.

    Example
    -------
    >>> build = lambda: torch.nn.Linear(1000, 1000)
    >>> memory = training_step_memory(build, (8, 1000))
    >>> memory.parameters
    1001000
    >>> memory.by_kind["gradients"]
    4004000

    A custom step, here with a loss:

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
    mode = fake_tensors() if fake else contextlib.nullcontext()
    with mode, StorageTracker(modules=modules) as tracker, modules:
        model = build_model()
        if not fake:
            model.to(device)
        modules.name(model)
        if callable(step):
            forward = step
        else:
            x = torch.zeros(step, device="cpu" if fake else device)

            def forward(model: nn.Module) -> torch.Tensor:
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
                y = forward(model)
            saved = tracker.alive - before
            for block in tracker.blocks[first:]:
                if block.died is None:
                    block.kind = "activations"
            # Forward may have replaced some.
            tracker.label("buffers", _owned(model.named_buffers()))
            tracker.phase = "backward"
            starts["backward"] = tracker.clock
            # A gradient of the output's shape counts as in training.
            y.backward(torch.ones_like(y))
            del y
            owned = list(_owned(model.named_parameters()))
            tracker.label("gradients", ((m, p.grad) for m, p in owned))
            if not updater:
                steps.append((starts, tracker.clock))
                break
            passes = tracker.top
            starts["step"] = tracker.clock
            _update(updater, tracker, owned)
            steps.append((starts, tracker.clock))
            if (
                fake
                and len(steps) == 1
                and tracker.kept(first) * NEGLIGIBLE <= tracker.peak
            ):
                # The second step's passes are the first's, beside the states.
                whole, end = tracker.top, tracker.clock
                tracker.restart()
                _update(updater, tracker, owned)
                if tracker.become_second(passes, whole, starts, end):
                    steps = [(starts, tracker.clock)]
                updater.zero_grad()
                break
            updater.zero_grad()
    # The last step has the peak, unless the first step's allocation of the
    # optimizer's states needs more.
    timeline = max(
        (tracker.timeline(*step) for step in reversed(steps)), key=_highest
    )
    memory = StepMemory(
        parameters=sum(p.numel() for p in weights),
        parameter_bytes=sum(p.numel() * p.element_size() for p in weights),
        saved_bytes=saved,
        peak_bytes=tracker.peak,
        peak_phase=tracker.top.phase,
        peak_module=tracker.top.module,
        split=dict(tracker.at_peak()),
        timeline=timeline,
    )
    if on_gpu:
        peak = torch.cuda.max_memory_allocated(device)
        memory.allocator_bytes = peak - others
    return memory


def _update(
    updater: torch.optim.Optimizer,
    tracker: StorageTracker,
    owned: Iterable[tuple[str, torch.Tensor]],
) -> None:
    """Runs the optimizer's step and labels its states."""
    tracker.phase = "step"
    updater.step()
    for module, parameter in owned:
        states = _tensors(updater.state.get(parameter))
        tracker.label("optimizer states", ((module, x) for x in states))


def _highest(timeline: Timeline) -> int:
    """The peak of a timeline."""
    return max(
        sum(sizes)
        for kinds in timeline.values()
        for sizes in zip(*kinds.values())
    )


def _tensors(state: object) -> Iterator[torch.Tensor]:
    """Yields all tensors of an optimizer's state, including its objects'."""
    for leaf in tree_leaves(state):
        if isinstance(leaf, torch.Tensor):
            yield leaf
        elif hasattr(leaf, "__dict__"):
            yield from _tensors(vars(leaf))


def _owned(
    named: Iterable[tuple[str, torch.Tensor]],
) -> Iterator[tuple[str, torch.Tensor]]:
    """Replaces each tensor's name by the name of its module."""
    for name, tensor in named:
        yield name.rpartition(".")[0], tensor
