"""The lattice's kernels: precision, strides, and impossible paths."""

import torch

from sb_memeff.ops.lattice import forward_backward
from sb_memeff.ops.triton import lattice as kernels
from tests.unittests.ops.kernel import DEVICE


def scores(batch, rows, columns, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(batch, rows, columns, 3, generator=g).log_softmax(-1)
    return z[..., 0].to(DEVICE, dtype), z[..., 1].to(DEVICE, dtype)


def compare(blank, target, frames, targets, bound=2e-6):
    frames, targets = (
        torch.tensor(n, device=DEVICE) for n in (frames, targets)
    )
    exact = forward_backward(
        blank.double().cpu(), target.double().cpu(), frames, targets
    )
    found = kernels.forward_backward(blank, target, frames, targets)
    for a, b in zip(found, exact, strict=True):
        assert a.shape == b.shape and a.dtype == blank.dtype
        torch.testing.assert_close(
            a.double().cpu(), b, rtol=bound, atol=bound, equal_nan=True
        )
    return found


def test_float64_does_not_round():
    blank, target = scores(3, 12, 7, dtype=torch.float64)
    compare(blank, target[..., :-1], [12, 5, 9], [6, 6, 1], bound=1e-12)


def test_hundreds_of_frames():
    blank, target = scores(1, 200, 2)
    compare(blank, target[..., :-1], [200], [1])


def test_impossible_paths():
    blank, target = scores(3, 6, 4)
    target[0] = -torch.inf
    blank[1, 2] = -torch.inf
    blank[2, 5, 3] = -torch.inf
    found = compare(blank, target[..., :-1], [6, 6, 6], [3, 3, 3])
    assert found[0].isneginf().tolist() == [True, True, True]
    assert all(not x.any() for x in found[1:])


def test_nan_comes_out():
    blank, target = scores(2, 6, 4)
    blank[0, 3, 1] = torch.nan
    found = compare(blank, target[..., :-1], [6, 6], [3, 3])
    assert found[0].isnan().tolist() == [True, False]
    assert found[1][0].isnan().any() and found[1][1].isfinite().all()


def test_any_strides():
    blank, target = scores(3, 9, 5)
    frames, targets = [9, 4, 7], [4, 2, 3]
    compare(
        blank.transpose(1, 2).contiguous().transpose(1, 2),
        target[..., :-1].flip(-1).flip(-1),
        frames,
        targets,
    )
    expanded = blank[:1].expand(3, 9, 5)
    compare(expanded, target[..., :-1], frames, targets)
