"""How autograd sees the code that is running.

Authors
 * The sb_memeff authors 2026
"""

import torch

__all__ = ["in_plain_autograd", "refuse_double_backward"]


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


def refuse_double_backward(function: str, remedy: str) -> None:
    """Raises in the backward of a function that cannot be differentiated again.

    torch's ``once_differentiable`` raises only where the incoming gradient needs
    one itself. That of a sum does not, and the second derivative would be
    missing from the gradients.

    Arguments
    ---------
    function : str
        Its name.
    remedy : str
        How to do without.

    Raises
    ------
    RuntimeError
        With ``create_graph=True``.

    Example
    -------
    >>> with torch.no_grad():  # as in a backward pass
    ...     refuse_double_backward("Loss", "use another one")
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{function}: double backward (create_graph=True) is not supported; "
            f"{remedy}."
        )
