"""Sums of gradients with their copies in half precision."""

import pytest
import torch

from sb_memeff.nnet.reversible.gradient_sums import GradientSums, is_unshared
from tests.unittests.ops.kernel import DEVICE, force_stream_kernels


@pytest.fixture
def sums(monkeypatch):
    force_stream_kernels(monkeypatch)
    return GradientSums()


def gradients(*shape):
    torch.manual_seed(0)
    return torch.randn(2, *shape, device=DEVICE).unbind()


def clones(*shape):
    """Each in memory of its own."""
    return [x.clone() for x in gradients(*shape)]


def test_a_sum_and_its_copy(sums):
    x, y = clones(3, 5)
    expected = x + y
    total = sums.add(x, y, torch.float16)
    assert total is x and torch.equal(total, expected)
    (copy,) = (copy for _, copy in sums._copies.values())
    assert sums.converted(total, torch.float16) is copy
    assert torch.equal(copy, expected.half())
    # It was taken.
    assert not sums._copies
    again = sums.converted(total, torch.float16)
    assert again is not copy and torch.equal(again, copy)


def test_another_precision_than_expected(sums):
    total = sums.add(*clones(5), torch.float16)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        converted = sums.converted(total, dtype)
        assert converted.dtype == dtype
        assert torch.equal(converted, total.to(dtype))


def test_a_copy_is_forgotten_with_its_sum(sums):
    total = sums.add(*clones(5), torch.float16)
    total.mul_(3)
    assert torch.equal(sums.converted(total, torch.float16), total.half())
    total = sums.add(total, total.clone(), torch.float16)
    assert len(sums._copies) == 1
    del total
    assert not sums._copies


@pytest.mark.parametrize(
    "refer", [torch.Tensor.detach, lambda x: x[1:], torch.t]
)
def test_memory_that_is_shared_is_not_overwritten(sums, refer):
    x, y = clones(3, 5)
    other, before = refer(x), x.clone()
    total = sums.add(x, y, torch.float16)
    assert torch.equal(x, before) and torch.equal(total, before + y)
    del other
    assert sums.add(x, y, torch.float16) is x


def test_one_value_for_all_is_not_overwritten(sums):
    """As the gradient of a sum is."""
    x, y = (
        torch.ones(1, device=DEVICE).expand(3, 5).detach(),
        gradients(3, 5)[1],
    )
    assert is_unshared(x)
    total = sums.add(x, y, torch.float16)
    assert torch.equal(total, 1 + y)


@pytest.mark.parametrize(
    "forced, dtype", [(True, torch.float32), (False, torch.float16)]
)
def test_without_kernel_or_conversion_it_is_a_plain_sum(
    monkeypatch, forced, dtype
):
    force_stream_kernels(monkeypatch, forced)
    x, y = clones(3, 5)
    before, sums = x.clone(), GradientSums()
    total = sums.add(x, y, dtype)
    assert torch.equal(total, before + y) and torch.equal(x, before)
    assert not sums._copies
