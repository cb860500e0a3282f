"""The transducer loss without storing the logits of a batch.

=========== =================================================================
module      contents
=========== =================================================================
joint_loss  ``TransducerJointLoss``: joint, classifier and loss in one module
passes      forward and backward of a group of samples, one class a method
cells       tiles of cells: logits, scores and gradients
sum_joint   the same for SpeechBrain's usual joint, with kernels
half_linear weight gradients of half-precision layers in float32
lattice     losses and occupancies from the scores of all cells
rows        scores and gradients of rows of logits
logits_loss ``transducer_loss``: the loss of given logits
batch       lengths, targets and reduction
modules     checks of joint and classifier
=========== =================================================================

Authors
 * The sb_memeff authors 2026
"""

from sb_memeff.nnet.transducer_loss.joint_loss import TransducerJointLoss
from sb_memeff.nnet.transducer_loss.logits_loss import transducer_loss

__all__ = ["TransducerJointLoss", "transducer_loss"]
