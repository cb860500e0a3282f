"""Repeats a forward in backward, exactly and without side effects.

============= ==============================================================
module        contents
============= ==============================================================
recorder      records the state of a call (autocast, modes, random states,
              buffers) and restores it for a replay
random_states generators of torch, Python, numpy and modules
module_state  buffers, attributes and parametrizations of modules
backends      flags of torch's backends, such as cudnn.benchmark
mismatch      raises an error if a replay differs from forward
============= ==============================================================

Authors
 * The sb_memeff authors 2026
"""

from sb_memeff.nnet.replay.mismatch import set_mismatch_action

__all__ = ["set_mismatch_action"]
