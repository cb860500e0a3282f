"""Attention of fake tensors takes the memory of a GPU's kernel.

Authors
 * The sb_memeff authors 2026
"""

import pytest
import torch
import torch.nn.functional as F
from speechbrain.nnet.attention import RoPEMHA

from sb_memeff.memory.fake import fake_tensors
from sb_memeff.memory.leftovers import no_leftovers
from sb_memeff.memory.step import training_step_memory

FRAMES = 200
WEIGHTS = 4 * 8 * FRAMES * FRAMES  # of four utterances with eight heads


def memory(masked, fake=True):
    def step(net):
        x = torch.zeros(4, FRAMES, 64)
        mask = torch.zeros(4, FRAMES, dtype=torch.bool) if masked else None
        return net(x, x, x, key_padding_mask=mask)[0]

    return training_step_memory(
        lambda: RoPEMHA(64, 8, dropout=0.1), step, fake=fake
    )


@no_leftovers()  # once for all analyses
def test_rotary_attention_stores_no_weights():
    # A kernel on the CPU cannot drop out: torch stores weights and dropout.
    assert memory(masked=False, fake=False).saved_bytes > 8 * WEIGHTS
    bare = memory(masked=False)
    assert bare.peak_bytes < 3 * WEIGHTS
    # The mask becomes numbers of 32 bits, which backward needs; beside it there
    # is the boolean mask of one byte a weight.
    found = memory(masked=True)
    assert found.saved_bytes - bare.saved_bytes == 4 * WEIGHTS
    assert 5 * WEIGHTS < found.peak_bytes < 7 * WEIGHTS


@pytest.mark.parametrize("frames, copies", [(64, 1), (65, 2)])
def test_the_kernel_needs_aligned_masks(frames, copies):
    with fake_tensors():
        x = torch.empty(2, 4, frames, 64, requires_grad=True)
        mask = torch.empty(2, 4, frames, frames, requires_grad=True)
        y = F.scaled_dot_product_attention(x, x, x, mask)
        saved = y.grad_fn._saved_attn_bias
        assert y.shape == x.shape and saved.shape == mask.shape
        assert all(stride % 8 == 0 for stride in saved.stride()[:-1])
        storages = {x.untyped_storage()._cdata for x in (saved, mask)}
        assert len(storages) == copies


@pytest.mark.parametrize("autocast", [False, True])
def test_shapes_and_dtypes(autocast):
    half = torch.autocast("cpu", torch.bfloat16, enabled=autocast)
    with fake_tensors(), half:
        # Small tensors have values, which the kernel cannot compute.
        x = torch.rand(2, 4, 5, 8)
        for arguments in (
            (x, x, x),
            (x, x, x, torch.ones(5, 5, dtype=torch.bool)),
            (x[0], x[0], x[0]),
        ):
            y = F.scaled_dot_product_attention(*arguments, scale=0.5)
            assert y.shape == arguments[0].shape
            assert y.dtype == (torch.bfloat16 if autocast else torch.float32)
