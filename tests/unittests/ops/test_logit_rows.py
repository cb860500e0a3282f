"""Rows of logits: which differences of a replay rounding explains.

Authors
 * The sb_memeff authors 2026
"""

import pytest
import torch

from sb_memeff.ops.logit_rows import row_gradient, row_scores


def deviation(logits, again):
    """Of the gradient of ``again``, with normalisers of ``logits``."""
    target = torch.zeros(len(logits), dtype=torch.long)
    lse, *_ = row_scores(logits, target, 0)
    half, found = torch.full((len(logits),), 0.5), torch.zeros(1)
    row_gradient(again, lse, target, half, half, 0, found)
    return found.item()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_last_bit_of_half_precision_is_no_mismatch(dtype):
    """Products of matrices of another shape may round it otherwise."""
    torch.manual_seed(0)
    logits = (4 * torch.randn(20, 50)).to(dtype)
    step = torch.finfo(dtype).eps
    again = (logits.float() * (1 + step)).to(dtype)
    assert not torch.equal(again, logits)
    assert 0 < deviation(logits, again) < 1
    assert deviation(logits, logits + 1) > 1
