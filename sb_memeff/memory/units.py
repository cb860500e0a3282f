"""Parses and formats numbers of bytes.

Authors
 * The sb_memeff authors 2026
"""

import math
import re

__all__ = ["format_bytes", "parse_bytes"]


def parse_bytes(size: float | str) -> int:
    """Parses a size such as "11GB".

    Arguments
    ---------
    size : int or str
        Number of bytes, or a number with a unit: B, kB, MB, GB, TB (powers of 1000),
        KiB, MiB, GiB, TiB (powers of 1024).

    Returns
    -------
    int
        Bytes.

    Raises
    ------
    ValueError
        If the size has another form, or is not positive.

    Example
    -------
    >>> parse_bytes("11GB"), parse_bytes("1.5 GiB")
    (11000000000, 1610612736)
    """
    number = size
    if isinstance(size, str):
        match = re.fullmatch(
            r"(\d+(?:\.\d*)?)\s*(?:([kmgt])(i?))?b", size.strip().lower()
        )
        number = 0
        if match:
            digits, prefix, binary = match.groups()
            power = "kmgt".index(prefix) + 1 if prefix else 0
            number = float(digits) * (1024 if binary else 1000) ** power
    if not isinstance(number, (int, float)) or not number > 0:
        raise ValueError(
            f"A size is a positive number with a unit, such as '11GB' or "
            f"'10.5 GiB', not {size!r}."
        )
    return int(number)


def format_bytes(size: int) -> str:
    """Formats a number of bytes.

    Arguments
    ---------
    size : int
        Bytes.

    Returns
    -------
    str
        At least three digits and B, kB, MB or GB (powers of 1000).

    Example
    -------
    >>> format_bytes(11_264_000_000), format_bytes(512)
    ('11.3 GB', '512 B')
    """
    for power, unit in ((3, "GB"), (2, "MB"), (1, "kB")):
        if size >= 1000**power:
            value = size / 1000**power
            digits = max(0, 2 - int(math.log10(value)))
            return f"{value:.{digits}f} {unit}"
    return f"{size} B"
