"""Drops the tensors that autograd saves in a call; recomputes them in backward.

Every tensor that an operator saves for backward passes through a pair of hooks
(torch.autograd.graph.saved_tensors_hooks). During the call of a block the hooks
give autograd a numbered slot instead of the tensor. When backward opens the first
slot, the block runs again and fills all slots that are still needed. Only the
tensors that enter the block are stored.

The second call runs to its end, and checksums compare its outputs with those of
forward. Any block that does not repeat itself is detected. Stopping after the
last saved tensor would save little (backward needs more memory than the rest of
forward) and would be wrong: RReLU fills a tensor after autograd has saved it.

The graph is autograd's own. Everything that depends on it works as usual:
parameters, their hooks and those of DistributedDataParallel, several outputs,
unused outputs, tensors that a block uses besides its arguments, partial and
double backward.

A segment may span several calls (Chen et al., "Training Deep Nets with
Sublinear Memory Cost", 2016, section 4): an argument that is an output of an
earlier call in the segment is recomputed instead of stored. Code between the
blocks does no harm: a tensor that it changes no longer counts as that output,
and is stored.

Authors
 * The sb_memeff authors 2026
"""

import contextlib
import threading
import weakref
from collections.abc import Callable, Generator, Iterable, Sequence, Set
from dataclasses import dataclass
from itertools import chain
from typing import Any, NoReturn, cast

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import (
    TreeSpec,
    tree_flatten,
    tree_leaves,
    tree_unflatten,
)

from sb_memeff.nnet.replay.mismatch import next_forward, report_mismatches
from sb_memeff.nnet.replay.recorder import (
    Fingerprint,
    Recorder,
    Recording,
    check_fingerprint,
    fingerprint,
)
from sb_memeff.ops.dispatch import has_values
from sb_memeff.ops.summary import checksum

__all__ = ["Segment", "nothing_saved"]


class Segment:
    """Calls that are recomputed together; their slots keep the segment alive.

    Example
    -------
    >>> block = torch.nn.Sequential(
    ...     torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3)
    ... )
    >>> x = torch.rand(2, 3)
    >>> y = Segment().call("block", block, block.forward, (x,), {})
    >>> y.sum().backward()
    >>> block[0].weight.grad.shape
    torch.Size([4, 3])
    """

    def __init__(self):
        # Position of the last call, for the caller that groups calls.
        self.position = -1
        self._calls: list[_Call] = []
        self._values: dict[tuple[int, int], tuple[torch.Tensor, int]] = {}

    def feeds(self, leaves: Iterable[object]) -> bool:
        """Checks whether an object is an unchanged output of the segment.

        Arguments
        ---------
        leaves : iterable
            Tensors and other objects.

        Returns
        -------
        bool
            True if one is.
        """
        return any(self._origin(leaf) is not None for leaf in leaves)

    def changed_state(self) -> list[tuple[nn.Module, str]]:
        """Lists the state of modules that the calls have changed.

        Returns
        -------
        list of tuple
            (module, name) of each buffer, and of each attribute that is no
            tensor. Batch norms' statistics are not listed.
        """
        changes = [cast(Recording, c.recording).changes for c in self._calls]
        return [
            (module, name)
            for change in changes
            for module, name in (*change.buffers, *change.attributes)
            if name in module._buffers
            or not isinstance(vars(module).get(name), torch.Tensor)
        ]

    def call(
        self,
        name: str,
        block: nn.Module,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Calls a function, and drops the tensors that autograd saves in it.

        Arguments
        ---------
        name : str
            The block's name, for messages.
        block : torch.nn.Module
            Module whose parameters and buffers the function uses.
        function : callable
            Function to call. Repeated with the same arguments, it must return
            the same; random numbers, autocast and the state of modules are
            restored for it.
        args : tuple
            Its arguments; tensors may be nested in tuples, lists and dicts.
        kwargs : dict
            Its keyword arguments, likewise.

        Returns
        -------
        any
            Result of the function.

        Raises
        ------
        RuntimeError
            If the function changes a stored argument in place. In backward,
            if the function does not repeat itself.
        """
        if getattr(_inside, "nothing_saved", False):
            return function(*args, **kwargs)
        if not _in_backward():
            # In backward a segment within another one is called again.
            next_forward()
        leaves, structure = tree_flatten((args, kwargs))
        tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
        origins = [self._origin(leaf) for leaf in leaves]
        stored = {
            id(leaf): leaf
            for leaf, origin in zip(leaves, origins)
            if isinstance(leaf, torch.Tensor) and origin is None
        }
        versions = [x._version for x in stored.values()]
        everything = list(chain(tensors, block.parameters(), block.buffers()))
        call = _Call(
            name=name,
            block=block,
            function=function,
            recorder=Recorder(
                _device(everything),
                # Fake tensors draw no random numbers.
                all(map(has_values, everything)),
            ),
            structure=structure,
            sources=_sources(leaves, origins, list(stored)),
            requires_grad=[_requires_grad(leaf) for leaf in leaves],
            storage=_Storage.apply(
                torch.empty(0, requires_grad=True), *stored.values()
            ),
        )
        if _saved_elsewhere():
            call.input_checksums = _checksums(list(stored.values()))
        number = len(self._calls)
        weights = [(p, p._version) for p in block.parameters()]

        def pack(tensor: torch.Tensor) -> "_Slot":
            slot = _Slot(self, number, len(call.slots))
            call.slots.append((weakref.ref(slot), tensor.shape, tensor.dtype))
            return slot

        recorded = call.recorder.recording(block, leaves)
        with recorded as call.recording, saved_tensors_hooks(pack, _open):
            result = function(*args, **kwargs)
        if versions != [x._version for x in stored.values()]:
            raise _changes_its_input(name)
        # For example, Embedding(max_norm) rescales rows of its weight.
        call.written = {
            id(p) for p, version in weights if p._version != version
        }
        call.fingerprint = fingerprint(block, call.written)
        call.outputs = [_reference(leaf) for leaf in tree_leaves(result)]
        # Now, because the caller may change the result in place.
        call.checksums = _checksums(result)
        self._calls.append(call)
        return result

    def _origin(self, leaf: object) -> tuple[int, int] | None:
        """(number of the call, index in its outputs) of a tensor, or None."""
        if isinstance(leaf, torch.Tensor):
            for number, call in enumerate(self._calls):
                for index, (reference, version) in enumerate(call.outputs):
                    if reference() is leaf and version == leaf._version:
                        return number, index
        return None

    def value(self, slot: "_Slot") -> torch.Tensor:
        """Returns the tensor of a slot; only once."""
        if slot.call >= len(self._calls):
            raise RuntimeError(
                "A block that calls backward inside its own forward cannot "
                "be computed again; do not name it."
            )
        key = (slot.call, slot.index)
        if key not in self._values:
            self._recompute()
        tensor, version = self._values.pop(key)
        if tensor._version != version:
            call = self._calls[slot.call]
            raise RuntimeError(
                f"{call.name}: a tensor of shape {tuple(tensor.shape)} that "
                f"backward needs was changed in place after forward."
            )
        return tensor

    def _recompute(self) -> None:
        last = max(
            n for n, call in enumerate(self._calls) if call.needed_slots()
        )
        calls = self._calls[: last + 1]
        for call in calls:
            check_fingerprint(
                call.fingerprint, call.block, "recompute", f"{call.name}."
            )
        results = []
        with torch.enable_grad():
            for number, call in enumerate(calls):
                values, result = call.replay(results)
                results.append(tree_leaves(result))
                for index, value in values.items():
                    self._values[number, index] = value


@contextlib.contextmanager
def nothing_saved() -> Generator[None, None, None]:
    """Makes autograd save no tensors; graphs built inside are not usable.

    Segments inside are plain calls, since nothing is saved.

    Yields
    ------
    None

    Example
    -------
    >>> x = torch.rand(3, requires_grad=True)
    >>> with nothing_saved():
    ...     y = x.exp()
    >>> y.sum().backward()
    Traceback (most recent call last):
        ...
    RuntimeError: A function of a reversible block calls backward in its own \
forward; set save_memory=False.
    """
    before = getattr(_inside, "nothing_saved", False)
    _inside.nothing_saved = True
    try:
        with saved_tensors_hooks(lambda tensor: None, _never_opened):
            yield
    finally:
        _inside.nothing_saved = before


_inside = threading.local()


def _never_opened(nothing: object) -> NoReturn:
    raise RuntimeError(
        "A function of a reversible block calls backward in its own forward; "
        "set save_memory=False."
    )


def _changes_its_input(name: str) -> RuntimeError:
    return RuntimeError(
        f"{name} cannot be computed again: it changes its input in place, but "
        f"only the input is stored. Set inplace=False in it, or do not name "
        f"it."
    )


class _Slot:
    """Stands for a tensor in the graph. Holds the segment, never the reverse."""

    __slots__ = ("segment", "call", "index", "__weakref__")

    def __init__(self, segment: Segment, call: int, index: int):
        self.segment = segment
        self.call = call
        self.index = index


def _open(slot: _Slot) -> torch.Tensor:
    return slot.segment.value(slot)


class _Storage(torch.autograd.Function):
    """Stores tensors as autograd does.

    Changes in place are detected, and hooks around the call apply: an outer
    segment drops the tensors, ``save_on_cpu`` moves them.
    """

    @staticmethod
    def forward(
        ctx: Any, anchor: torch.Tensor, *tensors: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(*tensors)
        return torch.empty(0)

    @staticmethod
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, gradient: torch.Tensor) -> NoReturn:
        raise AssertionError("nothing depends on this output")


@dataclass(eq=False)
class _Call:
    """One call of a block, with everything needed to repeat it."""

    name: str
    block: torch.nn.Module
    function: Callable[..., Any]
    recorder: Recorder
    structure: TreeSpec
    sources: list[tuple[str, Any]]
    requires_grad: list[bool]
    storage: torch.Tensor
    recording: Recording | None = None
    # Parameters that the call changed in place, by id.
    written: Set[int] = frozenset()
    fingerprint: Fingerprint = ([], [], frozenset())
    outputs: Sequence[tuple[Callable[[], object], int | None]] = ()
    checksums: Sequence[torch.Tensor] = ()
    input_checksums: Sequence[torch.Tensor] = ()

    def __post_init__(self) -> None:
        # (weak reference, shape, dtype) of each tensor that autograd saves.
        self.slots: list[
            tuple[weakref.ref[_Slot], torch.Size, torch.dtype]
        ] = []
        self.input_differs: list[torch.Tensor] = []

    def needed_slots(self) -> set[int]:
        """Indices of the slots that the graph still holds."""
        return {i for i, (slot, *_) in enumerate(self.slots) if slot()}

    def arguments(
        self, results: list[list[Any]]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments, given the outputs of the segment's earlier calls."""
        stored = cast(Any, self.storage.grad_fn).saved_tensors
        if self.input_checksums:
            # The caller's hooks may store tensors in lower precision, and then
            # the outputs may differ.
            self.input_differs = list(
                map(torch.ne, _checksums(stored), self.input_checksums)
            )
        leaves = []
        for (kind, source), needed in zip(self.sources, self.requires_grad):
            if kind == "stored":
                source = stored[source]
            elif kind == "computed":
                number, index = source
                source = results[number][index]
                if source.requires_grad != needed:
                    # The caller changed it between the calls.
                    source = source.detach().requires_grad_(needed)
            leaves.append(source)
        return tree_unflatten(leaves, self.structure)

    def replay(
        self, results: list[list[Any]]
    ) -> tuple[dict[int, tuple[torch.Tensor, int]], Any]:
        """Repeats the call.

        Returns
        -------
        tuple
            {index: (tensor, version)} of all needed slots, and the result.
        """
        needed = self.needed_slots()
        values = {}
        count = 0

        def keep(tensor: torch.Tensor) -> None:
            nonlocal count
            self._check_repetition(count, tensor)
            if count in needed:
                # Detached, because the graph of the replay is not used.
                values[count] = (tensor.detach(), tensor._version)
            count += 1

        args, kwargs = self.arguments(results)
        recording = cast(Recording, self.recording)
        copied = _parameters_copied(self.block, self.written)
        with self.recorder.replay(self.block, recording), copied:
            with saved_tensors_hooks(keep, _open):
                result = self.function(*args, **kwargs)
        if count != len(self.slots):
            self._does_not_repeat(f"saved {count} tensors")
        self._compare(_checksums(result))
        return values, result

    def _compare(self, checksums: list[torch.Tensor]) -> None:
        """Reports outputs that are not those of forward, bit for bit."""
        if len(checksums) != len(self.checksums):
            self._does_not_repeat(f"returned {len(checksums)} tensors")
        message = _REPEAT.format(
            name=self.name, reason="its output differs from that of forward"
        )
        by_device = {}
        for a, b in zip(self.checksums, checksums):
            if a.device != b.device or a.dtype != b.dtype:
                self._does_not_repeat("returned another dtype or device")
            by_device.setdefault(a.device, []).append(a != b)
        for device, differs in by_device.items():
            differs = torch.stack(differs)
            for flag in self.input_differs:
                differs &= ~flag.to(device)
            report_mismatches(differs, lambda number: message)

    def _check_repetition(self, index: int, tensor: torch.Tensor) -> None:
        shape, dtype = torch.Size(), None
        if index < len(self.slots):
            _, shape, dtype = self.slots[index]
        if (tensor.shape, tensor.dtype) != (shape, dtype):
            self._does_not_repeat(
                f"saved {tensor.dtype} {tuple(tensor.shape)} as number {index}"
            )

    def _does_not_repeat(self, difference: str) -> NoReturn:
        raise RuntimeError(
            _REPEAT.format(
                name=self.name,
                reason=f"the second time it {difference}, unlike the first",
            )
        )


_REPEAT = (
    "{name} cannot be computed again: {reason}. A second call with the same "
    "input must return the same. Random numbers of torch, Python and numpy, "
    "and its modules' buffers, attributes and generators are restored. State "
    "elsewhere (globals, closures, other objects, files, the clock) is not, "
    "and a kernel may be nondeterministic (see "
    "torch.use_deterministic_algorithms). Do not name this block, or move its "
    "state into attributes of its modules. To continue training nevertheless: "
    "sb_memeff.nnet.replay.set_mismatch_action('warn')."
)


def _checksums(result: object) -> list[torch.Tensor]:
    """Checksums of the tensors that have readable values."""
    return [
        checksum(leaf.detach().resolve_conj().resolve_neg())
        for leaf in tree_leaves(result)
        # Others have no values, or store them elsewhere.
        if type(leaf) in (torch.Tensor, torch.nn.Parameter)
        and leaf.layout == torch.strided
        and leaf.device.type != "meta"
        and not leaf.is_quantized
    ]


@contextlib.contextmanager
def _parameters_copied(
    block: nn.Module, written: Set[int]
) -> Generator[None, None, None]:
    """Replaces the parameters with the given ids by copies.

    A second call must not write to them again, because other graphs may need
    their current values.
    """
    replaced: list[tuple[dict[str, Any], str, Any]] = []
    copies: dict[int, torch.Tensor] = {}
    for part in block.modules() if written else ():
        for name, parameter in part._parameters.items():
            if id(parameter) in written:
                replaced.append((part._parameters, name, parameter))
                written_to = cast(torch.nn.Parameter, parameter)
                copy = written_to.detach().clone()
                copy.requires_grad_(written_to.requires_grad)
                copies.setdefault(id(parameter), copy)
    for parameters, name, parameter in replaced:
        parameters[name] = copies[id(parameter)]
    try:
        yield
    finally:
        for parameters, name, parameter in replaced:
            parameters[name] = parameter


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _saved_elsewhere() -> bool:
    """Whether hooks of the caller store saved tensors in another way."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def _requires_grad(leaf: object) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.requires_grad


def _sources(
    leaves: list[Any], origins: list[tuple[int, int] | None], stored: list[int]
) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for leaf, origin in zip(leaves, origins):
        if origin is not None:
            found.append(("computed", origin))
        elif isinstance(leaf, torch.Tensor):
            # A tensor passed twice must be one object again: attention tests
            # whether query and key are the same object.
            found.append(("stored", stored.index(id(leaf))))
        else:
            found.append(("given", leaf))
    return found


def _reference(leaf: object) -> tuple[Callable[[], object], int | None]:
    if isinstance(leaf, torch.Tensor):
        return weakref.ref(leaf), leaf._version
    return (lambda: None), None


def _device(tensors: Iterable[torch.Tensor]) -> torch.device:
    for tensor in tensors:
        if tensor.device.type not in ("cpu", "meta"):
            return tensor.device
    return torch.device("cpu")
