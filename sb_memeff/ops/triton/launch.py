"""Selects the GPU of a kernel launch.

Authors
 * The sb_memeff authors 2026
"""

import contextlib
from typing import Any

import torch

__all__ = ["on_device_of"]


def on_device_of(x: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Makes a tensor's GPU the current one, where Triton launches kernels.

    Arguments
    ---------
    x : torch.Tensor
        A tensor that the kernel reads.

    Returns
    -------
    contextlib.AbstractContextManager
        A context; it does nothing for a tensor on the CPU (Triton's
        interpreter).

    Example
    -------
    >>> with on_device_of(torch.zeros(3)):
    ...     pass
    """
    return (
        torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
    )
