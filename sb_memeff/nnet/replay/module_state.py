"""Buffers and attributes of modules: notice changes, lend copies.

A module may keep state in buffers (batch statistics), or in attributes: a
counter, a table computed once, a list. A training step changes it once. For a
second call of the module in backward it must be as it was before the first
one, and stay afterwards as the first one left it.

Authors
 * The sb_memeff authors 2026
"""

import contextlib
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["Changes", "ModuleState", "modules_of", "without_trace"]


@dataclass
class Changes:
    """Changes that a call has made to modules.

    Arguments
    ---------
    buffers : dict
        Buffers that are others now, or have other values, as they were
        before: {(module, name): torch.Tensor or None}.
    attributes : dict
        The same for attributes that were bound to another object, and for
        lists, dicts and sets whose contents are others.
    written : set
        (module, name) of tensors among the attributes that were changed in
        place. How they were before is not kept.
    """

    buffers: dict[tuple[nn.Module, str], Any] = field(default_factory=dict)
    attributes: dict[tuple[nn.Module, str], Any] = field(default_factory=dict)
    written: set[tuple[nn.Module, str]] = field(default_factory=set)


class ModuleState:
    """The state of a module, and of those inside it, at one moment.

    Arguments
    ---------
    function : callable
        A torch.nn.Module; anything else has no state.

    Example
    -------
    >>> norm = torch.nn.InstanceNorm1d(2, track_running_stats=True)
    >>> state = ModuleState(norm)
    >>> y = norm(torch.rand(3, 2, 5))
    >>> [name for _, name in state.changes().buffers]
    ['running_mean', 'running_var']
    """

    def __init__(self, function: object):
        self._modules = modules_of(function)
        self._buffers: dict[tuple[nn.Module, str], Any] = {}
        self._attributes: dict[tuple[nn.Module, str], Any] = {}
        copies: dict[int, tuple[Any, Any]] = {}
        for module in self._modules:
            for name, buffer in module._buffers.items():
                kept = buffer
                if buffer is not None and not _ignores_buffers(module):
                    kept = buffer.clone()
                self._buffers[module, name] = buffer, _version(buffer), kept
            for name, value in attributes(module):
                kept = _copied(value, copies)
                self._attributes[module, name] = value, _version(value), kept

    def attribute_values(self) -> list[Any]:
        """All attributes of the modules.

        Returns
        -------
        list
            In no particular order.
        """
        return [value for value, _, _ in self._attributes.values()]

    def changes(self) -> Changes:
        """Compares with the state now.

        Returns
        -------
        Changes
            All that is different.
        """
        found = Changes()
        for (module, name), (buffer, version, kept) in self._buffers.items():
            now = module._buffers.get(name, _ABSENT)
            if now is not buffer or (
                _version(now) != version and not _ignores_buffers(module)
            ):
                found.buffers[module, name] = kept
        for (module, name), (value, version, kept) in self._attributes.items():
            now = vars(module).get(name, _ABSENT)
            if now is not value or _other_contents(now, kept):
                found.attributes[module, name] = kept
            elif _version(now) != version:
                found.written.add((module, name))
        for module in self._modules:
            for name in module._buffers:
                if (module, name) not in self._buffers:
                    found.buffers[module, name] = _ABSENT
            for name, _ in attributes(module):
                if (module, name) not in self._attributes:
                    found.attributes[module, name] = _ABSENT
        return found


@contextlib.contextmanager
def without_trace(
    function: object, changes: Changes | None = None
) -> Generator[None, None, None]:
    """Changes that are made inside to buffers and attributes are forgotten.

    Arguments
    ---------
    function : callable
        A torch.nn.Module; anything else is left alone.
    changes : Changes, optional
        What shall be, inside, as it was before them.

    Yields
    ------
    None
    """
    changes = changes or Changes()
    modules = modules_of(function)
    before = [(m, dict(m._buffers), dict(attributes(m))) for m in modules]
    copies: dict[int, tuple[Any, Any]] = {}
    for module, buffers, values in before:
        for name, value in values.items():
            if (module, name) in changes.written:
                copy = value.detach().clone()
                vars(module)[name] = copy.requires_grad_(value.requires_grad)
            else:
                vars(module)[name] = _copied(value, copies)
        for name, buffer in buffers.items():
            if buffer is not None and _may_change_buffers(module):
                module._buffers[name] = _to_be_changed(module, buffer)
    for (module, name), value in changes.attributes.items():
        _put(vars(module), name, _copied(value, copies))
    for (module, name), buffer in changes.buffers.items():
        # A copy, so that a second backward starts from the same values.
        if isinstance(buffer, torch.Tensor):
            buffer = buffer.clone()
        _put(module._buffers, name, buffer)
    try:
        yield
    finally:
        for module, buffers, values in before:
            for name in [n for n, _ in attributes(module) if n not in values]:
                del vars(module)[name]
            vars(module).update(values)
            module._buffers.clear()
            module._buffers.update(buffers)


def modules_of(function: object) -> list[nn.Module]:
    """A module and all inside it, in the order of ``modules()``.

    In a fifth of its time: that counts, several times in each call of each
    block.

    Arguments
    ---------
    function : callable
        A torch.nn.Module; anything else has none.

    Returns
    -------
    list of torch.nn.Module
        Each once.

    Example
    -------
    >>> modules_of(torch.nn.Sequential(torch.nn.ReLU()))[1]
    ReLU()
    """
    # Looked up at every call: SpeechBrain replaces BatchNorm by SyncBatchNorm
    # after the network was built.
    waiting: list[nn.Module | None] = (
        [function] if isinstance(function, nn.Module) else []
    )
    found: dict[nn.Module, None] = {}
    while waiting:
        module = waiting.pop()
        if module is not None and module not in found:
            found[module] = None
            waiting += reversed(module._modules.values())
    return list(found)


def attributes(module: nn.Module) -> list[tuple[str, Any]]:
    """The attributes of a module in which its code may keep state.

    Arguments
    ---------
    module : torch.nn.Module
        The module itself, not those inside it.

    Returns
    -------
    list
        Pairs of name and value. None for torch's own modules, which keep all
        state in buffers; their hooks may do otherwise.

    Example
    -------
    >>> attributes(torch.nn.Dropout(0.5))
    []
    >>> module = torch.nn.Module()
    >>> module.calls = 0
    >>> attributes(module)
    [('calls', 0)]
    """
    if (
        type(module).__module__.startswith("torch.nn.modules.")
        and type(module) is not nn.Module
        and not module._forward_hooks
        and not module._forward_pre_hooks
    ):
        return []
    return [(n, v) for n, v in vars(module).items() if n not in _OF_ALL_MODULES]


_OF_ALL_MODULES = frozenset(vars(nn.Module()))
_CONTAINERS = (list, dict, set)
_ABSENT = object()


def _ignores_buffers(module: nn.Module) -> bool:
    """Whether the values of its buffers make no difference, or no change."""
    # By forward: classes that inherit from them may use what they count.
    return type(module).forward in (
        _BatchNorm.forward,
        nn.SyncBatchNorm.forward,
    )


def _may_change_buffers(module: nn.Module) -> bool:
    return module.training or not _ignores_buffers(module)


def _to_be_changed(module: nn.Module, buffer: torch.Tensor) -> torch.Tensor:
    """A tensor in place of a buffer, which the module may change."""
    if _ignores_buffers(module) and module.momentum is not None:
        # Statistics that are written and not read: to copy three small
        # buffers of each batch norm takes a launch each. Without a momentum
        # it reads how many batches there were.
        return torch.empty_like(buffer)
    return buffer.clone()


def _copied(value: Any, copies: dict[int, tuple[Any, Any]]) -> Any:
    """A copy of a list, dict or set; anything else as it is."""
    if type(value) not in _CONTAINERS:
        return value
    # One list that two modules share stays one list. The list itself is kept
    # too: another one could get its id.
    return copies.setdefault(id(value), (value.copy(), value))[0]


def _version(value: object) -> int | None:
    if isinstance(value, torch.Tensor) and not value.is_inference():
        return value._version
    return None


def _other_contents(now: Any, kept: Any) -> bool:
    """Whether a list, dict or set holds other objects than its copy."""
    if type(now) not in _CONTAINERS:
        return False
    if len(now) != len(kept):
        return True
    if isinstance(now, dict):
        return list(now) != list(kept) or any(
            a is not b for a, b in zip(now.values(), kept.values(), strict=True)
        )
    if isinstance(now, set):
        return now != kept
    return any(a is not b for a, b in zip(now, kept, strict=True))


def _put(place: dict[str, Any], name: str, value: object) -> None:
    if value is _ABSENT:
        place.pop(name, None)
    else:
        place[name] = value
