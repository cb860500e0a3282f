"""Launches kernels on the GPU of their tensors, and counts them for watchers.

Authors
 * The sb_memeff authors 2026
"""

import contextlib
from collections.abc import Callable, Generator
from typing import Any

import torch

from sb_memeff.ops.dispatch import has_values

__all__ = ["address", "launch", "watch_launches"]

# Called with a kernel's name and its arguments by name.
Watcher = Callable[[str, dict[str, Any]], None]
_watchers: list[Watcher] = []


def launch(
    kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any
) -> None:
    """Runs a Triton kernel on the GPU of its first tensor.

    Arguments
    ---------
    kernel : triton.JITFunction
        The kernel.
    grid : tuple of int
        Number of programs along each axis.
    *args : tuple
        Arguments of the kernel, in its order. The first one is a tensor. If
        it is fake, nothing runs: what a caller allocates is all that counts.
    **constants : dict
        Constants and launch options, by name.
    """
    first = args[0]
    for watcher in _watchers:
        watcher(
            kernel.__name__, {**dict(zip(kernel.arg_names, args)), **constants}
        )
    if not has_values(first):
        return
    if first.device.type == "cuda":
        # Triton takes the current device.
        with torch.cuda.device(first.device):
            kernel[grid](*args, **constants)
    else:
        # Triton's interpreter.
        kernel[grid](*args, **constants)


def address(x: torch.Tensor) -> int:
    """The address of a tensor's first value; 0 for a fake tensor.

    Arguments
    ---------
    x : torch.Tensor
        The tensor.

    Returns
    -------
    int
        In bytes.
    """
    return x.data_ptr() if has_values(x) else 0


@contextlib.contextmanager
def watch_launches(watcher: Watcher) -> Generator[None, None, None]:
    """Calls a function before each launch of a kernel.

    Arguments
    ---------
    watcher : callable
        Takes the kernel's name and its arguments by name.

    Yields
    ------
    None
    """
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)
