"""Removes fake tensors that an analysis leaves in other objects.

Networks cache tensors: SpeechBrain keeps the sines of its rotary positions for
the whole process, others use ``functools.cache``, a dict of their module or an
attribute. A fake tensor in such a cache breaks the training that follows.

Authors
 * The sb_memeff authors 2026
"""

import contextlib
import functools
import gc
import types
from collections import OrderedDict, defaultdict, deque
from collections.abc import Generator, Iterable, Iterator
from typing import Any

from speechbrain.utils.logger import get_logger
from torch._subclasses.fake_tensor import FakeTensor

from sb_memeff.memory.imports import around_imports

__all__ = ["no_leftovers"]

logger = get_logger(__name__)

# Types whose contents do not change, or are in a separate dict.
_FIXED = (
    type,
    types.ModuleType,
    types.BuiltinFunctionType,
    types.GetSetDescriptorType,
    types.MemberDescriptorType,
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
    types.ClassMethodDescriptorType,
    types.GenericAlias,
    types.FrameType,
)
_SEQUENCES = (list, set, deque)
_CONTAINERS = (dict, *_SEQUENCES)


@contextlib.contextmanager
def no_leftovers() -> Generator[None, None, None]:
    """Removes fake tensors made within the context from all other objects.

    If an entry of a container, an attribute, a variable of a closure or a
    cached result leads to such a tensor, its old value is restored, or it is
    removed if it is new. All other changes remain. Local variables of running
    functions are not examined; use it as a decorator, so that the function has
    returned.

    If a tensor cannot be removed, a warning names the object. Examining all
    objects of a process takes some tenths of a second; they are frozen
    (``gc.freeze``) within the context, and none is afterwards. Within another
    ``no_leftovers``, the old values are those before the outer one.

    Example
    -------
    >>> import torch
    >>> memo = {"zeros": None}
    >>> @no_leftovers()
    ... def analysis():
    ...     with torch._subclasses.fake_tensor.FakeTensorMode():
    ...         memo.update(zeros=torch.zeros(3), ones=torch.ones(3), calls=1)
    >>> analysis()
    >>> sorted(memo.items())
    [('calls', 1), ('zeros', None)]
    """
    if _snapshots:
        try:
            yield
        finally:
            _snapshots[0].restore()
        return
    snapshot = _Snapshot()
    _snapshots.append(snapshot)
    try:
        # Objects that a module makes when it is imported must stay.
        with around_imports(snapshot.extended):
            yield
    finally:
        _snapshots.clear()
        try:
            snapshot.restore()
        finally:
            snapshot.release()


# The snapshot of the outermost analysis, if one is running.
_snapshots: list["_Snapshot"] = []


class _Snapshot:
    """All objects of the process, with their contents at construction."""

    def __init__(self):
        # Keeps the objects alive, so that no id is used twice.
        self._objects: list[list[Any]] = []
        # Maps ids to (container, copy of its contents).
        self._contents: dict[int, tuple[Any, Any]] = {}
        self._slots: dict[int, dict[types.MemberDescriptorType, Any]] = {}
        self._fakes: set[int] = set()
        self._classes: list[type] = []
        with _without_collector():
            self._add(gc.get_objects())
            # The collector lists and examines only new objects from here on.
            gc.freeze()

    @contextlib.contextmanager
    def extended(self, module: types.ModuleType) -> Generator[None, None, None]:
        """Adds a module and the objects made within the context."""
        # Empties the youngest generation.
        gc.collect(0)
        with _without_collector():
            yield
            self._add([*gc.get_objects(generation=0), vars(module)])

    def _add(self, objects: list[Any]) -> None:
        self._objects.append(objects)
        by_type = defaultdict(list)
        for one in objects:
            by_type[type(one)].append(one)
        for kind, found in by_type.items():
            if kind is FakeTensor:
                self._fakes.update(map(id, found))
            if issubclass(kind, type):
                self._classes += found
            if issubclass(kind, _FIXED):
                continue
            if issubclass(kind, dict):
                self._hold(found, map(dict.copy, found))
            elif issubclass(kind, _SEQUENCES):
                self._hold(found, map(list, found))
            elif kind is types.CellType:
                self._hold(found, map(_content, found))
            elif _has_attributes(kind):
                spaces = [x for x in map(_attributes, found) if x is not None]
                self._hold(spaces, map(dict.copy, spaces))
                found = found + spaces
            slots = _slots(kind)
            if slots:
                self._slots.update(
                    (id(x), _read(slots, x)) for x in by_type[kind]
                )
            # The collector does not list dicts of plain values.
            plain = [
                one
                for one in gc.get_referents(*found)
                if type(one) is dict and not gc.is_tracked(one)
            ]
            self._hold(plain, map(dict.copy, plain))

    def _hold(self, containers: list[Any], copies: Iterable[Any]) -> None:
        pairs = zip(containers, copies)
        self._contents.update(zip(map(id, containers), pairs))

    def release(self) -> None:
        """Releases all objects."""
        # They refer to one another.
        for known in (
            self._objects,
            self._contents,
            self._slots,
            self._classes,
        ):
            known.clear()
        gc.unfreeze()

    def restore(self) -> None:
        """Removes fakes made since then from the objects of the snapshot."""
        with _without_collector():
            leftovers = self._leftovers()
            if not leftovers:
                return
            paths, holders = self._holders(leftovers)
            for holder in holders:
                if not self._clean(holder, paths):
                    logger.warning(
                        f"After an analysis {_name(holder)} contains a fake "
                        f"tensor that cannot be removed and is of no use "
                        f"outside an analysis: create the object again."
                    )

    def _leftovers(self) -> list[FakeTensor]:
        found = [x for x in gc.get_objects() if type(x) is FakeTensor]
        return [x for x in found if id(x) not in self._fakes]

    def _holders(
        self, leftovers: list[FakeTensor]
    ) -> tuple[dict[int, Any], list[Any]]:
        """Finds new objects that lead to leftovers, by id, and their holders."""
        first, *imported = self._objects
        old = {id(one) for known in imported for one in known}
        # A dict of plain values is listed once there is a tensor in it.
        listed = [one for one in gc.get_objects() if one is not leftovers]
        known, referrers = [], defaultdict(list)
        for one in listed:
            if id(one) in old or id(one) in self._contents:
                known.append(one)
                continue
            for referent in gc.get_referents(one):
                referrers[id(referent)].append(one)
        paths: dict[int, Any] = {id(one): one for one in leftovers}
        queue: list[Any] = list(leftovers)
        while queue:
            for one in referrers.get(id(queue.pop()), ()):
                if id(one) not in paths and not isinstance(
                    one, types.FrameType
                ):
                    paths[id(one)] = one
                    queue.append(one)
        ids = set(paths)
        holders = [*_referring(first, ids), *_referring(known, ids)]
        held = set(map(id, gc.get_referents(*holders)))
        for key, one in paths.items():
            # Its holder is invisible to the collector: threading.local.
            if isinstance(one, _CONTAINERS) and not (
                key in held or key in referrers
            ):
                holders.append(one)
        return paths, holders

    def _clean(self, holder: Any, new: dict[int, Any]) -> bool:
        """Removes everything that leads to leftovers; False if it cannot."""
        _, before = self._contents.get(id(holder), (None, {}))
        if isinstance(holder, dict):
            return self._clean_dict(holder, before, new)
        if isinstance(holder, _SEQUENCES):
            return _clean_sequence(holder, before or (), new)
        if isinstance(holder, types.CellType):
            return _clean_slots(_CELL, holder, before, new)
        if isinstance(holder, functools._lru_cache_wrapper):
            return self._clean_cache(holder)
        space = _attributes(holder)
        if space is not None:
            _, before = self._contents.get(id(space), (None, {}))
            self._clean_dict(space, before, new)
        slots = _slots(type(holder))
        _clean_slots(slots, holder, self._slots.get(id(holder), {}), new)
        return not any(
            id(one) in new and one is not space
            for one in gc.get_referents(holder)
        )

    def _clean_dict(
        self, holder: Any, before: Any, new: dict[int, Any]
    ) -> bool:
        kind = OrderedDict if isinstance(holder, OrderedDict) else dict
        target, put, drop = holder, kind.__setitem__, kind.__delitem__
        for owner in self._classes:
            if any(one is holder for one in gc.get_referents(owner)):
                # Set attributes on the class, which caches attribute lookups.
                target, put, drop = owner, type.__setattr__, type.__delattr__
        for key, value in list(dict.items(holder)):
            if id(key) in new or id(value) in new:
                drop(target, key)
                if key in before:
                    put(target, key, before[key])
        return True

    def _clean_cache(self, cached: Any) -> bool:
        # Its entries cannot be examined, so remove all that are new.
        entries = next(
            one
            for one in gc.get_referents(cached)
            if type(one) is dict and one is not vars(cached)
        )
        _, before = self._contents.get(id(entries), (None, {}))
        for key in [k for k, v in entries.items() if before.get(k) is not v]:
            del entries[key]
        if not entries:
            cached.cache_clear()
        return True


# --- removing paths to leftovers from one object -----------------------------


def _clean_sequence(holder: Any, before: Any, new: dict[int, Any]) -> bool:
    known = set(map(id, before))
    added = [x for x in holder if id(x) not in new and id(x) not in known]
    holder.clear()
    extend = holder.update if isinstance(holder, set) else holder.extend
    extend([*before, *added])
    return True


def _clean_slots(
    slots: Iterable[types.MemberDescriptorType],
    holder: Any,
    before: Any,
    new: dict[int, Any],
) -> bool:
    for slot, value in _read(slots, holder).items():
        if id(value) in new:
            slot.__delete__(holder)
            if slot in before:
                slot.__set__(holder, before[slot])
    return True


def _referring(objects: list[Any], ids: set[int]) -> Iterator[Any]:
    """Yields the objects, few of many, that refer to one with such an id."""
    for start in range(0, len(objects), 1000):
        some = objects[start : start + 1000]
        if not ids.isdisjoint(map(id, gc.get_referents(*some))):
            for one in some:
                if not ids.isdisjoint(map(id, gc.get_referents(one))):
                    yield one


# --- contents of objects -----------------------------------------------------

_CELL = (types.CellType.cell_contents,)


def _content(cell: types.CellType) -> dict[Any, Any]:
    try:
        return {_CELL[0]: cell.cell_contents}
    except ValueError:
        return {}


def _read(
    slots: Iterable[types.MemberDescriptorType], one: object
) -> dict[types.MemberDescriptorType, Any]:
    """Maps slots to values, without empty slots."""
    values = {}
    for slot in slots:
        try:
            values[slot] = slot.__get__(one)
        except (AttributeError, ValueError):
            pass
    return values


@functools.lru_cache(maxsize=None)
def _slots(kind: type) -> tuple[types.MemberDescriptorType, ...]:
    """The slots of a class and its bases."""
    return tuple(
        value
        for parent in kind.__mro__
        if "__slots__" in vars(parent)
        for value in vars(parent).values()
        if isinstance(value, types.MemberDescriptorType)
    )


def _has_attributes(kind: type) -> bool:
    # Skip functions: they are many, and reading creates their dicts.
    return kind.__dictoffset__ != 0 and kind is not types.FunctionType


def _attributes(one: object) -> dict[str, Any] | None:
    """The dict of an object's attributes, or None."""
    try:
        # vars() could call any code of the class.
        space = object.__getattribute__(one, "__dict__")
    except AttributeError:
        return None
    return space if isinstance(space, dict) else None


def _name(one: object) -> str:
    kind = type(one)
    name = getattr(one, "__qualname__", "")
    return f"{name} (a {kind.__module__}.{kind.__qualname__})".strip()


@contextlib.contextmanager
def _without_collector() -> Generator[None, None, None]:
    """Disables the collector, which would walk the lists of all objects."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
