"""Sums of the gradients of streams, and their copies in half precision.

A stream's gradient is a float32 sum over the functions that depend on the
stream. A function that computes in half precision takes it in half precision.
On a GPU one kernel adds and converts.

Authors
 * The sb_memeff authors 2026
"""

import torch
from torch.utils.weak import WeakIdKeyDictionary

from sb_memeff.ops.add_and_convert import add_and_convert
from sb_memeff.ops.dispatch import runs_fused
from sb_memeff.ops.summary import is_dense

__all__ = ["GradientSums", "is_unshared"]


class GradientSums:
    """Adds gradients and remembers the sums' copies in half precision.

    Example
    -------
    >>> sums = GradientSums()
    >>> total = sums.add(torch.ones(2), torch.ones(2), torch.bfloat16)
    >>> sums.converted(total, torch.bfloat16)
    tensor([2., 2.], dtype=torch.bfloat16)
    """

    def __init__(self):
        # By sum, which is not kept alive: its version and its copy.
        self._copies: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def add(
        self, total: torch.Tensor, gradient: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        """total + gradient.

        Arguments
        ---------
        total : torch.Tensor
            Any shape. A kernel overwrites it if nothing else refers to it.
        gradient : torch.Tensor
            Of that shape.
        dtype : torch.dtype
            The one in which the sum is probably needed next.

        Returns
        -------
        torch.Tensor
            The sum, in the dtype of the total.
        """
        if dtype == total.dtype or not runs_fused(total, gradient):
            return total + gradient
        overwrite = is_dense(total) and is_unshared(total)
        total, copy = add_and_convert(total, gradient, dtype, overwrite)
        self._copies[total] = total._version, copy
        return total

    def converted(
        self, total: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        """A sum in another dtype.

        Arguments
        ---------
        total : torch.Tensor
            Usually a result of ``add``.
        dtype : torch.dtype
            Floating point.

        Returns
        -------
        torch.Tensor
            It shares memory with the sum if they have the same dtype.
        """
        # It is needed once, and would take memory as long as the sum.
        version, copy = self._copies.pop(total, (None, None))
        if version == total._version and copy.dtype == dtype:
            return copy
        # An alias, so that ``is_unshared`` sees whether a hook keeps it.
        return total.detach().to(dtype)


def is_unshared(x: torch.Tensor) -> bool:
    """Checks that no other tensor refers to the same memory.

    Arguments
    ---------
    x : torch.Tensor
        The tensor.

    Returns
    -------
    bool
        False if there is a view or an alias, which a hook may keep or autograd
        may have saved.

    Example
    -------
    >>> x = torch.rand(3)
    >>> is_unshared(x)
    True
    >>> alias = x.detach()
    >>> is_unshared(x)
    False
    """
    return _use_count(x) == _use_count(torch.empty(0))


def _use_count(x: torch.Tensor) -> int:
    return torch._C._storage_Use_Count(x.untyped_storage()._cdata)
