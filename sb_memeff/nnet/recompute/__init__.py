"""Recompute named blocks of any network instead of storing their activations.

For those who must keep their architecture and their pretrained weights: one
line in a yaml file, after the network,

    __recompute: !apply:sb_memeff.nnet.recompute.recompute_blocks
        module: !ref <embedding_model>
        blocks: [blocks.*, mfa, asp]

and the blocks keep only what they are called with until backward runs each of
them once more. Values, gradients, running statistics, random numbers, state,
names and state_dict stay those of the untouched network.

========= ==================================================================
module    contents
========= ==================================================================
blocks    ``recompute_blocks``, ``store_blocks``: change named blocks
fit       ``fit_recompute``: as few blocks as a memory budget allows
selection from patterns to modules
segment   the memory: functions that backward runs once more
========= ==================================================================

Authors
 * The sb_memeff authors 2026
"""

from sb_memeff.nnet.recompute.blocks import recompute_blocks, store_blocks
from sb_memeff.nnet.recompute.fit import fit_recompute

__all__ = ["fit_recompute", "recompute_blocks", "store_blocks"]
