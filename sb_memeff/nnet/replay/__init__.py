"""Run a function again in backward, exactly as in forward, leaving no trace.

============= ==============================================================
module        contents
============= ==============================================================
recorder      what a call finds (autocast, modes, random states, buffers)
              and how a replay finds it again
random_states the generators of torch, Python, numpy and of modules
module_state  buffers, attributes and parametrizations of modules
backends      torch's switches, such as cudnn.benchmark
mismatch      replays that differ from forward end in an error
============= ==============================================================

Authors
 * The sb_memeff authors 2026
"""

from sb_memeff.nnet.replay.mismatch import set_mismatch_action

__all__ = ["set_mismatch_action"]
