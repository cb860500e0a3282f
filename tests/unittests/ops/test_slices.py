"""Slices of large tensors.

Authors
 * The sb_memeff authors 2026
"""

import pytest

from sb_memeff.ops.slices import SLICE_BYTES, WHOLE_BYTES, slices


@pytest.mark.parametrize("length", [1, 7, 64, 1000])
@pytest.mark.parametrize("nbytes", [WHOLE_BYTES + 1, 1 << 27, 1 << 33])
def test_slices_cover_a_dimension_once(length, nbytes):
    found = slices(length, nbytes)
    assert [i for part in found for i in range(length)[part]] == [
        *range(length)
    ]
    largest = max(len(range(length)[part]) for part in found)
    assert largest == 1 or largest * nbytes <= SLICE_BYTES * length


@pytest.mark.parametrize("nbytes", [0, WHOLE_BYTES])
def test_small_tensors_stay_whole(nbytes):
    assert slices(5, nbytes) == [slice(None)]
