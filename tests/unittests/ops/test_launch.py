"""Launches of kernels, and what is counted of them without a GPU."""

import pytest
import torch

from sb_memeff.memory.fake import fake_tensors
from sb_memeff.ops import logit_rows
from sb_memeff.ops.dispatch import fused_on_fake_tensors, runs_fused
from sb_memeff.ops.triton.launch import watch_launches
from sb_memeff.optim import AdamW8bit, SGD8bit
from tests.unittests.ops.kernel import DEVICE


def test_a_watcher_sees_each_launch_until_it_leaves():
    from sb_memeff.ops.triton.summary import summarize

    found = []
    x = torch.zeros(7, device=DEVICE)
    row = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    with watch_launches(
        lambda name, arguments: found.append((name, arguments))
    ):
        summarize(x, row)
    summarize(x, row)
    [(name, arguments)] = found
    assert name == "_summarize"
    assert arguments["x_ptr"] is x and arguments["size"] == 7


def test_fake_tensors_take_the_path_of_the_kernels():
    """Outputs are allocated as on a GPU; no kernel runs."""
    found = []
    with fake_tensors(), watch_launches(lambda name, _: found.append(name)):
        logits = torch.zeros(5, 9)
        target = torch.zeros(5, dtype=torch.int64)
        assert not runs_fused(logits)
        with fused_on_fake_tensors():
            assert runs_fused(logits)
            scores = logit_rows.row_scores(logits, target, 0)
        assert not runs_fused(logits)
        assert scores.shape == (3, 5)
    assert found == ["_scores"]


@pytest.mark.parametrize(
    "cls, options", [(SGD8bit, {"momentum": 0.9}), (AdamW8bit, {})]
)
def test_steps_of_fake_parameters_are_launched_together(cls, options):
    found = []
    with fake_tensors(), fused_on_fake_tensors():
        params = [torch.nn.Parameter(torch.zeros(64, 100)) for _ in range(3)]
        optimizer = cls(params, lr=0.1, **options)
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()
        with watch_launches(lambda name, _: found.append(name)):
            optimizer.step()
    assert len(found) == 1
