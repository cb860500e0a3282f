"""SGD, Adam and AdamW with states in 8 bits.

Between steps the states are 8-bit tensors (``ops.blocks_8bit``). A step
dequantizes the states of a few parameters at a time to float32, calls torch's
own update function, and quantizes them again. Arguments therefore have the same
effect as in torch's class of the same name. Compiled kernels do the same in one
pass: Triton's on a GPU, numba's on a CPU.

Source: Dettmers et al., 8-bit Optimizers via Block-wise Quantization
(arXiv 2110.02861); for speaker networks Liu and Qian (arXiv 2412.01195).

In a SpeechBrain yaml::

    opt_class: !name:sb_memeff.optim.Adam8bit
        lr: 0.001
        weight_decay: 0.000002

============== ===============================================================
module         contents
============== ===============================================================
sgd, adam      the classes: their settings and update functions
optimizer_8bit the step: unpack, update and pack, or one kernel for all
one_launch     parameters that a kernel updates in one launch
checkpoint     checkpoints in torch's and in bitsandbytes' format
states_8bit    which states are in 8 bits; packing; their size
misfit         refuses checkpoints of other parameters
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
