"""Loads and stores a block of up to 256 values, in float32 or in 8 bits.

In a table (``table``), a state has two rows of addresses: of its codes and of its
blocks' scales.

Most loops are vectorized. In between, the values of a block stay in the CPU's first
cache.

Authors
 * The sb_memeff authors 2026
"""

import numpy as np

from sb_memeff.ops.blocks_8bit import BLOCK, Codebook
from sb_memeff.ops.numba.compiled import (
    array_at,
    as_float,
    compiled,
    multiply_add,
)

__all__ = [
    "dithering_tables",
    "load_floats",
    "load_state",
    "rounding_tables",
    "store_dithered",
    "store_floats",
    "store_nearest",
]

INFINITY = np.int32(0x7F800000)
MAGNITUDE = np.int32(0x7FFFFFFF)
LOWEST = np.int32(-0x80000000)
SIGN = np.uint32(0x8000)


def rounding_tables(codebook: Codebook) -> tuple[np.ndarray, ...]:
    """Returns the tables of a codebook for ``store_nearest``.

    Arguments
    ---------
    codebook : Codebook
        On the CPU.

    Returns
    -------
    tuple of numpy.ndarray
        They are not copies.
    """
    return tuple(
        x.numpy() for x in (codebook.values, codebook.lower, codebook.middles)
    )


def dithering_tables(codebook: Codebook) -> tuple[np.ndarray, ...]:
    """Returns the tables of a codebook for ``store_dithered``.

    Arguments
    ---------
    codebook : Codebook
        On the CPU.

    Returns
    -------
    tuple of numpy.ndarray
        They are not copies.
    """
    return tuple(
        x.numpy()
        for x in (
            codebook.values,
            codebook.below,
            codebook.following,
            codebook.gaps,
        )
    )


@compiled
def load_floats(x, address, block):
    """Loads a block of a float32 tensor."""
    values = array_at(address + 4 * BLOCK * block, x.size, np.float32)
    for i in range(x.size):
        x[i] = values[i]


@compiled
def store_floats(x, address, block):
    """Stores a block of a float32 tensor."""
    values = array_at(address + 4 * BLOCK * block, x.size, np.float32)
    for i in range(x.size):
        values[i] = x[i]


@compiled
def _packed(x, table, row, tensor, block):
    """Codes of a block, and its scale as an array."""
    codes = array_at(table[row, tensor] + BLOCK * block, x.size, np.uint8)
    scale = array_at(table[row + 1, tensor] + 4 * block, 1, np.float32)
    return codes, scale


@compiled
def load_state(x, table, row, tensor, block, values):
    """Loads a block of a state."""
    codes, scale = _packed(x, table, row, tensor, block)
    for i in range(x.size):
        x[i] = values[codes[i]] * scale[0]


@compiled
def _extreme(x):
    """The value of largest magnitude; NaN if there is one."""
    # Floats are in the order of their bits. Maxima of integers are vectorized.
    bits = x.view(np.int32)
    highest, largest = LOWEST, np.int32(0)
    for i in range(x.size):
        highest = max(highest, bits[i])
        largest = max(largest, np.int32(bits[i] & MAGNITUDE))
    if largest > INFINITY:
        return np.float32(np.nan)
    extreme = as_float(largest)
    return extreme if highest == largest else -extreme


@compiled
def _scaled(ratio, x, scale):
    """Stores the scale of a block, and what the block is relative to it."""
    scale[0] = _extreme(x)
    # A block of zeros has no scale.
    divisor = scale[0] if scale[0] != 0 else np.float32(1)
    for i in range(x.size):
        ratio[i] = x[i] / divisor


@compiled
def store_nearest(x, ratio, table, row, tensor, block, tables, least):
    """Stores a block of a state; changes it to what rounding takes from it.

    Rounds to the nearest number with a code, or to the one of the least code.
    """
    values, lower, middles = tables
    codes, scale = _packed(x, table, row, tensor, block)
    _scaled(ratio, x, scale)
    bits = ratio.view(np.uint32)
    for i in range(x.size):
        # Sign, exponent and 7 bits of the mantissa leave two candidates.
        code = lower[(bits[i] >> 16) ^ SIGN]
        codes[i] = max(code + (ratio[i] > middles[code]), least)
    for i in range(x.size):
        x[i] -= values[codes[i]] * scale[0]


@compiled
def store_dithered(x, ratio, table, row, tensor, block, tables, dither):
    """Stores a block of a state without negative values, rounded up or down."""
    values, below, following, gaps = tables
    codes, scale = _packed(x, table, row, tensor, block)
    _scaled(ratio, x, scale)
    bits = ratio.view(np.uint32)
    for i in range(x.size):
        lower = below[(bits[i] >> 16) ^ SIGN]
        code = lower + (ratio[i] >= following[lower])
        limit = multiply_add(gaps[code], dither[i], values[code])
        codes[i] = max(code + (ratio[i] > limit), 1)
