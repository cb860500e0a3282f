"""Detects changes to buffers and attributes of modules, and undoes them.

A module may keep state in buffers (batch statistics) or attributes (a counter, a
table computed once, a list). A training step must change it once. During a second
call in backward, the module must have the state from before the first call, and
afterwards the state from after the first call.

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
    """Changes of a call to modules.

    Arguments
    ---------
    buffers : dict
        Old values of buffers that were replaced or changed: {(module, name):
        torch.Tensor or None}.
    attributes : dict
        Old values of attributes that were replaced, and of lists, dicts and
        sets whose contents changed.
    written : set
        (module, name) of tensors among the attributes that were changed in
        place. Their old values are not kept.
    """

    buffers: dict[tuple[nn.Module, str], Any] = field(default_factory=dict)
    attributes: dict[tuple[nn.Module, str], Any] = field(default_factory=dict)
    written: set[tuple[nn.Module, str]] = field(default_factory=set)


class ModuleState:
    """The state of a module and its submodules at one moment.

    Arguments
    ---------
    function : callable
        A torch.nn.Module; other functions have no state.

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
        """Returns all attributes of the modules.

        Returns
        -------
        list
            The values, in no particular order.
        """
        return [value for value, _, _ in self._attributes.values()]

    def changes(self) -> Changes:
        """Compares with the current state.

        Returns
        -------
        Changes
            All differences.
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
    """Undoes changes to buffers and attributes made within the context.

    Arguments
    ---------
    function : callable
        A torch.nn.Module; other functions have no state.
    changes : Changes, optional
        Changes to undo within the context.

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
                module._buffers[name] = _lent(module, buffer)
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
    """Lists a module and its submodules, in the order of ``modules()``.

    It takes a fifth of the time, which matters because each call of each block
    needs it several times.

    Arguments
    ---------
    function : callable
        A torch.nn.Module; other functions have no modules.

    Returns
    -------
    list of torch.nn.Module
        Each module once.

    Example
    -------
    >>> modules_of(torch.nn.Sequential(torch.nn.ReLU()))[1]
    ReLU()
    """
    # Not cached, because SpeechBrain replaces BatchNorm by SyncBatchNorm after
    # the network is built.
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
    """Lists the attributes in which a module may keep state.

    Arguments
    ---------
    module : torch.nn.Module
        The module; its submodules are not included.

    Returns
    -------
    list
        Pairs of name and value. Empty for torch's own modules without hooks,
        which keep all state in buffers.

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
    """Whether batch statistics do not matter, or do not change."""
    # Compare forward, because derived classes may use the statistics.
    return type(module).forward in (
        _BatchNorm.forward,
        nn.SyncBatchNorm.forward,
    )


def _may_change_buffers(module: nn.Module) -> bool:
    return module.training or not _ignores_buffers(module)


def _lent(module: nn.Module, buffer: torch.Tensor) -> torch.Tensor:
    """A buffer for a replay, whose values are forgotten afterwards."""
    if (
        _ignores_buffers(module)
        and module.momentum is not None
        and not module._forward_hooks
    ):
        # Batch norm updates it and reads it for nothing else.
        return torch.empty_like(buffer)
    return buffer.clone()


def _copied(value: Any, copies: dict[int, tuple[Any, Any]]) -> Any:
    """Copies a list, dict or set; returns other objects unchanged."""
    if type(value) not in _CONTAINERS:
        return value
    # A list shared by two modules stays shared. The list itself is kept too, so
    # that no other object gets its id.
    return copies.setdefault(id(value), (value.copy(), value))[0]


def _version(value: object) -> int | None:
    if isinstance(value, torch.Tensor) and not value.is_inference():
        return value._version
    return None


def _other_contents(now: Any, kept: Any) -> bool:
    """Whether a list, dict or set has other items than its copy."""
    if type(now) not in _CONTAINERS:
        return False
    if len(now) != len(kept):
        return True
    if isinstance(now, dict):
        return list(now) != list(kept) or any(
            a is not b for a, b in zip(now.values(), kept.values())
        )
    if isinstance(now, set):
        return now != kept
    return any(a is not b for a, b in zip(now, kept))


def _put(values: dict[str, Any], name: str, value: object) -> None:
    if value is _ABSENT:
        values.pop(name, None)
    else:
        values[name] = value
