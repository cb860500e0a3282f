"""Kernels for rows of logits: scales, strides, and what is not finite."""

import pytest
import torch

from sb_memeff.ops import logit_rows as rows
from sb_memeff.ops.triton import logit_rows as kernels
from tests.unittests.ops.kernel import DEVICE

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def batch(size, vocabulary, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(size, vocabulary, generator=g)
    target = torch.randint(1, vocabulary, (size,), generator=g)
    blank, emission = torch.rand(2, size, generator=g)
    return [
        x.to(DEVICE) for x in (logits.to(dtype), target, blank, 0.5 * emission)
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2), (5, 1000), (3, 1025)])
def test_scale_of_the_gradient(shape, dtype):
    """Room in float16; and rounding alone is no deviation."""
    logits, target, blank, emission = batch(*shape, dtype)
    lse = rows.row_scores(logits.double(), target, 0)[0].float()
    deviation = torch.zeros(1, device=DEVICE)
    arguments = logits, lse, target, blank, emission, 0, deviation, 1e-3
    found, undo = kernels.row_gradient(*arguments, clamp=0.2)
    assert found.dtype == dtype and undo is None
    found, undo = kernels.row_gradient(*arguments, fit=rows.scale_into_float16)
    assert found.dtype == dtype
    assert 8 <= found.abs().max() < 16
    assert torch.log2(undo).frac() == 0
    # Sums of a thousand float32 values, and no more.
    assert 0 <= deviation < 0.05


def test_other_logits_are_noticed():
    logits, target, blank, emission = batch(5, 300, torch.float32)
    lse = rows.row_scores(logits, target, 0)[0]
    logits[3] += 0.01
    deviation = torch.zeros(1, device=DEVICE)
    kernels.row_gradient(
        logits, lse, target, blank, emission, 0, deviation, 1e-3
    )
    plain = torch.zeros(1, device=DEVICE)
    rows.row_gradient(
        logits.double(),
        lse.double(),
        target,
        blank.double(),
        emission.double(),
        0,
        plain,
    )
    assert deviation > 1
    torch.testing.assert_close(deviation, plain, rtol=1e-3, atol=0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite_match_the_plain_form(value):
    """And stays in its row."""
    logits, target, blank, emission = batch(4, 30, torch.float32)
    logits[1, 7] = value
    logits[2] = -torch.inf
    found = kernels.row_scores(logits, target, 0)
    plain = rows.row_scores(logits, target, 0)
    for a, b in zip(found, plain, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)
    deviation = torch.zeros(1, device=DEVICE)
    arguments = logits, plain[0], target, blank, emission, 0, deviation
    a, _ = kernels.row_gradient(*arguments, 1e-3)
    b, _ = rows.row_gradient(*arguments)
    torch.testing.assert_close(a, b, equal_nan=True)
    assert deviation.isfinite()


@pytest.mark.parametrize("layout", ["columns first", "every other", "expanded"])
def test_any_strides(layout):
    logits, target, blank, emission = batch(6, 40, torch.float32)
    if layout == "columns first":
        logits = logits.t().contiguous().t()
    elif layout == "every other":
        logits, target = logits[:, ::2], target % 20
    else:
        logits = logits[:1].expand(6, 40)
    for a, b in zip(
        kernels.row_scores(logits, target, 0),
        rows.row_scores(logits, target, 0),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    lse = rows.row_scores(logits, target, 0)[0]
    blank = torch.stack([blank, blank], 1)[:, 0]
    arguments = logits, lse, target, blank, emission, 0
    deviation = torch.zeros(1, device=DEVICE)
    torch.testing.assert_close(
        kernels.row_gradient(*arguments, deviation, 1e-3)[0],
        rows.row_gradient(*arguments)[0],
    )


def test_no_rows():
    logits, target, blank, emission = batch(0, 5, torch.float32)
    assert kernels.row_scores(logits, target, 0)[0].shape == (0,)
    deviation = torch.zeros(1, device=DEVICE)
    arguments = logits, blank, target, blank, emission, 0, deviation
    assert kernels.row_gradient(*arguments, 1e-3)[0].shape == (0, 5)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_in_its_row_in_float16(value):
    """The scale of a float16 tile is that of its finite rows."""
    logits, target, blank, emission = batch(3, 8, torch.float16)
    lse = rows.row_scores(logits, target, 0)[0]
    weight = torch.tensor([1.0, value, 0.5], device=DEVICE)
    arguments = logits, lse, target, blank, emission, 0
    found, undo = rows.row_gradient(
        *arguments, weight=weight, fit_into_float16=True
    )
    assert undo.isfinite() and not found[1].isfinite().any()
    assert found[[0, 2]].isfinite().all()
    arguments = logits.double(), lse.double(), target
    exact, _ = rows.row_gradient(
        *arguments, blank.double(), emission.double(), 0, weight=weight
    )
    torch.testing.assert_close(
        found.double() * undo, exact, rtol=1e-3, atol=1e-6, equal_nan=True
    )


def test_scale_for_float16_is_a_power_of_two():
    for size in (1e-35, 3e-8, 0.7, 1.0, 12345.6, 3e38):
        scale = rows.scale_into_float16(torch.tensor(size))
        assert torch.log2(scale).frac() == 0
        if size > 1e-30:
            assert 8 <= scale.double() * size < 16
    assert rows.scale_into_float16(torch.tensor(0.0)).isfinite()
