"""The size of the states.

Authors
 * The sb_memeff authors 2026
"""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sb_memeff.lobes.models.RevResNet import RevResNet
from sb_memeff.optim import state_bytes
from tests.unittests.optim.optimizers import CLASSES


def test_states_are_a_quarter_in_the_widths_of_revnet101():
    with FakeTensorMode():
        net = RevResNet.from_preset("RevNet101", block_sizes=[1, 1, 1, 1])
        params = list({p.shape: p for p in net.parameters()}.values())
        for p in params:
            p.grad = torch.zeros_like(p)
        for kind in CLASSES.values():
            ours, theirs = (
                make(params) for make in (kind.make, kind.make_torchs)
            )
            ours.step()
            theirs.step()
            assert 0.25 < state_bytes(ours) / state_bytes(theirs) < 0.27
