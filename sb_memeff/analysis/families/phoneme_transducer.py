"""Neural transducers of phonemes.

Authors
 * The sb_memeff authors 2026
"""

from collections.abc import Collection
from typing import Any

import torch

from sb_memeff.analysis.families.transcribed import TranscribedStep
from sb_memeff.analysis.families.transducer import TransducerStep

__all__ = ["PhonemeTransducerStep"]

_ENCODERS = {
    *("compute_features", "normalize"),
    *("enc", "enc_lin", "emb", "dec", "dec_lin"),
}


class PhonemeTransducerStep(TransducerStep):
    """Neural transducer of phonemes: TIMIT/ASR/transducer.

    Arguments
    ---------
    *args : tuple
        As TrainingStep's.
    **kwargs : dict
        As TrainingStep's.
    """

    layouts = (
        _ENCODERS | {"transducer_loss"},
        _ENCODERS | {"Tjoint", "output"},
    )
    others = frozenset()
    # TIMIT's longest have 7.8 seconds.
    seconds = 8
    numbers = (*TranscribedStep.numbers, "blank_index")
    recomputable = ()
    _classifier = "output"
    _cost = "compute_cost"

    enc_lin: torch.nn.Module

    @classmethod
    def needs(
        cls, modules: Collection[str], settings: dict[str, Any]
    ) -> tuple[list[str], list[str]]:
        """See TrainingStep."""
        objects = ["compute_features", "normalize"]
        if "transducer_loss" not in modules:
            objects.append(cls._cost)
        return [], objects

    def _compute_forward(
        self,
        wavs: torch.Tensor,
        wav_lens: torch.Tensor,
        tokens_bos: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        wavs, feats, wav_lens, tokens_bos = self._features(
            wavs, wav_lens, tokens_bos
        )
        feats = self.normalize(feats, wav_lens)
        x = self.enc(feats)
        x = self.enc_lin(x)
        e_in = self.emb(tokens_bos)
        h, _ = self.dec(e_in)
        h = self.dec_lin(h)
        return {"wav_lens": wav_lens, **self._joined(x, h)}

    def _compute_objectives(
        self,
        tokens: torch.Tensor,
        token_lens: torch.Tensor,
        tokens_eos: torch.Tensor,
        token_eos_lens: torch.Tensor,
    ) -> torch.Tensor:
        loss = self._transducer_loss(tokens, token_lens)
        if not self.has_joint_loss:
            # The script computes it again for its statistics.
            self._transducer_loss(tokens, token_lens)
        return loss
