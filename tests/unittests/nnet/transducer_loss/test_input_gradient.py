"""Gradients of encoder and predictor, added up run by run."""

import pytest
import torch

from sb_memeff.memory.fake import fake_tensors
from sb_memeff.memory.tracker import StorageTracker
from sb_memeff.nnet.transducer_loss.input_gradient import InputGradient

B, T, H = 5, 3, 4
RUNS = (range(2), range(2, 3), range(3, 5))
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def summed(dtype, parts, scale=None, runs=RUNS):
    """The total of parts [n, B, T, H], added up run by run."""
    gradient = InputGradient(torch.zeros(B, T, H, dtype=dtype))
    for samples in runs:
        with gradient.group(samples):
            for part in parts:
                gradient.sum += part[samples.start : samples.stop]
    return gradient.total(scale)


@pytest.mark.parametrize("scale", [None, 0.75, 2.0**-6])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_are_wide_and_rounded_once_or_twice(dtype, scale):
    torch.manual_seed(0)
    parts = torch.randn(50, B, T, H, dtype=torch.float64)
    found = summed(dtype, parts, None if scale is None else torch.tensor(scale))
    assert found.dtype == dtype and found.is_contiguous()
    exact = parts.sum(0) * (1 if scale is None else scale)
    wide = dtype in (torch.float32, torch.float64)
    rounding = 2e-5 if wide else 1.01 * torch.finfo(dtype).eps
    assert ((found.double() - exact).abs() <= rounding * exact.abs()).all()


def test_a_scale_that_bfloat16_does_not_hold():
    """1 / 3 would be off by 0.2 %."""
    found = summed(
        torch.bfloat16, torch.full((1, B, T, H), 3.0), torch.tensor(1 / 3)
    )
    assert torch.equal(found, torch.ones(B, T, H, dtype=torch.bfloat16))


@pytest.mark.parametrize("size", [1e-30, 1e-9, 1.0, 1e6])
def test_float16_before_the_scale_is_known(size):
    """Samples of any size, and others beside them."""
    sizes = torch.tensor([size, 1.0, 1e-3, size, 1.0])[:, None, None]
    scale = torch.tensor(min(2.0**10, 1 / size), dtype=torch.float64)
    torch.manual_seed(0)
    parts = torch.randn(8, B, T, H) * sizes
    found = summed(torch.float16, parts, scale)
    exact = (parts.double().sum(0) * scale).half().double()
    error = (found.double() - exact).abs()
    assert (error <= 1e-3 * exact.abs() + 2.0**-24).all()


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_stays_in_its_sample(dtype, value):
    parts = torch.ones(1, B, T, H)
    parts[0, 1, 2, 3] = value
    found = summed(dtype, parts, torch.tensor(2.0))
    assert not found[1, 2, 3].isfinite()
    others = found[[0, 2, 3, 4]]
    assert torch.equal(others, torch.full_like(others, 2))


@pytest.mark.parametrize("dtype", DTYPES)
def test_samples_without_a_run_have_none(dtype):
    found = summed(dtype, torch.ones(1, B, T, H), runs=[range(1, 2)])
    assert torch.equal(found[1], torch.ones(T, H, dtype=dtype))
    assert not found[[0, 2, 3, 4]].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_memory_is_that_of_the_input_and_of_a_run(dtype):
    samples, values = 50, 1000
    with fake_tensors(), StorageTracker() as tracker:
        x = torch.zeros(samples, 10, values // 10, dtype=dtype)
        before = tracker.alive
        gradient = InputGradient(x)
        for n in range(samples):
            with gradient.group(range(n, n + 1)):
                pass
        gradient.total(torch.tensor(2.0))
    assert tracker.peak - before < 2 * samples * values + 10 * values
