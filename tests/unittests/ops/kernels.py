"""Shared by the tests of Triton kernels.

Without a GPU they run in Triton's interpreter, see tests/conftest.py.
"""

import torch

from sb_memeff.ops import grid, summary
from sb_memeff.ops.dispatch import DTYPES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def poison(monkeypatch):
    """Fills what a kernel must write with NaN, where a test can see it."""
    empty_like, new_empty = torch.empty_like, torch.Tensor.new_empty

    def filled(make):
        def made(*args, **kwargs):
            x = make(*args, **kwargs)
            return x.fill_(torch.nan) if x.is_floating_point() else x

        return made

    monkeypatch.setattr(torch, "empty_like", filled(empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", filled(new_empty))


def force_grid_kernels(monkeypatch, forced=True):
    """Streams of any device take the kernels, or the plain forms."""
    for module in (grid, summary):
        monkeypatch.setattr(
            module,
            "runs_fused",
            lambda *tensors: forced and all(x.dtype in DTYPES for x in tensors),
        )


def error(found, exact):
    """||found - exact|| / ||exact||; NaN never passes a bound."""
    found, exact = found.double().flatten(), exact.double().flatten()
    return ((found - exact).norm() / exact.norm().clamp(min=1e-30)).item()
