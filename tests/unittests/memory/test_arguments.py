"""Tensors among arguments."""

import torch
from torch.utils._pytree import tree_leaves

from sb_memeff.memory.arguments import tensors_in


def test_the_tensors_are_those_of_torchs_trees():
    a, b, c = (torch.zeros(i) for i in range(3))
    values = (a, [None, (b, 2)], torch.max(c, 0), {"out": [a], "dim": (1, 2)})
    expected = [x for x in tree_leaves(values) if isinstance(x, torch.Tensor)]
    assert [id(x) for x in tensors_in(values)] == [id(x) for x in expected]
    assert len(expected) == 5
    assert tensors_in(None) == []
