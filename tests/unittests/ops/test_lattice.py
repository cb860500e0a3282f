"""The transducer's lattice, against paths one by one.

Authors
 * The sb_memeff authors 2026
"""

import itertools
import math

import pytest
import torch

from sb_memeff.ops.lattice import forward_backward


def paths(frames, targets):
    """All paths, as lists of (kind, t, u)."""
    for emits in itertools.combinations(range(frames - 1 + targets), targets):
        t = u = 0
        path = []
        for n in range(frames - 1 + targets):
            if n in emits:
                path.append(("target", t, u))
                u += 1
            else:
                path.append(("blank", t, u))
                t += 1
        yield [*path, ("blank", t, u)]


def by_enumeration(blank, target):
    """Likelihood and posteriors of one sample, from all its paths."""
    frames, targets = blank.shape[0], target.shape[1]
    total = 0.0
    planes = {
        "blank": torch.zeros(frames, targets + 1, dtype=torch.float64),
        "target": torch.zeros(frames, targets, dtype=torch.float64),
    }
    scores = {"blank": blank, "target": target}
    for path in paths(frames, targets):
        p = math.exp(sum(float(scores[kind][t, u]) for kind, t, u in path))
        total += p
        for kind, t, u in path:
            planes[kind][t, u] += p
    if total:
        planes = {kind: plane / total for kind, plane in planes.items()}
    log = math.log(total) if total else -math.inf
    return log, planes["blank"], planes["target"]


def scores(batch, frames, targets, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(
        batch, frames, targets + 1, 3, generator=generator, dtype=dtype
    )
    logs = draw.log_softmax(-1)
    return logs[..., 0], logs[:, :, :targets, 1].contiguous()


def lengths(*pairs):
    return torch.tensor(pairs).T


@pytest.mark.parametrize(
    "frames, targets",
    [(1, 0), (1, 1), (1, 4), (4, 0), (2, 1), (2, 5), (5, 2), (4, 4)],
)
def test_one_sample(frames, targets):
    blank, target = scores(1, frames, targets)
    found = forward_backward(blank, target, *lengths((frames, targets)))
    log, blanks, emissions = by_enumeration(blank[0], target[0])
    assert found.log_likelihood.item() == pytest.approx(log, abs=1e-12)
    assert torch.allclose(found.blank[0], blanks, atol=1e-12)
    assert torch.allclose(found.target[0], emissions, atol=1e-12)


SIZES = [(5, 3), (1, 0), (1, 3), (4, 0), (2, 3), (3, 2)]


def test_ragged_batch():
    blank, target = scores(len(SIZES), 5, 3)
    for plane in (blank, target):
        # Values in the padding must have no influence.
        plane[1, 1:] = torch.nan
    found = forward_backward(blank, target, *lengths(*SIZES))
    for b, (frames, targets) in enumerate(SIZES):
        log, blanks, emissions = by_enumeration(
            blank[b, :frames, : targets + 1], target[b, :frames, :targets]
        )
        assert found.log_likelihood[b].item() == pytest.approx(log)
        for plane, expected in (
            (found.blank[b], blanks),
            (found.target[b], emissions),
        ):
            t, u = expected.shape
            assert torch.allclose(plane[:t, :u], expected, atol=1e-12)
            rest = plane.clone()
            rest[:t, :u] = 0
            assert (rest == 0).all()


def test_posteriors_are_the_gradient():
    blank, target = scores(3, 6, 4)
    frames, targets = lengths((6, 4), (4, 2), (5, 0))

    def log_likelihood(blank, target):
        """The recursion, cell by cell, by autograd."""
        results = []
        for b in range(3):
            alpha = {(0, 0): torch.zeros((), dtype=torch.float64)}
            for t in range(int(frames[b])):
                for u in range(int(targets[b]) + 1):
                    ways = []
                    if t:
                        ways.append(alpha[t - 1, u] + blank[b, t - 1, u])
                    if u:
                        ways.append(alpha[t, u - 1] + target[b, t, u - 1])
                    if ways:
                        alpha[t, u] = torch.logsumexp(torch.stack(ways), 0)
            end = int(frames[b]) - 1, int(targets[b])
            results.append(alpha[end] + blank[b, end[0], end[1]])
        return torch.stack(results)

    blank.requires_grad_(), target.requires_grad_()
    logs = log_likelihood(blank, target)
    expected = torch.autograd.grad(logs.sum(), (blank, target))
    found = forward_backward(blank.detach(), target.detach(), frames, targets)
    assert torch.allclose(found.log_likelihood, logs, atol=1e-12)
    assert torch.allclose(found.blank, expected[0], atol=1e-12)
    assert torch.allclose(found.target, expected[1], atol=1e-12)


def test_impossible_scores():
    """-inf in some cells; one sample without any path."""
    blank, target = scores(3, 4, 2)
    blank[0, 1, 0] = -torch.inf
    target[0, 3, :] = -torch.inf
    target[1] = -torch.inf
    blank[2, 3, 2] = -torch.inf
    found = forward_backward(blank, target, *lengths((4, 2), (4, 2), (4, 2)))
    for b in range(3):
        log, blanks, emissions = by_enumeration(blank[b], target[b])
        assert found.log_likelihood[b].item() == pytest.approx(log)
        assert torch.allclose(found.blank[b], blanks, atol=1e-12)
        assert torch.allclose(found.target[b], emissions, atol=1e-12)
    assert found.log_likelihood[1] == found.log_likelihood[2] == -torch.inf


def check_flow(found, frames, targets):
    """A path emits each target once and leaves each frame once."""
    assert found.log_likelihood.isfinite().all()
    per_frame = found.blank.sum(2)
    per_target = found.target.sum(1)
    for b, (t, u) in enumerate(zip(frames, targets)):
        tolerance = {"atol": 1e-5, "rtol": 0}
        ones = torch.ones_like
        assert torch.allclose(
            per_frame[b, :t], ones(per_frame[b, :t]), **tolerance
        )
        assert torch.allclose(
            per_target[b, :u], ones(per_target[b, :u]), **tolerance
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_very_long(dtype):
    blank, target = scores(2, 2000, 400, dtype)
    # Scores as low as those of one symbol in a million.
    sizes = lengths((2000, 400), (1585, 327))
    found = forward_backward(blank - 14, target - 14, *sizes)
    assert found.blank.dtype == dtype
    assert (found.log_likelihood < -27000).all()
    check_flow(found, *sizes)


def test_more_targets_than_frames():
    blank, target = scores(2, 3, 900)
    sizes = lengths((3, 900), (2, 800))
    check_flow(forward_backward(blank, target, *sizes), *sizes)


def test_float32_is_as_good_as_float64():
    blank, target = scores(2, 300, 60, torch.float32)
    sizes = lengths((300, 60), (211, 40))
    found = forward_backward(blank, target, *sizes)
    exact = forward_backward(blank.double(), target.double(), *sizes)
    for a, b in zip(found, exact):
        assert a.dtype == torch.float32
        assert torch.allclose(a.double(), b, rtol=1e-6, atol=1e-7)


def test_work_grows_with_the_diagonals():
    """Operators, not seconds: T + U steps, however large B is."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            Count.calls += 1
            return func(*args, **(kwargs or {}))

    def calls(batch, frames, targets):
        Count.calls = 0
        blank, target = scores(batch, frames, targets)
        sizes = lengths(*[(frames, targets)] * batch)
        with Count():
            forward_backward(blank, target, *sizes)
        return Count.calls

    assert calls(1, 40, 10) == calls(8, 40, 10)
    more = calls(1, 80, 20) - calls(1, 40, 10)
    assert 0 < calls(1, 160, 40) - calls(1, 80, 20) <= 2 * more
