"""Parsing and formatting numbers of bytes."""

import pytest

from sb_memeff.memory.units import format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (512, 512),
        ("512B", 512),
        ("1.5kB", 1500),
        ("11GB", 11 * 10**9),
        ("11 gib", 11 * 2**30),
        (" 2 TB ", 2 * 10**12),
    ],
)
def test_sizes(size, expected):
    assert parse_bytes(size) == expected


@pytest.mark.parametrize("size", ["11", "GB", "-1GB", "11 gigs", 0, -5, None])
def test_invalid_sizes(size):
    with pytest.raises(ValueError, match="such as '11GB'"):
        parse_bytes(size)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (45_600_000, "45.6 MB"),
        (123_456_789, "123 MB"),
        (11_264_000_000, "11.3 GB"),
    ],
)
def test_written_for_people(size, expected):
    assert format_bytes(size) == expected
