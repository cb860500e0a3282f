"""Chooses between the plain torch form of an operation and a compiled one.

Authors
 * The sb_memeff authors 2026
"""

import contextlib
import functools
import importlib.util
import os
from collections.abc import Generator

import torch
from speechbrain.utils.logger import get_logger
from torch._subclasses.fake_tensor import FakeTensor

__all__ = [
    "fused_on_fake_tensors",
    "has_values",
    "holds_its_values",
    "is_on_gpu",
    "package_of_kernels",
    "runs_fused",
]

logger = get_logger(__name__)

SWITCH = "SB_MEMEFF_KERNELS"
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def runs_fused(*tensors: torch.Tensor) -> bool:
    """Decides whether an operation on these tensors runs as a Triton kernel.

    It does on CUDA devices, in half and single precision, unless the
    environment variable SB_MEMEFF_KERNELS is 0. Compilers and tracers get the
    plain form, which they can fuse themselves.

    Arguments
    ---------
    *tensors : torch.Tensor
        Tensors that the kernel reads.

    Returns
    -------
    bool
        False for the plain form.

    Example
    -------
    >>> runs_fused(torch.zeros(3))
    False
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return all(
        # Other subclasses may have no memory that a kernel could read.
        type(x) in (torch.Tensor, torch.nn.Parameter, FakeTensor)
        and x.dtype in DTYPES
        and is_on_gpu(x)
        and holds_its_values(x)
        for x in tensors
    ) and _available("triton", os.environ.get(SWITCH, "1"))


def package_of_kernels(*tensors: torch.Tensor) -> str | None:
    """Decides who compiles an operation that has kernels for GPUs and CPUs.

    On CPUs numba does, in single precision. The switch is that of ``runs_fused``.

    Arguments
    ---------
    *tensors : torch.Tensor
        Tensors that the kernel reads.

    Returns
    -------
    str or None
        "triton" or "numba", the name of a folder in ``sb_memeff.ops``; None for
        the plain form.

    Example
    -------
    >>> package_of_kernels(torch.zeros(3).double())
    """
    if runs_fused(*tensors):
        return "triton"
    is_eager = not (torch.compiler.is_compiling() or torch.jit.is_tracing())
    runs_compiled = is_eager and all(
        type(x) in (torch.Tensor, torch.nn.Parameter)
        and (x.dtype, x.device.type) == (torch.float32, "cpu")
        and has_values(x)
        and holds_its_values(x)
        for x in tensors
    )
    if runs_compiled and _available("numba", os.environ.get(SWITCH, "1")):
        return "numba"
    return None


def is_on_gpu(x: torch.Tensor) -> bool:
    """Checks that a tensor is on a CUDA device, or counts as if it were.

    Arguments
    ---------
    x : torch.Tensor
        The tensor.

    Returns
    -------
    bool
        For a fake tensor, whether the code is inside
        ``fused_on_fake_tensors``.

    Example
    -------
    >>> is_on_gpu(torch.zeros(3))
    False
    """
    if isinstance(x, FakeTensor) or _in_fake_mode():
        return _fake_tensors_are_on_gpu
    return x.is_cuda


_fake_tensors_are_on_gpu = False


@contextlib.contextmanager
def fused_on_fake_tensors() -> Generator[None, None, None]:
    """Sends fake tensors down the kernels' path within the context.

    No kernel runs on them, so memory and launches can be counted without a GPU.

    Yields
    ------
    None

    Example
    -------
    >>> from sb_memeff.memory.fake import fake_tensors
    >>> with fake_tensors(), fused_on_fake_tensors():
    ...     runs_fused(torch.zeros(3))
    True
    """
    global _fake_tensors_are_on_gpu
    before, _fake_tensors_are_on_gpu = _fake_tensors_are_on_gpu, True
    try:
        yield
    finally:
        _fake_tensors_are_on_gpu = before


def has_values(tensor: torch.Tensor) -> bool:
    """Checks that a tensor has values.

    Fake tensors and tensors on "meta" have none, and no tensor has any within a
    FakeTensorMode. They only serve to analyse
    memory, so repeated work with the same memory may be skipped.

    Arguments
    ---------
    tensor : torch.Tensor
        The tensor.

    Returns
    -------
    bool
        False if only shape, strides, dtype and device are known.

    Example
    -------
    >>> has_values(torch.zeros(3)), has_values(torch.zeros(3, device="meta"))
    (True, False)
    """
    return (
        not isinstance(tensor, FakeTensor)
        and tensor.device.type != "meta"
        and not _in_fake_mode()
    )


def _in_fake_mode() -> bool:
    """Whether results are fake tensors, those of other tensors too."""
    # A compiler cannot trace the rest.
    if torch.compiler.is_compiling():
        return False
    key = torch._C._TorchDispatchModeKey.FAKE
    return torch._C._get_dispatch_mode(key) is not None


def holds_its_values(x: torch.Tensor) -> bool:
    """Checks that a kernel finds the values in the tensor's memory.

    A zero tensor (``torch._efficientzerotensor``) has no memory. With a negative
    bit (of ``x.conj().imag``, for example) the memory has the other sign.

    Arguments
    ---------
    x : torch.Tensor
        The tensor.

    Returns
    -------
    bool
        False for these two.

    Example
    -------
    >>> holds_its_values(torch.zeros(3))
    True
    >>> holds_its_values(torch._efficientzerotensor(3))
    False
    """
    return not (x._is_zerotensor() or x.is_neg())


@functools.lru_cache(maxsize=None)
def _available(package: str, switch: str) -> bool:
    """Checks once for each value of the switch, and logs why not."""
    if switch.strip().lower() in ("0", "false", "no", "off"):
        reason = f"{SWITCH}={switch}"
    elif importlib.util.find_spec(package) is None:
        name = {"triton": "Triton"}.get(package, package)
        reason = f"{name} is not installed"
    elif package == "numba":
        reason = _numba_fault()
    else:
        reason = ""
    if reason:
        logger.info(
            f"sb_memeff: plain torch instead of fused kernels ({reason})."
        )
    return not reason


def _numba_fault() -> str:
    """Why numba cannot compile; empty if it can."""
    try:
        # Takes a second.
        import numba
    except Exception as error:  # of another version of numpy, for example
        return f"numba cannot be imported: {error}"
    return "NUMBA_DISABLE_JIT is set" if numba.config.DISABLE_JIT else ""
