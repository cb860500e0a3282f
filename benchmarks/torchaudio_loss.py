"""The usual alternative: torchaudio's loss on batched logits.

Authors
 * The sb_memeff authors 2026
"""

import torch
import torchaudio
from torch import nn


class TorchaudioJointLoss(nn.Module):
    """Has TransducerJointLoss's signature, but stores all logits.

    Arguments
    ---------
    joint : torch.nn.Module
        Takes [B, T, 1, H] and [B, 1, U+1, H].
    classifier : torch.nn.Module
        Maps joined features to logits.
    blank_index : int
        The blank.
    reduction : str
        "nll_sum", or "mean" for SpeechBrain's value and gradient.
    """

    def __init__(self, joint, classifier, blank_index=0, reduction="mean"):
        super().__init__()
        self.joint = joint
        self.classifier = classifier
        self.blank_index = blank_index
        self.reduction = reduction

    def forward(self, enc, pred, targets, enc_lens, target_lens):
        """Computes the loss; see TransducerJointLoss."""
        logits = self.classifier(
            self.joint(enc.unsqueeze(2), pred.unsqueeze(1))
        )
        if logits.dtype == torch.bfloat16:
            # torchaudio supports float32 and float16.
            logits = logits.float()
        frames = (enc_lens * enc.shape[1]).round().int()
        counts = (target_lens * targets.shape[1]).round().int()
        nll = torchaudio.functional.rnnt_loss(
            logits,
            targets.int(),
            frames,
            counts,
            blank=self.blank_index,
            reduction="none",
        )
        if self.reduction == "nll_sum":
            return nll.sum()
        # SpeechBrain reports the mean over frames, but its gradient is that
        # of the plain sum.
        value = (nll.detach() / frames).mean()
        return nll.sum() - nll.detach().sum() + value
