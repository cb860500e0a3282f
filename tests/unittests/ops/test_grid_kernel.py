"""Rounding onto the grid by the kernel: layouts, and the gradient."""

import torch

from sb_memeff.nnet.reversible.grid import round_to_grid
from sb_memeff.ops.triton import grid
from tests.unittests.ops.kernel import DEVICE


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
