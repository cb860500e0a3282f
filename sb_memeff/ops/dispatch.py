"""Chooses between the plain torch form of an operation and a Triton kernel.

Authors
 * The sb_memeff authors 2026
"""

import functools
import importlib.util
import os

import torch
from speechbrain.utils.logger import get_logger
from torch._subclasses.fake_tensor import FakeTensor

__all__ = ["has_values", "runs_fused"]

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
        # Subclasses, including fake tensors, may have no address.
        type(x) in (torch.Tensor, torch.nn.Parameter)
        and x.is_cuda
        and x.dtype in DTYPES
        for x in tensors
    ) and _available(os.environ.get(SWITCH, "1"))


def has_values(tensor: torch.Tensor) -> bool:
    """Checks that a tensor has values.

    Fake tensors and tensors on "meta" have none. They only serve to analyse
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
    return not isinstance(tensor, FakeTensor) and tensor.device.type != "meta"


@functools.cache
def _available(switch: str) -> bool:
    """Checks once for each value of the switch, and logs why not."""
    if switch == "0":
        reason = f"{SWITCH}=0"
    elif importlib.util.find_spec("triton") is None:
        reason = "Triton is not installed"
    else:
        return True
    logger.info(f"sb_memeff: plain torch instead of fused kernels ({reason}).")
    return False
