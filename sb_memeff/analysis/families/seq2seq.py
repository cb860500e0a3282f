"""Encoder and recurrent decoder with attention, trained with CTC as well.

Authors
 * The sb_memeff authors 2026
"""

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch

from sb_memeff.analysis.families.transcribed import TranscribedStep

if TYPE_CHECKING:
    from sb_memeff.analysis.recipe import Recipe

__all__ = ["Seq2SeqStep"]


class Seq2SeqStep(TranscribedStep):
    """Sequence to sequence: */ASR/seq2seq.

    Arguments
    ---------
    *args : tuple
        As TrainingStep's.
    **kwargs : dict
        As TrainingStep's.
    """

    layouts = (
        {
            *("compute_features", "normalize"),
            *("enc", "ctc_lin", "emb", "dec", "seq_lin"),
        },
    )
    # The language model only searches.
    others = frozenset({"lm_model"})
    numbers = (
        *TranscribedStep.numbers,
        *("ctc_weight", "bos_index", "eos_index"),
    )

    normalize: torch.nn.Module
    enc: torch.nn.Module
    ctc_lin: torch.nn.Module
    emb: torch.nn.Module
    dec: torch.nn.Module
    seq_lin: torch.nn.Module

    @classmethod
    def needs(
        cls, modules: Collection[str], settings: dict[str, Any]
    ) -> tuple[list[str], list[str]]:
        """See TrainingStep."""
        objects = ["compute_features", "normalize", "log_softmax", "seq_cost"]
        return [], objects + ["ctc_cost"] * _uses_ctc(settings)

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
        x = self.enc(feats.detach())
        e_in = self.emb(tokens_bos)
        h, _ = self.dec(e_in, x, wav_lens)
        logits = self.seq_lin(h)
        outputs = {
            "p_seq": self._call("log_softmax", logits),
            "wav_lens": wav_lens,
        }
        if _uses_ctc(self.settings):
            logits = self.ctc_lin(x)
            outputs["p_ctc"] = self._call("log_softmax", logits)
        return outputs

    @classmethod
    def label(cls, recipe: "Recipe") -> str:
        """See TrainingStep."""
        return f"{recipe.network('enc')} with {recipe.network('dec')}"


def _uses_ctc(settings: dict[str, Any]) -> bool:
    return settings.get("number_of_ctc_epochs", 1) >= 1
