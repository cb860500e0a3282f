"""Split a tensor into streams, and recognise its memory layout.

Authors
 * The sb_memeff authors 2026
"""

import torch

__all__ = ["is_channels_last", "split_streams"]


def split_streams(
    x: torch.Tensor, axis: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Splits a tensor into its two streams.

    Arguments
    ---------
    x : torch.Tensor
        [N, C, ...] with C even, or with C at another axis.
    axis : int
        The dimension that is split; -1 for [N, ..., C].

    Returns
    -------
    tuple of torch.Tensor
        Two views, [N, C/2, ...].

    Raises
    ------
    ValueError
        If C is odd or missing, or is the batch.

    Example
    -------
    >>> first, second = split_streams(torch.rand(2, 6, 10))
    >>> first.shape
    torch.Size([2, 3, 10])
    """
    dim = axis + x.dim() if axis < 0 else axis
    if not 1 <= dim < x.dim() or x.shape[dim] % 2:
        raise ValueError(
            f"Reversible blocks split dimension {axis} in two equal streams; "
            f"the input has shape {tuple(x.shape)}. Use an even number of "
            f"channels."
        )
    first, second = x.chunk(2, dim=dim)
    return first, second


def is_channels_last(x: torch.Tensor) -> bool:
    """Whether a tensor has the layout of torch.channels_last.

    Arguments
    ---------
    x : torch.Tensor
        [N, C, ...].

    Returns
    -------
    bool
        False for a tensor that is contiguous as well.

    Example
    -------
    >>> x = torch.rand(2, 3, 4, 5)
    >>> is_channels_last(x.to(memory_format=torch.channels_last))
    True
    """
    if x.dim() < 3 or x.is_contiguous():
        return False
    return x.movedim(1, -1).is_contiguous()
