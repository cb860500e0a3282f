"""Recomputes named blocks of any network instead of storing their activations.

Architecture and pretrained weights stay the same. In a yaml file, add after the
network

    __recompute: !apply:sb_memeff.nnet.recompute.recompute_blocks
        module: !ref <embedding_model>
        blocks: [blocks.*, mfa, asp]

The blocks then store only their arguments, and backward runs each block again.
Values, gradients, running statistics, random numbers, state, names and
state_dict are those of the original network.

============ ==============================================================
module       contents
============ ==============================================================
blocks       ``recompute_blocks``, ``store_blocks``: change named blocks
fit          ``fit_recompute``: the cheapest that a memory budget allows
independence checks that samples do not depend on each other
outputs      outputs that blocks do not keep
pieces       calls of a block piece by piece over the batch
selection    matches patterns of names
segment      the memory: functions that backward runs again
============ ==============================================================

Authors
 * The sb_memeff authors 2026
"""

from sb_memeff.nnet.recompute.blocks import recompute_blocks, store_blocks
from sb_memeff.nnet.recompute.fit import fit_recompute

__all__ = ["fit_recompute", "recompute_blocks", "store_blocks"]
