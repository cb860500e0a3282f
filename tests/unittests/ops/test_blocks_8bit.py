"""Tensors in 8 bits.

Authors
 * The sb_memeff authors 2026
"""

import bitsandbytes
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sb_memeff.ops.blocks_8bit import (
    BLOCK,
    SLICE,
    Codebook,
    Quantized8bit,
    dither_phase,
)

CPU = torch.device("cpu")


def sample(signed, size=100 * BLOCK):
    """Values over many orders of magnitude, zeros among them."""
    torch.manual_seed(0)
    x = 10 ** (-8 * torch.rand(size)) * (torch.rand(size) > 0.05)
    return x * torch.randn(size).sign() if signed else x


def extreme(block):
    """The value of largest magnitude."""
    return block[block.abs().argmax()]


def reference(codebook, x):
    """The nearest code of each value, by trying all of them."""
    codes = []
    for block in x.split(BLOCK):
        scaled = block / extreme(block)
        distance = (scaled[:, None] - codebook.values).abs()
        codes.append(distance.argmin(1))
    return torch.cat(codes)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("size", [1, 255, 256, 257, 5000, SLICE + 300])
def test_nearest_code(signed, size):
    codebook = Codebook(signed, CPU)
    x = sample(signed, size)
    x[0] = 1.0
    packed = codebook.quantize(x)
    expected = reference(codebook, x)
    if not signed:
        expected.clamp_(min=1)
    assert torch.equal(packed.codes.long(), expected)
    scales = torch.stack([extreme(block) for block in x.split(BLOCK)])
    assert torch.equal(packed.scales, scales)


def test_the_largest_value_of_a_block_may_be_negative():
    """That of the last block too, which may be shorter."""
    codebook = Codebook(True, CPU)
    x = torch.full((BLOCK + 2,), 0.1)
    x[3], x[-1] = -4.0, -2.0
    packed = codebook.quantize(x)
    assert packed.scales.tolist() == [-4.0, -2.0]
    restored = codebook.dequantize(packed)
    torch.testing.assert_close(restored, x, rtol=0.05, atol=0)
    assert restored[3] == -4.0 and restored[-1] == -2.0


def test_a_negative_momentum_does_not_shrink():
    """It is 10 times a constant gradient in the end."""
    codebook = Codebook(True, CPU)
    momentum = gradient = torch.tensor([-1.0, 0.1])
    for _ in range(200):
        momentum = 0.9 * momentum + gradient
        momentum = codebook.dequantize(codebook.quantize(momentum))
    assert momentum[0].item() == pytest.approx(-10, rel=1e-5)
    # bitsandbytes' does.
    momentum = gradient
    for _ in range(200):
        momentum = 0.9 * momentum + gradient
        packed = torch.ops.bitsandbytes.quantize_blockwise(
            momentum, codebook.values, BLOCK
        )
        momentum = codebook.dequantize(Quantized8bit(*packed))
    assert momentum[0] > -9.5


@pytest.mark.parametrize("signed", [True, False])
def test_error_is_at_most_half_a_gap(signed):
    codebook = Codebook(signed, CPU)
    x = sample(signed)
    packed = codebook.quantize(x)
    scale = packed.scales.repeat_interleave(BLOCK)
    error = (codebook.dequantize(packed) - x).abs() / scale
    values = codebook.values
    above = torch.searchsorted(values, x / scale).clamp(1, 255)
    gap = values[above] - values[above - 1]
    if signed:
        assert (error <= gap / 2 + 1e-7).all()
    else:
        # What would become 0 is raised to the smallest number.
        small = above == 1
        assert (error[~small] <= gap[~small] / 2 + 1e-7).all()
        assert (error[small] <= 1.0001 * values[1]).all()


def test_bitsandbytes_misses_the_nearest_code_on_the_cpu():
    """Codebook._nearest can go when this fails."""
    codebook = Codebook(False, CPU)
    x = sample(False)
    codes, _ = torch.ops.bitsandbytes.quantize_blockwise(
        x, codebook.values, BLOCK
    )
    missed = (codes.long() != reference(codebook, x)).float().mean()
    assert missed > 0.05, bitsandbytes.__version__


def dithered(codebook, x, step):
    """Codes and scales of a step."""
    packed = Quantized8bit.empty_like(x)
    phase = dither_phase(torch.tensor(float(step)))
    codebook.quantize_into(packed, x, phase)
    return packed


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("size", [1, 300, SLICE + 300])
def test_dithered_values_are_right_in_the_mean(signed, size):
    """Each is one of the two numbers around it."""
    codebook = Codebook(signed, CPU)
    x = sample(signed, size)
    x[0] = 1.0
    steps = range(3000, 3100)
    mean = sum(
        codebook.dequantize(dithered(codebook, x, step)) for step in steps
    ) / len(steps)
    packed = codebook.quantize(x)
    scale = packed.scales.repeat_interleave(BLOCK)[:size]
    scaled = (x / scale).contiguous()
    above = torch.searchsorted(codebook.values, scaled).clamp(1, 255)
    gap = (codebook.values[above] - codebook.values[above - 1]) * scale.abs()
    # What would become 0 is raised to the smallest number. None is below -0.993.
    is_between = (above > 1) | (signed & (scaled >= codebook.values[0]))
    error = (mean - x).abs()[is_between]
    bound = 0.03 * gap + 1e-6 * x.abs()
    assert (error <= bound[is_between]).all()
    one = codebook.dequantize(dithered(codebook, x, 7))
    assert ((one - x).abs() <= 1.0001 * gap + 1e-9).all()
    assert one[0] == 1


def test_dithering_is_that_of_the_step():
    """It resumes, and does not wear numbers off that have codes."""
    codebook = Codebook(False, CPU)
    x = sample(False)
    a, b, c = (dithered(codebook, x, step).codes for step in (5, 5, 6))
    assert torch.equal(a, b) and not torch.equal(a, c)
    for step in range(20):
        packed = dithered(codebook, codebook.values.clone()[1:], step)
        assert packed.codes.tolist() == list(range(1, 256))


def test_no_positive_second_moment_becomes_zero():
    x = torch.tensor([1.0, 1e-12, 0.0])
    codebook = Codebook(False, CPU)
    for packed in (codebook.quantize(x), dithered(codebook, x, 1)):
        values = codebook.dequantize(packed)
        assert values[0] == 1 and 0 < values[1] < 4e-7


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_dithered_blocks_that_are_not_finite(bad):
    codebook = Codebook(False, CPU)
    x = sample(False, 2 * BLOCK)
    x[3] = bad
    values = codebook.dequantize(dithered(codebook, x, 1))
    assert not values[:BLOCK].isfinite().any()
    assert values[BLOCK:].isfinite().all()


@pytest.mark.parametrize("signed", [True, False])
def test_zeros_stay_zeros(signed):
    codebook = Codebook(signed, CPU)
    packed = codebook.quantize(torch.zeros(2 * BLOCK))
    assert torch.equal(codebook.dequantize(packed), torch.zeros(2 * BLOCK))


@pytest.mark.parametrize("signed", [True, False])
def test_requantize_recovers_the_codes(signed):
    codebook = Codebook(signed, CPU)
    packed = codebook.quantize(-sample(True) if signed else sample(False))
    values = codebook.dequantize(packed)
    for again in (
        codebook.requantize(values, packed.scales),
        # The extreme is exact, so that nothing is lost without the scales.
        codebook.quantize(values),
    ):
        assert torch.equal(again.codes, packed.codes)
        assert torch.equal(again.scales, packed.scales)


@pytest.mark.parametrize("signed", [True, False])
def test_requantize_recovers_the_codes_of_zeros(signed):
    codebook = Codebook(signed, CPU)
    x = sample(signed, 2 * BLOCK + 3)
    x[BLOCK : 2 * BLOCK] = 0
    x[-3:] = 0
    packed = codebook.quantize(x)
    again = codebook.requantize(codebook.dequantize(packed), packed.scales)
    assert torch.equal(again.codes, packed.codes)
    # The 0 of other blocks, which bitsandbytes has, stays 0.
    packed.codes[5] = codebook.values.tolist().index(0)
    values = codebook.dequantize(packed)
    again = codebook.requantize(values, packed.scales)
    assert torch.equal(codebook.dequantize(again), values)


def test_requantize_recovers_scales_that_are_magnitudes():
    """As earlier versions and bitsandbytes save them."""
    codebook = Codebook(True, CPU)
    x = -sample(True)
    scales = torch.stack([block.abs().max() for block in x.split(BLOCK)])
    old = codebook.requantize(x, scales)
    values = codebook.dequantize(old)
    again = codebook.requantize(values, scales)
    assert torch.equal(again.codes, old.codes)
    assert torch.equal(again.scales, scales)
    # They are needed: a negative one is not among the values.
    assert not torch.equal(codebook.quantize(values).scales.abs(), scales)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_shape_dtype_and_layout(dtype):
    codebook = Codebook(True, CPU)
    x = torch.randn(4, 8, 5, 5, dtype=dtype)
    packed = codebook.quantize(x)
    strided = codebook.quantize(x.to(memory_format=torch.channels_last))
    assert packed.codes.shape == x.shape
    assert torch.equal(packed.codes, strided.codes)
    restored = codebook.dequantize(packed)
    assert restored.dtype == torch.float32 and restored.is_contiguous()
    assert packed.nbytes == x.numel() + 4 * (-(-x.numel() // BLOCK))


def test_not_a_number_is_not_hidden():
    x = torch.ones(2 * BLOCK)
    x[3] = torch.nan
    x[BLOCK + 1] = torch.inf
    codebook = Codebook(True, CPU)
    restored = codebook.dequantize(codebook.quantize(x))
    assert not restored[3].isfinite() and not restored[BLOCK + 1].isfinite()


def test_fake_tensors():
    with FakeTensorMode():
        codebook = Codebook(True, CPU)
        packed = codebook.quantize(torch.randn(70000))
        assert codebook.dequantize(packed).shape == (70000,)
        assert packed.nbytes == 70000 + 4 * 274


def test_too_large():
    with FakeTensorMode(), pytest.raises(ValueError, match="2147483648"):
        Codebook(True, CPU).quantize(torch.empty(1 << 31))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("signed", [True, False])
def test_cuda_finds_the_same_codes(signed):
    x = sample(signed)
    here = Codebook(signed, CPU).quantize(x)
    there = Codebook(signed, torch.device("cuda")).quantize(x.cuda())
    assert isinstance(there, Quantized8bit)
    assert torch.equal(here.codes, there.codes.cpu())
    assert torch.equal(here.scales, there.scales.cpu())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_bitsandbytes_hides_not_a_number_on_cuda():
    """Its kernel could do instead of ours if this fails."""
    codebook = Codebook(True, torch.device("cuda"))
    x = torch.ones(BLOCK, device="cuda")
    x[3] = torch.nan
    packed = Quantized8bit(
        *torch.ops.bitsandbytes.quantize_blockwise(x, codebook.values, BLOCK)
    )
    assert codebook.dequantize(packed).isfinite().all()
