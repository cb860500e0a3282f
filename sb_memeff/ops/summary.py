"""Summaries of tensors: their largest magnitude, and a checksum.

Both are integers whose order does not matter, so they are the same for any
number of threads, any device and any layout.

Authors
 * The sb_memeff authors 2026
"""

from collections.abc import Iterator

import torch
from torch.utils.weak import WeakIdKeyDictionary

from sb_memeff.ops.dispatch import runs_fused

__all__ = ["Summaries", "checksum", "is_dense"]

_INTEGER_OF_SIZE = {
    1: torch.int8,
    2: torch.int16,
    4: torch.int32,
    8: torch.int64,
}
# Rows of a table, which one launch fills with zeros; and the integers of a row,
# 16 bytes, so that Triton compiles no kernel twice.
ROWS, ALIGNED = 512, 4


def checksum(tensor: torch.Tensor) -> torch.Tensor:
    """Sums the bits of a tensor as integers, which wrap around.

    The order of the sum does not matter, so it is the same for any number of
    threads, any device and any layout.

    Arguments
    ---------
    tensor : torch.Tensor
        Any shape, strides and dtype.

    Returns
    -------
    torch.Tensor
        A scalar of int32 or int64, on the tensor's device.

    Example
    -------
    >>> x = torch.rand(3, 4)
    >>> torch.equal(checksum(x), checksum(x.t().contiguous()))
    True
    >>> torch.equal(checksum(x), checksum(x.nextafter(x + 1)))
    False
    """
    bits = tensor.detach()
    if bits.is_complex():
        bits = torch.view_as_real(bits)
    if bits.dtype == torch.bool:
        bits = bits.to(torch.int8)
    bits = bits.view(_INTEGER_OF_SIZE[bits.element_size()])
    # A sum in the dtype of the elements is 20 times as fast as one in int64.
    wide = torch.int64 if bits.dtype == torch.int64 else torch.int32
    return bits.sum(dtype=wide)


def is_dense(x: torch.Tensor) -> bool:
    """Whether the values of a tensor are adjacent in memory, in any order.

    Arguments
    ---------
    x : torch.Tensor
        The tensor.

    Returns
    -------
    bool
        False if there is anything in between, or if values share memory.

    Example
    -------
    >>> x = torch.rand(2, 3, 4)
    >>> is_dense(x.transpose(1, 2)), is_dense(x[:, :2]), is_dense(x[:, :, 0])
    (True, False, False)
    """
    if x.is_contiguous():
        return True
    axes = sorted(range(x.dim()), key=x.stride, reverse=True)
    return x.permute(axes).is_contiguous()


class Summaries:
    """Summaries of float32 tensors, by tensor.

    A summary is two integers of 32 bits: the largest magnitude, as the bits of
    a float32 (NaN if there is one), and the checksum. A kernel that computes a
    tensor finds its summary without reading it again, and leaves it here.

    Example
    -------
    >>> summaries = Summaries()
    >>> largest, _ = summaries.of(torch.tensor([1.0, -3.0])).view(torch.float32)
    >>> largest
    tensor(3.)
    """

    def __init__(self):
        # With the version of the tensor. Tensors are not kept alive.
        self._known: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._rows: Iterator[torch.Tensor] = iter(())

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """The summary of a tensor, computed if it is not known.

        Arguments
        ---------
        x : torch.Tensor
            float32, any strides.

        Returns
        -------
        torch.Tensor
            [2] of int32, on the tensor's device.
        """
        version, summary = self._known.get(x, (None, None))
        if version == x._version:
            return summary
        if runs_fused(x) and is_dense(x):
            from sb_memeff.ops.triton import summary as kernels

            summary = self.row(x.device)
            kernels.summarize(x, summary)
            self.put(x, summary)
            return summary
        extremes = x.aminmax() if x.numel() else (x.new_zeros(()),) * 2
        largest = torch.stack(extremes).abs().amax()
        summary = torch.stack([largest.view(torch.int32), checksum(x)])
        self.put(x, summary)
        return summary

    def row(self, device: torch.device) -> torch.Tensor:
        """Zeros for a kernel to raise and to add to.

        Arguments
        ---------
        device : torch.device
            Always the same one.

        Returns
        -------
        torch.Tensor
            [2] of int32.
        """
        row = next(self._rows, None)
        if row is None:
            size = ROWS, ALIGNED
            table = torch.zeros(size, dtype=torch.int32, device=device)
            self._rows = iter(table[:, :2].unbind())
            row = next(self._rows)
        return row

    def put(self, x: torch.Tensor, summary: torch.Tensor) -> None:
        """Keeps the summary of a tensor until one of the two changes.

        Arguments
        ---------
        x : torch.Tensor
            float32.
        summary : torch.Tensor
            Its summary.
        """
        self._known[x] = x._version, summary
