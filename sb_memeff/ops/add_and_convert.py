"""A sum of gradients, and a copy of it in half precision.

Authors
 * The sb_memeff authors 2026
"""

import torch

from sb_memeff.ops.dispatch import runs_fused
from sb_memeff.ops.summary import is_dense

__all__ = ["add_and_convert"]


def add_and_convert(
    total: torch.Tensor,
    gradient: torch.Tensor,
    dtype: torch.dtype,
    overwrite: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """total + gradient, and the same in another dtype.

    Arguments
    ---------
    total : torch.Tensor
        Any shape, floating point.
    gradient : torch.Tensor
        Of that shape.
    dtype : torch.dtype
        Of the copy.
    overwrite : bool
        Put the sum where the total is.

    Returns
    -------
    tuple of torch.Tensor
        The sum, which is the total itself if that is overwritten, and the
        copy; both are laid out as the total.

    Example
    -------
    >>> total = torch.tensor([2.0])
    >>> add_and_convert(total, torch.tensor([0.5]), torch.float16)
    (tensor([2.5000]), tensor([2.5000], dtype=torch.float16))
    """
    result = total if overwrite else torch.empty_like(total)
    if (
        runs_fused(total, gradient)
        and total.dtype == torch.float32
        and total.shape == gradient.shape
        and total.stride() == gradient.stride()
        and is_dense(total)
    ):
        from sb_memeff.ops.triton import add_and_convert as kernel

        copy = torch.empty_like(total, dtype=dtype)
        kernel.add_and_convert(total, gradient, result, copy)
    else:
        torch.add(total, gradient, out=result)
        copy = result.to(dtype)
    return result, copy
