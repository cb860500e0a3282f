"""Slices of large tensors, so that what is computed of them is not held as a whole.

Authors
 * The sb_memeff authors 2026
"""

__all__ = ["slices"]

# Slices of smaller tensors would take time and save little.
WHOLE_BYTES = 64 << 20
SLICE_BYTES = 12 << 20


def slices(length: int, nbytes: int) -> list[slice]:
    """Divides a dimension of a large tensor.

    Arguments
    ---------
    length : int
        Size of the dimension.
    nbytes : int
        Bytes of the tensor.

    Returns
    -------
    list of slice
        One for all, up to 64 MiB; otherwise of 12 MiB or less, if the
        dimension can be divided as finely.

    Example
    -------
    >>> slices(5, 1 << 20)
    [slice(None, None, None)]
    >>> slices(5, 100 << 20)
    [slice(0, 1, None), slice(1, 2, None), slice(2, 3, None), slice(3, 4, None), slice(4, 5, None)]
    """
    if nbytes <= WHOLE_BYTES:
        return [slice(None)]
    size = max(1, length * SLICE_BYTES // nbytes)
    return [slice(i, min(i + size, length)) for i in range(0, length, size)]
