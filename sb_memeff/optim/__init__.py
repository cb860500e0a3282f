"""SGD, Adam and AdamW that keep their states in 8 bits.

Between two steps the states are 8-bit tensors (``ops.blocks_8bit``). A step
restores those of a few parameters at a time in float32, lets torch's own
functions do the update, and packs them again: whatever torch's class of the
same name does with its arguments, these do too.

Source: Dettmers et al., 8-bit Optimizers via Block-wise Quantization
(arXiv 2110.02861); for speaker networks Liu and Qian (arXiv 2412.01195).

In a SpeechBrain yaml::

    opt_class: !name:sb_memeff.optim.Adam8bit
        lr: 0.001
        weight_decay: 0.000002

============== ===============================================================
module         contents
============== ===============================================================
sgd, adam      the classes: their settings, and the function that updates
optimizer_8bit a step: unpack, update, pack; or one kernel for all
checkpoint     the format of torch's classes, and that of bitsandbytes
states_8bit    which states are in 8 bits, how they are packed, their size
layout         dtypes and strides of states
============== ===============================================================

Authors
 * The sb_memeff authors 2026
"""

from sb_memeff.optim.adam import Adam8bit, AdamW8bit
from sb_memeff.optim.sgd import SGD8bit
from sb_memeff.optim.states_8bit import keep_32bit_states, state_bytes

__all__ = [
    "Adam8bit",
    "AdamW8bit",
    "SGD8bit",
    "keep_32bit_states",
    "state_bytes",
]
