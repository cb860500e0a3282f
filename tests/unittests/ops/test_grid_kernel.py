"""Rounding onto the grid by the kernel against torch's operations."""

import pytest
import torch

from sb_memeff.nnet.reversible.grid import round_to_grid
from sb_memeff.ops.triton import grid
from tests.unittests.ops.kernels import DEVICE, poison


def values(dtype, bits):
    """Ties, both zeros, what is beyond float32's integers, and the rest."""
    torch.manual_seed(0)
    ties = (torch.arange(-9, 10) / 2 + 0.5) * 2.0**-bits
    odd = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-30, -1e-30]
    large = torch.tensor([2.0**22 + 0.5, -(2.0**23) - 1, 2.0**30, -(2.0**40)])
    x = torch.cat([ties, torch.tensor(odd), large * 2.0**-bits])
    return torch.cat([x, 3 * torch.randn(2000), 1e-4 * torch.randn(500)]).to(
        DEVICE, dtype
    )


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's
@pytest.mark.parametrize("bits", [0, 9, 12])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16]
)
def test_the_same_bits(monkeypatch, dtype, bits):
    x = values(dtype, bits)
    exact = (x.double() * 2.0**bits).round() * 2.0**-bits
    poison(monkeypatch)
    found = grid.round_to_grid(x, bits)
    assert found.dtype == torch.float32
    assert torch.equal(found.isnan(), exact.isnan())
    assert torch.equal(found.nan_to_num(7.0), exact.float().nan_to_num(7.0))
    assert not (found.signbit() & (found == 0)).any()


def test_layouts():
    x = torch.randn(2, 3, 4, 5, device=DEVICE)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        laid_out = x.to(memory_format=memory_format)
        found = grid.round_to_grid(laid_out, 12)
        assert found.stride() == laid_out.stride()
        assert torch.equal(found, round_to_grid(x, 12))
    assert grid.round_to_grid(x[:0], 12).shape == (0, 3, 4, 5)


def test_other_strides_take_the_plain_form(monkeypatch):
    """A slice has values of others in between."""
    monkeypatch.setattr(
        "sb_memeff.nnet.reversible.grid.runs_fused", lambda *tensors: True
    )
    x = torch.randn(2, 6, 4, 5, device=DEVICE)
    flat = x.flatten()
    for view in (
        x[:, ::2],
        x[..., 1:],
        x.expand(3, 2, 6, 4, 5),
        flat[::2],
        flat[:1].expand(5),
    ):
        assert torch.equal(
            round_to_grid(view, 12), round_to_grid(view.contiguous(), 12)
        )


def test_gradient_passes(monkeypatch):
    monkeypatch.setattr(
        "sb_memeff.nnet.reversible.grid.runs_fused", lambda *tensors: True
    )
    x = torch.randn(7, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    upstream = torch.arange(7.0, device=DEVICE)
    (round_to_grid(x, 12) @ upstream).backward()
    assert torch.equal(x.grad, upstream.bfloat16())
