"""Put back what an analysis on fake tensors leaves in other objects.

Networks memoise: SpeechBrain keeps the sines of its rotary positions for the
whole process, others use ``functools.cache``, a dict of their module or an
attribute. A fake tensor that stays there breaks the training that follows.

Authors
 * The sb_memeff authors 2026
"""

import contextlib
import functools
import gc
import types
from collections import OrderedDict, defaultdict, deque
from collections.abc import Generator, Iterable
from typing import Any

from speechbrain.utils.logger import get_logger
from torch._subclasses.fake_tensor import FakeTensor

from sb_memeff.memory.imports import around_imports

__all__ = ["no_leftovers"]

logger = get_logger(__name__)

# What they hold does not change, or is in a dict of its own.
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
# To look for what holds more takes seconds; most of them are garbage.
MOST_CACHED = 100


@contextlib.contextmanager
def no_leftovers() -> Generator[None, None, None]:
    """Lets no object that was there before keep a fake tensor made meanwhile.

    Where an entry of a container, an attribute, a variable of a closure or a
    cached result leads to such a tensor, it becomes what it was before, or
    goes if there was none. All other changes stay. Local variables of running
    functions are not looked at: decorate a function with it, so that it has
    none left.

    Where that cannot be done, a warning names the object. It takes some tenths
    of a second to look at all objects of a process; inside another
    ``no_leftovers``, "before" is before the outer one.

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
    if _before:
        try:
            yield
        finally:
            _before[0].restore()
        return
    before = _Before()
    _before.append(before)
    try:
        # What a module makes when it is imported is meant to stay.
        with around_imports(before.and_what_is_new):
            yield
    finally:
        _before.clear()
        before.restore()
        before.forget()


# Of the outermost analysis.
_before: list["_Before"] = []


class _Before:
    """The objects of the process, and what they hold when it is made."""

    def __init__(self):
        # Alive until the end, so that no id is used twice.
        self._objects: list[list[Any]] = []
        # Id to (container, copy of what it held).
        self._held: dict[int, tuple[Any, Any]] = {}
        self._slots: dict[int, dict[types.MemberDescriptorType, Any]] = {}
        self._fakes: set[int] = set()
        with _without_collector():
            self._add(gc.get_objects())

    @contextlib.contextmanager
    def and_what_is_new(
        self, module: types.ModuleType
    ) -> Generator[None, None, None]:
        """Adds a module and the objects that are made meanwhile."""
        # Now nothing is in the youngest generation.
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
        pairs = zip(containers, copies, strict=True)
        self._held.update(zip(map(id, containers), pairs, strict=True))

    def forget(self) -> None:
        """Lets go of all objects."""
        # They hold one another.
        for known in (self._objects, self._held, self._slots):
            known.clear()

    def restore(self) -> None:
        """Takes the fakes made since then out of the objects of then."""
        with _without_collector():
            leftovers = self._leftovers()
            if len(leftovers) > MOST_CACHED:
                gc.collect()
                leftovers = self._leftovers()
            if not leftovers:
                return
            leading, holders = self._holders(leftovers)
            for holder in holders:
                if not self._clean(holder, leading):
                    logger.warning(
                        f"After an analysis {_name(holder)} holds a fake "
                        f"tensor, which nothing but an analysis can use, and "
                        f"which cannot be taken out of it: make it anew."
                    )

    def _leftovers(self) -> list[FakeTensor]:
        found = [x for x in gc.get_objects() if type(x) is FakeTensor]
        return [x for x in found if id(x) not in self._fakes]

    def _holders(self, level: list[Any]) -> tuple[dict[int, Any], list[Any]]:
        """New objects that lead to leftovers, by id; and what holds those."""
        old = {id(one) for objects in self._objects for one in objects}
        old.update(self._held)
        leading = {id(one): one for one in level}
        holders = {}
        while level:
            found = gc.get_referrers(*level)
            ours = {id(level), id(leading), id(holders)}
            found = [one for one in found if id(one) not in ours]
            held = set(map(id, gc.get_referents(*found)))
            for one in level:
                # The collector does not see what holds it: threading.local.
                if id(one) not in held and isinstance(one, _CONTAINERS):
                    holders[id(one)] = one
            level = []
            for one in found:
                if id(one) in old:
                    holders[id(one)] = one
                elif id(one) not in leading and not isinstance(
                    one, types.FrameType
                ):
                    leading[id(one)] = one
                    level.append(one)
            # It would be found next time.
            del found
        return leading, list(holders.values())

    def _clean(self, holder: Any, new: dict[int, Any]) -> bool:
        """Whether all could be taken out that leads to leftovers."""
        _, before = self._held.get(id(holder), (None, {}))
        if isinstance(holder, dict):
            return _clean_dict(holder, before, new)
        if isinstance(holder, _SEQUENCES):
            return _clean_sequence(holder, before or (), new)
        if isinstance(holder, types.CellType):
            return _clean_slots(_CELL, holder, before, new)
        if isinstance(holder, functools._lru_cache_wrapper):
            return self._clean_cache(holder)
        space = _attributes(holder)
        if space is not None:
            _, before = self._held.get(id(space), (None, {}))
            _clean_dict(space, before, new)
        slots = _slots(type(holder))
        _clean_slots(slots, holder, self._slots.get(id(holder), {}), new)
        return not any(
            id(one) in new and one is not space
            for one in gc.get_referents(holder)
        )

    def _clean_cache(self, cached: Any) -> bool:
        # Its entries cannot be looked into, but those that have come since
        # then can be told from those that were there.
        entries = next(
            one
            for one in gc.get_referents(cached)
            if type(one) is dict and one is not vars(cached)
        )
        _, before = self._held.get(id(entries), (None, {}))
        for key in [k for k, v in entries.items() if before.get(k) is not v]:
            del entries[key]
        if not entries:
            cached.cache_clear()
        return True


# --- taking what leads to a leftover out of one object -----------------------


def _clean_dict(holder: Any, before: Any, new: dict[int, Any]) -> bool:
    kind = OrderedDict if isinstance(holder, OrderedDict) else dict
    target, put, drop = holder, kind.__setitem__, kind.__delitem__
    for owner in gc.get_referrers(holder):
        if isinstance(owner, type) and any(
            one is holder for one in gc.get_referents(owner)
        ):
            # Classes keep a second table of what they have looked up.
            target, put, drop = owner, type.__setattr__, type.__delattr__
    for key, value in list(dict.items(holder)):
        if id(key) in new or id(value) in new:
            drop(target, key)
            if key in before:
                put(target, key, before[key])
    return True


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


# --- what objects are made of ------------------------------------------------

_CELL = (types.CellType.cell_contents,)


def _content(cell: types.CellType) -> dict[Any, Any]:
    try:
        return {_CELL[0]: cell.cell_contents}
    except ValueError:
        return {}


def _read(
    slots: Iterable[types.MemberDescriptorType], one: object
) -> dict[types.MemberDescriptorType, Any]:
    """Slot to value, without those that are empty."""
    values = {}
    for slot in slots:
        try:
            values[slot] = slot.__get__(one)
        except (AttributeError, ValueError):
            pass
    return values


@functools.cache
def _slots(kind: type) -> tuple[types.MemberDescriptorType, ...]:
    """Names in __slots__ of a class and those above it."""
    return tuple(
        value
        for parent in kind.__mro__
        if "__slots__" in vars(parent)
        for value in vars(parent).values()
        if isinstance(value, types.MemberDescriptorType)
    )


def _has_attributes(kind: type) -> bool:
    # Functions get a dict when they are asked for it; they are many.
    return kind.__dictoffset__ != 0 and kind is not types.FunctionType


def _attributes(one: object) -> dict[str, Any] | None:
    """The dict of an object's attributes, or None."""
    try:
        # A class may do anything if it is asked by vars().
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
    """Lists of all objects grow; the collector would walk them each time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
