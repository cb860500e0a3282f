"""Summaries of tensors: their largest magnitude, and a checksum.

Both are integers whose order does not matter, so they are the same for any
number of threads, any device and any layout.

Authors
 * The sb_memeff authors 2026
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.utils.weak import WeakIdKeyDictionary

from sb_memeff.ops.dispatch import runs_fused

__all__ = ["Summaries", "TensorSummary", "checksum", "is_dense"]

_INTEGER_OF_SIZE = {
    1: torch.int8,
    2: torch.int16,
    4: torch.int32,
    8: torch.int64,
}
# Rows of a table, which one launch fills with zeros; and the integers of a row,
# 16 bytes, so that Triton compiles no kernel twice.
ROWS, ALIGNED = 256, 4


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


class TensorSummary(NamedTuple):
    """Scalars that summarise a float32 tensor, on its device."""

    # float32; NaN if there is one.
    largest_magnitude: torch.Tensor
    # int32.
    checksum: torch.Tensor


class Summaries:
    """Summaries of float32 tensors, by tensor.

    A kernel that computes a tensor finds its summary without reading it again,
    and leaves it here.

    Example
    -------
    >>> Summaries().of(torch.tensor([1.0, -3.0])).largest_magnitude
    tensor(3.)
    """

    def __init__(self):
        # With the version of the tensor. Tensors are not kept alive.
        self._known: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._rows: Iterator[tuple[torch.Tensor, TensorSummary]] = iter(())

    def of(self, x: torch.Tensor) -> TensorSummary:
        """The summary of a tensor, computed if it is not known.

        Arguments
        ---------
        x : torch.Tensor
            float32, any strides.

        Returns
        -------
        TensorSummary
            Both scalars.
        """
        summary = self._found(x)
        if summary is None:
            smallest, largest = (
                x.aminmax() if x.numel() else 2 * [x.new_zeros(())]
            )
            summary = TensorSummary(
                torch.maximum(largest, smallest.neg()), checksum(x)
            )
            self.put(x, summary)
        return summary

    def checksum(self, x: torch.Tensor) -> torch.Tensor:
        """The checksum of a tensor, computed if it is not known.

        Arguments
        ---------
        x : torch.Tensor
            float32, any strides.

        Returns
        -------
        torch.Tensor
            A scalar of int32.
        """
        summary = self._found(x)
        return checksum(x) if summary is None else summary.checksum

    def _found(self, x: torch.Tensor) -> TensorSummary | None:
        """The summary that is known, or that a kernel finds."""
        version, summary = self._known.get(x, (None, None))
        if version == x._version:
            return summary
        if not (runs_fused(x) and is_dense(x)):
            return None
        from sb_memeff.ops.triton.summary import summarize

        row, summary = self.new(x.device)
        summarize(x, row)
        self.put(x, summary)
        return summary

    def new(self, device: torch.device) -> tuple[torch.Tensor, TensorSummary]:
        """A summary of nothing, for a kernel to complete.

        Arguments
        ---------
        device : torch.device
            Always the same one.

        Returns
        -------
        tuple
            Zeros, int32, in which a kernel raises the first one to the bits of
            the largest magnitude, and adds the checksum to the second; and the
            summary that they are.
        """
        row = next(self._rows, None)
        if row is None:
            size = ROWS, ALIGNED
            table = torch.zeros(size, dtype=torch.int32, device=device)
            magnitudes = table.view(torch.float32)[:, 0]
            scalars = magnitudes.unbind(), table[:, 1].unbind()
            summaries = map(TensorSummary, *scalars)
            self._rows = zip(table.unbind(), summaries, strict=True)
            row = next(self._rows)
        return row

    def put(self, x: torch.Tensor, summary: TensorSummary) -> None:
        """Keeps the summary of a tensor until one of the two changes.

        Arguments
        ---------
        x : torch.Tensor
            float32.
        summary : TensorSummary
            Its summary.
        """
        self._known[x] = x._version, summary
