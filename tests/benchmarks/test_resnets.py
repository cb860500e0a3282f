"""The networks that benchmarks and demo compare.

Authors
 * The sb_memeff authors 2026
"""

import pytest
import torch
from resnets import networks


@pytest.mark.parametrize("name", ["ResNet34", "DFResNet56"])
def test_four_networks_and_the_checkpointed_computes_what_the_stored_does(name):
    built = networks(name, base_channels=2)
    assert list(built) == ["stored", "checkpoint", "type_1", "type_2"]
    x = torch.randn(2, 24, 80)
    values, gradients = [], []
    for build in list(built.values())[:2]:
        torch.manual_seed(0)
        net = build()
        values.append(net(x))
        values[-1].square().sum().backward()
        gradients.append([p.grad for p in net.parameters()])
    torch.testing.assert_close(*values, rtol=0, atol=0)
    torch.testing.assert_close(*gradients, rtol=0, atol=0)
    for build in list(built.values())[2:]:
        assert sum(p.numel() for p in build().parameters()) > 0
