"""Checks whether hooks require that modules are called one by one.

Authors
 * The sb_memeff authors 2026
"""

from collections.abc import Iterable

from torch import nn
from torch.utils.hooks import RemovableHandle

__all__ = ["are_watched", "only_observes"]

# Of hooks for all modules that need not see every call.
_observers: set[int] = set()


def only_observes(handle: RemovableHandle) -> RemovableHandle:
    """Declares that a global hook may miss calls of modules.

    Modules are then still computed together where possible.

    Arguments
    ---------
    handle : torch.utils.hooks.RemovableHandle
        As ``register_module_forward_hook`` returns it.

    Returns
    -------
    torch.utils.hooks.RemovableHandle
        The same.
    """
    _observers.add(handle.id)
    return handle


def are_watched(modules: Iterable[nn.Module]) -> bool:
    """Whether modules must be called, each by itself.

    Arguments
    ---------
    modules : iterable
        The modules; those inside them do not count.

    Returns
    -------
    bool
        True if one has hooks or a forward of its own, or if there are hooks
        for all modules that must see every call.

    Example
    -------
    >>> layer = nn.Linear(2, 2)
    >>> are_watched([layer])
    False
    >>> handle = layer.register_forward_hook(print)
    >>> are_watched([layer])
    True
    """
    torch_module = nn.modules.module
    if torch_module._has_any_global_hook() and not all(
        key in _observers
        for hooks in (
            torch_module._global_forward_hooks,
            torch_module._global_forward_pre_hooks,
            torch_module._global_backward_hooks,
            torch_module._global_backward_pre_hooks,
        )
        for key in hooks
    ):
        return True
    return any(
        "forward" in vars(module)
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        for module in modules
    )
