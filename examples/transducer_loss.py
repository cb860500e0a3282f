"""Computes a transducer loss without storing its logits.

    python examples/transducer_loss.py

Authors
 * The sb_memeff authors 2026
"""

import torch
from speechbrain.nnet.transducer.transducer_joint import Transducer_joint
from torch import nn

from sb_memeff.memory.tracker import StorageTracker
from sb_memeff.nnet.transducer_loss.joint_loss import TransducerJointLoss

BATCH, FRAMES, LABELS, HIDDEN, VOCABULARY = 8, 150, 30, 128, 500


def main():
    """Compares value, gradient and memory of the three methods."""
    torch.manual_seed(0)
    joint, classifier = Transducer_joint(), nn.Linear(HIDDEN, VOCABULARY)
    # Outputs of encoder and prediction network.
    enc = torch.randn(BATCH, FRAMES, HIDDEN, requires_grad=True)
    pred = torch.randn(BATCH, LABELS + 1, HIDDEN, requires_grad=True)
    targets = torch.randint(1, VOCABULARY, (BATCH, LABELS))
    enc_lens = torch.linspace(0.5, 1, BATCH)  # relative, as in SpeechBrain
    target_lens = torch.ones(BATCH)
    gradients = {}
    for method in ("batched", "samplewise", "tiled"):
        loss = TransducerJointLoss(joint, classifier, method=method)
        enc.grad = None
        with StorageTracker() as tracker:
            value = loss(enc, pred, targets, enc_lens, target_lens)
            value.backward()
        gradients[method] = enc.grad
        print(
            f"{method:10s} loss {value.item():.6f}, "
            f"peak {tracker.peak / 1e6:4.0f} MB"
        )
    return gradients


if __name__ == "__main__":
    main()
