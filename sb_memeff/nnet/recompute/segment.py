"""Forget what autograd saves inside a call; compute it again when asked for.

Every tensor that an operator keeps for backward passes a pair of functions
(torch.autograd.graph.saved_tensors_hooks). During the call of a block they
hand autograd a numbered slot instead of the tensor; when backward opens the
first slot, the block runs once more and fills all that are still wanted. Only
what enters from outside is stored.

The block runs to its end, and its outputs are compared with those of forward
by a checksum: code that does something else at each call is noticed, whatever
the reason. Leaving after the last tensor that is saved would save nothing
worth having (backward needs more memory than the rest of forward), and would
be wrong: RReLU fills a tensor after autograd has saved it.

The graph stays autograd's own. All that hangs on it is therefore as without:
parameters, their hooks and DistributedDataParallel's, several outputs and
those that nobody uses, tensors that a block finds elsewhere than among its
arguments, partial and double backward.

A segment may span several calls (Chen et al., "Training Deep Nets with
Sublinear Memory Cost", 2016, section 4): an argument that is an output of an
earlier call of the segment is not stored, but computed again with it. Code
between the blocks does no harm: a tensor that it has changed is no longer
that output, and is stored.

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
    """Calls that are computed again together; their slots keep it alive.

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
        # For whoever decides what belongs together: where the last call was.
        self.position = -1
        self._calls: list[_Call] = []
        self._values: dict[tuple[int, int], tuple[torch.Tensor, int]] = {}

    def feeds(self, leaves: Iterable[object]) -> bool:
        """Whether one of these is an output of the segment, unchanged.

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

    def call(
        self,
        name: str,
        block: nn.Module,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Calls a function, and makes autograd forget what it saves.

        Arguments
        ---------
        name : str
            The block's name, for messages.
        block : torch.nn.Module
            Whose parameters and buffers the function uses.
        function : callable
            What to call. It must do the same when it is called again with
            the same arguments; random numbers, autocast and the state of
            modules are looked after.
        args : tuple
            Its arguments; tensors may be nested in tuples, lists and dicts.
        kwargs : dict
            The same, by name.

        Returns
        -------
        any
            What the function returns.

        Raises
        ------
        RuntimeError
            If the function changes an argument in place that would have to
            be stored. In backward, if it cannot be repeated.
        """
        if getattr(_inside, "nothing_saved", False):
            return function(*args, **kwargs)
        if not _in_backward():
            # A segment within another one is called again in backward.
            next_forward()
        leaves, structure = tree_flatten((args, kwargs))
        tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
        origins = [self._origin(leaf) for leaf in leaves]
        stored = {
            id(leaf): leaf
            for leaf, origin in zip(leaves, origins, strict=True)
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

        with (
            call.recorder.recording(block, leaves) as call.recording,
            saved_tensors_hooks(pack, _open),
        ):
            result = function(*args, **kwargs)
        if versions != [x._version for x in stored.values()]:
            raise _changes_its_input(name)
        # Embedding(max_norm) shortens rows of its weight, for example.
        call.written = {
            id(p) for p, version in weights if p._version != version
        }
        call.fingerprint = fingerprint(block, call.written)
        call.outputs = [_reference(leaf) for leaf in tree_leaves(result)]
        # Now: the caller may go on in place.
        call.checksums = _checksums(result)
        self._calls.append(call)
        return result

    def _origin(self, leaf: object) -> tuple[int, int] | None:
        """(number of the call, place in its output) that a tensor is."""
        if isinstance(leaf, torch.Tensor):
            for number, call in enumerate(self._calls):
                for place, (reference, version) in enumerate(call.outputs):
                    if reference() is leaf and version == leaf._version:
                        return number, place
        return None

    def value(self, slot: "_Slot") -> torch.Tensor:
        """The tensor that a slot stands for; it is handed out once."""
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
                f"backward needs was changed in place afterwards."
            )
        return tensor

    def _recompute(self) -> None:
        last = max(n for n, call in enumerate(self._calls) if call.wanted())
        calls = self._calls[: last + 1]
        for call in calls:
            check_fingerprint(
                call.fingerprint, call.block, "recompute", f"{call.name}."
            )
        results = []
        with torch.enable_grad():
            for number, call in enumerate(calls):
                values, result = call.again(results)
                results.append(tree_leaves(result))
                for index, value in values.items():
                    self._values[number, index] = value


@contextlib.contextmanager
def nothing_saved() -> Generator[None, None, None]:
    """Inside, autograd keeps no tensor: no graph that is built can be used.

    Segments inside are plain calls, for they have nothing to forget.

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
        f"{name} cannot be computed again: it changes its input in place, and "
        f"the input is all that would be stored. Set inplace=False in it, or "
        f"do not name it."
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
    """Keeps tensors as autograd does.

    Changes in place are found, and the hooks that are active around the call
    apply: an outer segment forgets them, ``save_on_cpu`` moves them.
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
    """One call of a block, and how to repeat it."""

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
        # (weak reference, shape, dtype) of all that autograd wanted to save.
        self.slots: list[
            tuple[weakref.ref[_Slot], torch.Size, torch.dtype]
        ] = []
        self.input_differs: list[torch.Tensor] = []

    def wanted(self) -> set[int]:
        """Indices of the slots that the graph still holds."""
        return {i for i, (slot, *_) in enumerate(self.slots) if slot()}

    def arguments(
        self, results: list[list[Any]]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments, given the outputs of the segment's earlier calls."""
        stored = cast(Any, self.storage.grad_fn).saved_tensors
        if self.input_checksums:
            # The caller's hooks may store less than the whole tensor, and
            # then the outputs may differ.
            self.input_differs = list(
                map(torch.ne, _checksums(stored), self.input_checksums)
            )
        leaves = []
        for (kind, what), needed in zip(
            self.sources, self.requires_grad, strict=True
        ):
            if kind == "stored":
                what = stored[what]
            elif kind == "computed":
                number, place = what
                what = results[number][place]
                if what.requires_grad != needed:
                    # The caller said so, between the calls.
                    what = what.detach().requires_grad_(needed)
            leaves.append(what)
        return tree_unflatten(leaves, self.structure)

    def again(
        self, results: list[list[Any]]
    ) -> tuple[dict[int, tuple[torch.Tensor, int]], Any]:
        """Repeats the call.

        Returns
        -------
        tuple
            {index: (tensor, version)} for all slots that are wanted, and the
            result.
        """
        wanted = self.wanted()
        values = {}
        count = 0

        def keep(tensor: torch.Tensor) -> None:
            nonlocal count
            self._check_repetition(count, tensor)
            if count in wanted:
                # Without its history: that graph is not the one in use.
                values[count] = (tensor.detach(), tensor._version)
            count += 1

        args, kwargs = self.arguments(results)
        with (
            self.recorder.replay(self.block, cast(Recording, self.recording)),
            _parameters_copied(self.block, self.written),
            saved_tensors_hooks(keep, _open),
        ):
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
            name=self.name, what="its output differs from that of forward"
        )
        by_device = {}
        for a, b in zip(self.checksums, checksums, strict=True):
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
                f"saved {tensor.dtype} {tuple(tensor.shape)} at place {index}"
            )

    def _does_not_repeat(self, what: str) -> NoReturn:
        raise RuntimeError(
            _REPEAT.format(
                name=self.name,
                what=f"the second time it {what}, unlike the first",
            )
        )


_REPEAT = (
    "{name} cannot be computed again: {what}. It must do the same when called "
    "again with the same input. Random numbers of torch, Python and numpy are "
    "repeated, and so are buffers, attributes of its modules, and generators "
    "among those; nothing that lies elsewhere (in globals, closures, other "
    "objects, files, the clock) is, nor a kernel that is not deterministic "
    "(see torch.use_deterministic_algorithms). Do not name this block, or "
    "move its state to where it is repeated. To train on nevertheless: "
    "sb_memeff.nnet.replay.set_mismatch_action('warn')."
)


def _checksums(result: object) -> list[torch.Tensor]:
    """A checksum of each tensor that has bits to look at."""
    return [
        checksum(leaf.detach().resolve_conj().resolve_neg())
        for leaf in tree_leaves(result)
        # Others are analysed, not computed, or hold their values elsewhere.
        if type(leaf) in (torch.Tensor, torch.nn.Parameter)
        and leaf.layout == torch.strided
        and leaf.device.type != "meta"
        and not leaf.is_quantized
    ]


@contextlib.contextmanager
def _parameters_copied(
    block: nn.Module, written: Set[int]
) -> Generator[None, None, None]:
    """Modules work on copies of the parameters whose ids are given.

    A second call must not write them again: other graphs may need them as
    they are now.
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
    for place, name, parameter in replaced:
        place[name] = copies[id(parameter)]
    try:
        yield
    finally:
        for place, name, parameter in replaced:
            place[name] = parameter


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _saved_elsewhere() -> bool:
    """Whether hooks of the caller decide how saved tensors are stored."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def _requires_grad(leaf: object) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.requires_grad


def _sources(
    leaves: list[Any], origins: list[tuple[int, int] | None], stored: list[int]
) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for leaf, origin in zip(leaves, origins, strict=True):
        if origin is not None:
            found.append(("computed", origin))
        elif isinstance(leaf, torch.Tensor):
            # One tensor given twice is one tensor again: attention asks
            # whether its query is its key.
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
