"""Numbers of bytes for people.

Authors
 * The sb_memeff authors 2026
"""

import math
import re

__all__ = ["format_bytes", "parse_bytes"]


def parse_bytes(size: float | str) -> int:
    """The number of bytes that a size such as "11GB" stands for.

    Arguments
    ---------
    size : int or str
        Bytes; or a number and one of B, kB, MB, GB, TB (powers of 1000),
        KiB, MiB, GiB, TiB (powers of 1024).

    Returns
    -------
    int
        Bytes.

    Raises
    ------
    ValueError
        If it is neither, or not positive.

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
    """A number of bytes for people.

    Arguments
    ---------
    size : int
        Bytes.

    Returns
    -------
    str
        Three digits or more and B, kB, MB or GB (powers of 1000).

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
