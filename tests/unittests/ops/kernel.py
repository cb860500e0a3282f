"""What the tests need of a kernel.

Without a GPU they run in Triton's interpreter, see tests/conftest.py.

Authors
 * The sb_memeff authors 2026
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from sb_memeff.nnet.reversible import gradient_sums
from sb_memeff.ops import add_and_convert, grid, summary
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


def force_stream_kernels(monkeypatch, forced=True):
    """Streams of any device take the kernels, or the plain forms."""
    for module in (grid, summary, add_and_convert, gradient_sums):
        monkeypatch.setattr(
            module,
            "runs_fused",
            lambda *tensors: forced and all(x.dtype in DTYPES for x in tensors),
        )


def error(found, exact):
    """||found - exact|| / ||exact||; NaN never passes a bound."""
    found, exact = found.double().flatten(), exact.double().flatten()
    return ((found - exact).norm() / exact.norm().clamp(min=1e-30)).item()


@dataclasses.dataclass(frozen=True)
class Kernel:
    """An operation: its kernel, its plain form, and what they are called with.

    Arguments
    ---------
    fused : callable
        Takes tensors, lists of them and settings; launches the kernel and
        returns a list of tensors. What the kernel updates is a copy.
    plain : callable
        The same by torch, of which float64 is asked.
    inputs : callable
        Draws the tensors, given a generator, a dtype and a shape.
    shapes : list of tuple
        Ragged ones among them.
    bounds : dict
        The error that is allowed, by dtype.
    settings : list of dict
        The last one asks for all that the kernel can do: it is compiled.
    dispatched : callable, optional
        As users call it; ``plain`` where that chooses.
    """

    fused: Callable[..., list[torch.Tensor]]
    plain: Callable[..., list[torch.Tensor]]
    inputs: Callable[..., tuple[Any, ...]]
    shapes: list[tuple[Any, ...]]
    bounds: dict[torch.dtype, float]
    settings: list[dict[str, Any]] = dataclasses.field(
        default_factory=lambda: [{}]
    )
    dispatched: Callable[..., object] | None = None

    def draw(self, shape, dtype):
        """Inputs of a shape, always the same ones."""
        g = torch.Generator().manual_seed(0)
        return tuple(
            [y.to(DEVICE) for y in x] if isinstance(x, list) else x.to(DEVICE)
            for x in self.inputs(g, dtype, *shape)
        )


def fp32(bound):
    """Bounds of a kernel for float32 alone."""
    return {torch.float32: bound}


def each(fp32, fp16, bf16):
    """Bounds of a kernel for each dtype that kernels take."""
    # The interpreter cuts bfloat16 off, where a GPU rounds.
    return {
        torch.float32: fp32,
        torch.float16: fp16,
        torch.bfloat16: bf16,
    }
