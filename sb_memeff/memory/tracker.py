"""Tracks storages in use by kind, module and phase.

Authors
 * The sb_memeff authors 2026
"""

import bisect
import weakref
from collections import Counter
from collections.abc import Collection, Iterable
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._ops import OpOverload
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode

from sb_memeff.memory.arguments import tensors_in
from sb_memeff.utils.hooks import only_observes

__all__ = ["KINDS", "ModuleTracker", "StorageTracker", "Timeline"]

# Kinds of memory, in the order of tables and pictures. "inputs" is the batch.
# "activations" are made in forward and kept for backward. "recomputed" ones are
# made by a module that runs again in backward. "temporaries" are all others,
# mainly gradients of activations.
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

# Phase to kind to bytes.
Timeline = dict[str, dict[str, list[int]]]
# Points of a phase in a timeline; a picture cannot show more.
POINTS = 160


class Block:
    """A storage: its size, lifetime and origin.

    Arguments
    ---------
    size : int
        Size in bytes.
    born : int
        Time of allocation, counted in allocations and frees.
    phase : str
        "build", "forward", "backward" or "step".
    module : str
        Name of the module.
    recomputed : bool
        Whether a module's forward made it in backward.
    """

    __slots__ = ("size", "born", "died", "phase", "module", "kind")

    def __init__(
        self, size: int, born: int, phase: str, module: str, recomputed: bool
    ):
        self.size, self.born = size, born
        self.died: int | None = None
        self.phase, self.module = phase, module
        self.kind = "recomputed" if recomputed else "temporaries"


class Top(NamedTuple):
    """A peak: its bytes, its time, and what was running."""

    peak: int
    time: int
    phase: str
    module: str


class StorageTracker(TorchDispatchMode):
    """Counts the bytes of storages in use, and their peak.

    Every tensor that an operator takes or returns while the mode is active is
    counted until its storage is freed. Views and in-place results share a
    storage and count once. Memory within an operator (a convolution's
    workspace) is not counted.

    Arguments
    ---------
    exclude : iterable of torch.Tensor
        Existing tensors, whose storages are not counted.
    modules : ModuleTracker, optional
        Tracks the running module.

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
        exclude: Iterable[torch.Tensor] = (),
        modules: "ModuleTracker | None" = None,
    ):
        super().__init__()
        self.alive = 0
        self.phase = "build"
        self.blocks: list[Block] = []
        self.clock = 0
        self._modules = modules
        self._known: weakref.WeakKeyDictionary[
            torch.UntypedStorage, Block | None
        ] = weakref.WeakKeyDictionary(
            (x.untyped_storage(), None) for x in exclude
        )
        self.restart()

    def restart(self) -> None:
        """Resets the peak."""
        self.top = Top(self.alive, self.clock, self.phase, "")

    @property
    def peak(self) -> int:
        """The most bytes in use since ``restart``."""
        return self.top.peak

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Collection[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Runs the operator and counts its arguments and results."""
        if func is torch.ops.prim.device.default:
            # More than half of all calls: autograd asks each fake tensor.
            return args[0].device
        result = func(*args, **(kwargs or {}))
        found = tensors_in(result)
        if func is not torch.ops.aten.lift_fresh.default:
            # Constants are not new.
            found += tensors_in(args) + tensors_in(kwargs)
        for tensor in found:
            self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
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
        if self.alive > self.top.peak:
            self.top = Top(self.alive, self.clock, self.phase, module)
        weakref.finalize(storage, self._free, block)

    def _free(self, block: Block) -> None:
        self.clock += 1
        block.died = self.clock
        self.alive -= block.size

    def label(self, kind: str, tensors: Iterable[tuple[str, object]]) -> None:
        """Sets the kind of tensors.

        Arguments
        ---------
        kind : str
            One of KINDS.
        tensors : iterable of tuple
            Pairs (name of the module, tensor). Other objects and excluded
            tensors are skipped.
        """
        for module, tensor in tensors:
            block = None
            if isinstance(tensor, torch.Tensor):
                block = self._known.get(tensor.untyped_storage())
            if block is not None:
                block.kind, block.module = kind, module

    def alive_since(self, time: int) -> list[Block]:
        """Lists the storages in use that were allocated after a time.

        Arguments
        ---------
        time : int
            The time.

        Returns
        -------
        list of Block
            The storages.
        """
        return [x for x in self.blocks if x.born > time and x.died is None]

    def freed(self, begin: int, end: int) -> list[Block]:
        """Lists the storages that were in use at one time and free by another.

        Arguments
        ---------
        begin : int
            The first time.
        end : int
            The last time.

        Returns
        -------
        list of Block
            The storages.
        """
        return [
            x
            for x in self.blocks
            if x.born <= begin and x.died is not None and begin < x.died <= end
        ]

    def alive_at(self, time: int) -> Counter[tuple[str, str]]:
        """Returns the memory in use at a time, such as the peak's.

        Arguments
        ---------
        time : int
            The time.

        Returns
        -------
        collections.Counter
            Maps (module, kind) to bytes.
        """
        found = Counter()
        for block in self.blocks:
            if block.born <= time and (block.died is None or block.died > time):
                found[block.module, block.kind] += block.size
        return found

    def timeline(self, begin: int, end: int) -> dict[str, list[int]]:
        """Returns the memory in use from one time to another.

        Call it after ``label``: a gradient counts as a temporary until it is
        labelled.

        Arguments
        ---------
        begin : int
            The first time.
        end : int
            The last time.

        Returns
        -------
        dict
            Maps kinds to lists of bytes. The time is divided into equal parts.
            Each point is the peak of one part.
        """
        changes = {kind: [0] * (end - begin + 1) for kind in KINDS}
        for block in self.blocks:
            died = end + 1 if block.died is None else block.died
            if block.born <= end and died > begin:
                changes[block.kind][max(block.born - begin, 0)] += block.size
                if died <= end:
                    changes[block.kind][died - begin] -= block.size
        alive = {kind: list(accumulate(x)) for kind, x in changes.items()}
        totals = [sum(sizes) for sizes in zip(*alive.values())]
        count = min(POINTS, len(totals))
        cuts = [len(totals) * i // count for i in range(count + 1)]
        # Keep each part's peak.
        shown = [
            max(range(i, j), key=totals.__getitem__)
            for i, j in zip(cuts, cuts[1:])
        ]
        return {
            kind: [sizes[i] for i in shown] for kind, sizes in alive.items()
        }


class ModuleTracker:
    """Tracks the running module; in backward, the module of the current node.

    Autograd numbers nodes in the order of their creation, so a node's number
    identifies the module that made it.

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
        """Sets the names of a model's modules.

        Arguments
        ---------
        model : torch.nn.Module
            The model.
        """
        self._names.update((m, name) for name, m in model.named_modules())

    def __enter__(self) -> "ModuleTracker":
        """Installs the hooks."""
        self._hooks = [
            only_observes(register_module_forward_pre_hook(self._enter)),
            only_observes(
                register_module_forward_hook(self._leave, always_call=True)
            ),
        ]
        return self

    def __exit__(self, *error: object) -> None:
        """Removes the hooks."""
        for hook in self._hooks:
            hook.remove()

    def current(self) -> tuple[str, bool]:
        """Returns the current module.

        Returns
        -------
        tuple
            Its name ("" if unknown), and whether its forward is running.
        """
        if self._stack:
            return self._stack[-1], True
        node = torch._C._current_autograd_node()
        if node is None:
            return "", False
        number = node._sequence_nr()
        index = bisect.bisect_right(self._numbers, number) - 1
        return self._makers[index], False

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
