"""How autograd sees the code that is running.

Authors
 * The sb_memeff authors 2026
"""

import torch

__all__ = ["in_plain_autograd"]


def in_plain_autograd() -> bool:
    """Checks that a ``torch.autograd.Function`` may stand for several modules.

    Compilers and tracers see the modules themselves. Function transforms and
    forward-mode derivatives need rules that our functions do not have.

    Returns
    -------
    bool
        False in any of these.

    Example
    -------
    >>> in_plain_autograd()
    True
    >>> torch.func.vmap(lambda x: x * in_plain_autograd())(torch.ones(2))
    tensor([0., 0.])
    """
    return not (
        torch.compiler.is_compiling()
        or torch.compiler.is_exporting()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    )
