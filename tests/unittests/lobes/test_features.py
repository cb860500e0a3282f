"""Check the features that a network is called with."""

import pytest
import torch

from sb_memeff.lobes.features import check_features

HALF = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("shape", [(2, 5), (2, 5, 7), (2, 1, 5, 8), (8,)])
def test_shapes_that_do_not_fit(shape):
    with pytest.raises(ValueError, match=r"\[N, T, 8\], got .*input_size"):
        check_features(torch.rand(shape), 8, torch.float32)
    check_features(torch.rand(2, 5, 8), 8, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_autocast_converts(dtype):
    x = torch.rand(2, 5, 8, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        check_features(x, 8, torch.float32)
        for wrong in (x.double(), x.long()):
            with pytest.raises(
                TypeError, match=f"{wrong.dtype}.*torch.float32"
            ):
                check_features(wrong, 8, torch.float32)
        with pytest.raises(TypeError, match="weights torch.float64"):
            check_features(torch.rand(2, 5, 8), 8, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.long, *HALF])
def test_without_autocast_dtypes_are_equal(dtype):
    x = torch.zeros(2, 5, 8, dtype=dtype)
    check_features(x, 8, dtype)
    with pytest.raises(TypeError, match=rf"net.to\({dtype}\)"):
        check_features(x, 8, torch.float32)
