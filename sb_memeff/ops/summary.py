"""Summaries of tensors: the largest magnitude and a checksum.

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
# Rows of a table, which one launch fills with zeros; and integers of a row. A row
# has 16 bytes, because Triton compiles a kernel again for another alignment.
ROWS, ALIGNED = 256, 4


def checksum(tensor: torch.Tensor) -> torch.Tensor:
    """Sums the bits of a tensor as integers, with wrap-around.

    The order of summation does not matter, so the result is the same for any
    number of threads, any device and any layout.

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
    """Two scalars on the device of a float32 tensor."""

    # float32; NaN if there is one.
    largest_magnitude: torch.Tensor
    # int32.
    checksum: torch.Tensor


class Summaries:
    """Summaries of float32 tensors.

    A kernel that writes a tensor also computes its summary, at no further pass
    over memory, and stores it here.

    Example
    -------
    >>> Summaries().of(torch.tensor([1.0, -3.0])).largest_magnitude
    tensor(3.)
    """

    def __init__(self):
        # By tensor, which is not kept alive: its version and its summary.
        self._known: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._rows: Iterator[tuple[torch.Tensor, TensorSummary]] = iter(())

    def of(self, x: torch.Tensor) -> TensorSummary:
        """Returns the summary of a tensor, computed if it is not known.

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
        """Returns the checksum of a tensor, computed if it is not known.

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
        """The summary if it is known or a kernel can compute it."""
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
        """Makes an empty summary for a kernel to fill.

        Arguments
        ---------
        device : torch.device
            Device of the tensors; the same in all calls.

        Returns
        -------
        tuple
            A row of zeros, int32, and the summary, which is a view of it. In
            the row, a kernel raises the first value to the bits of the largest
            magnitude and adds the checksum to the second.
        """
        row = next(self._rows, None)
        if row is None:
            size = ROWS, ALIGNED
            table = torch.zeros(size, dtype=torch.int32, device=device)
            magnitudes = table.view(torch.float32)[:, 0]
            scalars = magnitudes.unbind(), table[:, 1].unbind()
            summaries = map(TensorSummary, *scalars)
            self._rows = zip(table.unbind(), summaries)
            row = next(self._rows)
        return row

    def put(self, x: torch.Tensor, summary: TensorSummary) -> None:
        """Stores the summary of a tensor, until the tensor changes.

        Arguments
        ---------
        x : torch.Tensor
            float32.
        summary : TensorSummary
            Its summary.
        """
        self._known[x] = x._version, summary
