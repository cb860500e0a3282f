"""A sum and its copy: the kernel against torch's operations."""

import pytest
import torch

from sb_memeff.ops.add_and_convert import add_and_convert
from sb_memeff.ops.dispatch import DTYPES
from sb_memeff.ops.triton.launch import watch_launches
from tests.unittests.ops.kernel import DEVICE, force_stream_kernels, poison


@pytest.fixture
def launches(monkeypatch):
    """The kernel runs on any device; its name for each launch."""
    force_stream_kernels(monkeypatch)
    names = []
    with watch_launches(lambda name, arguments: names.append(name)):
        yield names


def gradients(*shape):
    torch.manual_seed(1)
    return (100 * torch.randn(2, *shape, device=DEVICE)).unbind()


def last(x):
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's
@pytest.mark.parametrize("layout", [torch.clone, last])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bits_of_torch(monkeypatch, launches, dtype, layout):
    total, gradient = map(layout, gradients(2, 9, 5, 70))
    gradient = gradient.to(dtype)
    odd = torch.tensor([torch.inf, torch.nan, -1e6, -0.0, 1e-9])
    total[0, 0, 0, :5] = odd
    expected = total + gradient
    poison(monkeypatch)
    before = total.clone()
    found, copy = add_and_convert(total, gradient, torch.float16)
    torch.testing.assert_close(total, before, rtol=0, atol=0, equal_nan=True)
    same, again = add_and_convert(total, gradient, torch.float16, True)
    assert same is total
    for a, b in [(found, copy), (same, again)]:
        for x, y in [(a, expected), (b, expected.half())]:
            torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)
            assert x.stride() == total.stride()
    assert launches == 2 * ["_add_and_convert"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_any_strides(launches, overwrite):
    """Values at the same place in memory may not belong together."""
    x, y = gradients(4, 4, 4, 4)
    for total, gradient in [
        (x, last(y)),
        (last(x), y),
        (x.transpose(0, 1), y),
        (x[:, 1:], y[:, 1:]),
        (x[..., ::2], y[..., 1::2]),
        (x, y[:, :1].expand(x.shape)),
        (x, y.double()),
    ]:
        expected = (total + gradient).to(total.dtype)
        # What lies in between stays as it is.
        whole = x.clone()
        same, copy = add_and_convert(total, gradient, torch.bfloat16, overwrite)
        assert torch.equal(same, expected)
        assert torch.equal(copy, expected.bfloat16())
        if overwrite:
            assert same is total
            total.copy_(expected - gradient)
        else:
            assert torch.equal(x, whole)
    assert not launches


def test_an_empty_sum(launches):
    x = torch.zeros(0, 3, device=DEVICE)
    for y in add_and_convert(x, x, torch.float16):
        assert y.shape == x.shape
    assert not launches
