"""Peak memory of a training step, without a GPU and without the arithmetic.

Authors
 * The sb_memeff authors 2026
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from sb_memeff.memory.fake import fake_tensors
from sb_memeff.memory.leftovers import no_leftovers
from sb_memeff.memory.tracker import (
    KINDS,
    Block,
    ModuleTracker,
    StorageTracker,
    Timeline,
    Top,
)

__all__ = ["StepMemory", "training_step_memory"]

# What a step leaves behind besides gradients and states is negligible if it is
# smaller than the peak by this factor.
NEGLIGIBLE = 1000
# Kinds that a step makes for the next ones.
LASTING = ("gradients", "optimizer states")


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
        passes of the second are taken from the first, unless tensors that the
        first leaves behind could change them.
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
    others = 0
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
        amp = torch.autocast(kind, autocast, enabled=bool(autocast))
        run = _Run(tracker, model, forward, updater, amp)
        run.step()
        steps = [dict(run.phases)]
        if updater and fake:
            steps = run.second_of_fakes()
        elif updater:
            run.step()
            steps.append(run.phases)
    # The last step has the peak, unless the first step's allocation of the
    # optimizer's states needs more.
    phases = max(reversed(steps), key=lambda step: _highest(step).peak)
    top = _highest(phases)
    memory = StepMemory(
        parameters=sum(p.numel() for p in weights),
        parameter_bytes=sum(p.numel() * p.element_size() for p in weights),
        saved_bytes=run.saved,
        peak_bytes=top.peak,
        peak_phase=top.phase,
        peak_module=top.module,
        split=dict(tracker.alive_at(top.time)),
        timeline={
            name: tracker.timeline(phase.begin, phase.end)
            for name, phase in phases.items()
        },
    )
    if on_gpu:
        peak = torch.cuda.max_memory_allocated(device)
        memory.allocator_bytes = peak - others
    return memory


class _Phase(NamedTuple):
    """A phase: its begin and end in the tracker's time, and its peak."""

    begin: int
    end: int
    top: Top


def _highest(step: dict[str, _Phase]) -> Top:
    """The peak of a step; the first of equals."""
    return max((phase.top for phase in step.values()), key=lambda top: top.peak)


class _Run:
    """Runs training steps.

    Arguments
    ---------
    tracker : StorageTracker
        Counts the memory.
    model : torch.nn.Module
        The model.
    call : callable
        Calls the model and returns its output.
    updater : torch.optim.Optimizer or None
        The optimizer.
    autocast : torch.autocast
        Around forward.

    Attributes
    ----------
    phases : dict
        The last run of each phase.
    saved : int
        Bytes that the last forward made for backward.
    """

    def __init__(
        self,
        tracker: StorageTracker,
        model: nn.Module,
        call: Callable[[Any], torch.Tensor],
        updater: torch.optim.Optimizer | None,
        autocast: torch.autocast,
    ):
        self.phases: dict[str, _Phase] = {}
        self.saved = 0
        self._tracker, self._model = tracker, model
        self._call, self._updater, self._autocast = call, updater, autocast
        self._output: torch.Tensor | None = None
        # Bytes in use after the last forward.
        self._alive = 0

    def step(self) -> None:
        """Runs a whole step."""
        if self._updater:
            self._updater.zero_grad()
        self._forward()
        self._backward()
        if self._updater:
            self._update()

    def second_of_fakes(self) -> list[dict[str, _Phase]]:
        """Counts a second step, and runs only what it needs for that.

        Its passes are those of the first step plus the optimizer's states,
        unless the first leaves other tensors behind, such as new buffers. They
        are in use in the second forward, which then runs. The backward after it
        is the first's if as many bytes are in use before it. A whole second
        step runs if the optimizer keeps, replaces or frees other tensors than
        the outputs that a hook releases after its step.

        Returns
        -------
        list of dict
            One of these steps has the peak.
        """
        tracker, updater = self._tracker, cast(Any, self._updater)
        first, alive = dict(self.phases), self._alive
        made = tracker.alive_since(first["forward"].begin)
        states = [block for block in made if block.kind == "optimizer states"]
        gradients = [block for block in made if block.kind == "gradients"]
        leftovers = _bytes(x for x in made if x.kind not in LASTING)
        # With the same gradients. If the first update's last act was to free
        # tensors of its step, such as outputs, the second frees as many.
        self._update()
        update, (begin, end, _) = self.phases["step"], first["step"]
        freed = tracker.freed(begin, end)
        second = {
            **{name: _more(x, states) for name, x in first.items()},
            "step": _more(update, freed),
        }
        updater.zero_grad()
        if (
            any(block.born <= begin for block in states)
            or any(block.died is None for block in gradients)
            or any(
                block.kind in LASTING
                or block.born <= first["forward"].begin
                or cast(int, block.died) <= end - len(freed)
                for block in freed
            )
        ):
            self.step()
            return [first, self.phases]
        if leftovers * NEGLIGIBLE > _highest(first).peak:
            self._forward()
            if self._alive != alive + _bytes(states):
                self._backward()
                self._update()
                return [first, self.phases]
            self._output = None
            second["forward"] = self.phases["forward"]
        if _highest(first).peak > _highest(second).peak:
            return [first]
        for block in states:
            block.born = first["forward"].begin
        for block in freed:
            # After the peak, however short the second update is.
            died = cast(int, block.died) + update.end - end
            block.died = max(died, update.top.time + 1)
        return [second]

    @contextlib.contextmanager
    def _phase(self, name: str) -> Generator[None, None, None]:
        tracker = self._tracker
        tracker.phase = name
        tracker.restart()
        begin = tracker.clock
        yield
        self.phases[name] = _Phase(begin, tracker.clock, tracker.top)

    def _forward(self) -> None:
        tracker, number = self._tracker, len(self._tracker.blocks)
        before = tracker.alive
        with self._phase("forward"), self._autocast:
            self._output = self._call(self._model)
        self._alive = tracker.alive
        self.saved = self._alive - before
        for block in tracker.blocks[number:]:
            if block.died is None:
                block.kind = "activations"
        # Forward may have replaced some.
        tracker.label("buffers", _owned(self._model.named_buffers()))

    def _backward(self) -> None:
        with self._phase("backward"):
            output = cast(torch.Tensor, self._output)
            # A gradient of the output's shape counts as in training.
            output.backward(torch.ones_like(output))
            self._output = output = None
        owned = _owned(self._model.named_parameters())
        self._tracker.label("gradients", ((m, p.grad) for m, p in owned))

    def _update(self) -> None:
        updater = cast(Any, self._updater)
        with self._phase("step"):
            updater.step()
        for module, parameter in _owned(self._model.named_parameters()):
            states = _tensors(updater.state.get(parameter))
            self._tracker.label(
                "optimizer states", ((module, x) for x in states)
            )


def _more(phase: _Phase, blocks: Iterable[Block]) -> _Phase:
    """The phase with the memory of further blocks."""
    top = phase.top._replace(peak=phase.top.peak + _bytes(blocks))
    return phase._replace(top=top)


def _bytes(blocks: Iterable[Block]) -> int:
    return sum(block.size for block in blocks)


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
