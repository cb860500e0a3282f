"""Parameters, gradients and states of any strides.

Authors
 * The sb_memeff authors 2026
"""

import bitsandbytes
import pytest
import torch
from torch import nn

from tests.unittests.optim.optimizers import (
    assert_same_saved,
    each_class,
    moved_by_rounding,
    network,
    train,
)

each_fused = pytest.mark.parametrize("fused", [None, True])


def trained_weight(make):
    """One of a network in channels_last, after some steps."""
    net = network().to(memory_format=torch.channels_last)
    train(net, make(net.parameters()), 5)
    return net[3].weight


@each_class
def test_channels_last_stays(kind):
    weight = trained_weight(kind.make)
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_bitsandbytes_leaves_channels_last():
    weight = trained_weight(bitsandbytes.optim.Adam8bit)
    assert not weight.is_contiguous(memory_format=torch.channels_last)


@each_fused
@each_class
def test_layout_does_not_change_the_update(kind, fused):
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(32, 32, 3, 3)) for _ in range(2)]
    weights[1].data = weights[0].detach().to(memory_format=torch.channels_last)
    optimizers = [kind.make([w], fused=fused) for w in weights]
    for _ in range(3):
        gradient = torch.randn(32, 32, 3, 3)
        for weight, optimizer in zip(weights, optimizers):
            weight.grad = gradient.clone()
            optimizer.step()
    assert torch.equal(*weights)
    # Checkpoints too: one goes on where the other was.
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    assert optimizers[1].state_bytes() == optimizers[0].state_bytes()


LAYOUTS = {
    "contiguous": lambda: torch.randn(80, 64),
    "transposed": lambda: torch.randn(64, 80).t(),
    "permuted": lambda: torch.randn(20, 16, 20).permute(2, 0, 1),
    "channels_last": lambda: torch.randn(32, 16, 3, 3).to(
        memory_format=torch.channels_last
    ),
    "slice": lambda: torch.randn(64, 100)[:, 10:90],
    "slice_of_rows": lambda: torch.randn(100, 64)[10:90],
    "step_2": lambda: torch.randn(64, 160)[:, ::2],
    "small": lambda: torch.randn(8, 16),
    "small_step_2": lambda: torch.randn(8, 16)[:, ::2],
    "vector_step_3": lambda: torch.randn(15000)[::3],
}
GRADIENTS = {
    "contiguous": lambda p: torch.randn(p.shape),
    "of_the_parameter": lambda p: torch.empty_strided(
        p.shape, p.stride()
    ).normal_(),
    "reversed": lambda p: torch.randn(p.shape[::-1]).permute(
        *reversed(range(p.dim()))
    ),
    "step_2": lambda p: torch.randn(*p.shape, 2)[..., 0],
    "expanded": lambda p: torch.randn(p.shape[-1]).expand(p.shape),
    "one_number": lambda p: torch.randn(()).expand(p.shape),
}


@each_fused
@pytest.mark.parametrize("gradient", GRADIENTS.values(), ids=GRADIENTS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@each_class
def test_any_strides(kind, layout, gradient, fused):
    """The first step is torch's, the next ones those of contiguous tensors.

    Nothing outside of a slice changes.
    """
    torch.manual_seed(0)
    odd = nn.Parameter(layout())
    plain, exact = (
        nn.Parameter(odd.detach().clone(memory_format=torch.contiguous_format))
        for _ in range(2)
    )
    exact.data = exact.data.double()
    memory = odd.detach().as_strided(
        (odd.untyped_storage().nbytes() // 4,), (1,), 0
    )
    outside = torch.ones(len(memory), dtype=torch.bool)
    outside.as_strided(odd.shape, odd.stride(), odd.storage_offset()).fill_(0)
    before = memory[outside].clone()
    strides = odd.stride()
    ours = [kind.make([p], fused=fused) for p in (odd, plain)]
    theirs = kind.make_torchs([exact])
    for step in range(3):
        odd.grad = gradient(odd)
        plain.grad = odd.grad.clone(memory_format=torch.contiguous_format)
        for optimizer in ours:
            optimizer.step()
        assert torch.equal(odd, plain)
        if step == 0:
            exact.grad = plain.grad.double()
            theirs.step()
            expected = moved_by_rounding(ours[1], plain, theirs, exact)
            torch.testing.assert_close(
                odd.double(), expected, rtol=1e-5, atol=1e-6
            )
    assert torch.equal(memory[outside], before)
    assert odd.stride() == strides
    # A checkpoint goes from one layout to the other.
    saved = [o.state_dict()["state"] for o in ours]
    assert_same_saved(*saved)
    ours[0].load_state_dict(ours[1].state_dict())
    odd.grad, plain.grad = gradient(odd), None
    plain.grad = odd.grad.contiguous()
    for optimizer in ours:
        optimizer.step()
    assert torch.equal(odd, plain)


@pytest.mark.parametrize("channels", [4, 64])
@each_fused
@each_class
def test_layout_that_changes_between_two_steps(kind, fused, channels):
    """module.to(memory_format=...) replaces the memory of a parameter."""
    torch.manual_seed(0)
    odd = nn.Parameter(torch.randn(channels, 8, 3, 3))
    plain = nn.Parameter(odd.detach().clone())
    ours = [kind.make([p], fused=fused) for p in (odd, plain)]
    for layout in (torch.contiguous_format, torch.channels_last) * 2:
        odd.data = odd.data.to(memory_format=layout)
        odd.grad = torch.randn_like(odd)
        plain.grad = odd.grad.contiguous()
        for optimizer in ours:
            optimizer.step()
        assert torch.equal(odd, plain)
