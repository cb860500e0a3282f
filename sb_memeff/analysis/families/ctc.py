"""CTC with one network: phonemes.

Authors
 * The sb_memeff authors 2026
"""

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch

from sb_memeff.analysis.families.transcribed import TranscribedStep

if TYPE_CHECKING:
    from sb_memeff.analysis.recipe import Recipe

__all__ = ["CTCStep"]


class CTCStep(TranscribedStep):
    """CTC: TIMIT/ASR/CTC and Voicebank/ASR/CTC.

    Arguments
    ---------
    *args : tuple
        As TrainingStep's.
    **kwargs : dict
        As TrainingStep's.
    """

    layouts = ({"compute_features", "normalize", "model", "output"},)
    others = frozenset()
    # TIMIT's longest have 7.8 seconds.
    seconds = 8
    _ctc_cost = "compute_cost"

    normalize: torch.nn.Module
    model: torch.nn.Module
    output: torch.nn.Module

    @classmethod
    def needs(
        cls, modules: Collection[str], settings: dict[str, Any]
    ) -> tuple[list[str], list[str]]:
        """See TrainingStep."""
        return [], [
            "compute_features",
            "normalize",
            "log_softmax",
            cls._ctc_cost,
        ]

    def _compute_forward(
        self,
        wavs: torch.Tensor,
        wav_lens: torch.Tensor,
        tokens_bos: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        wavs, feats, wav_lens = self._features(wavs, wav_lens)
        feats = self.normalize(feats, wav_lens)
        out = self.model(feats)
        out = self.output(out)
        return {"p_ctc": self._call("log_softmax", out), "wav_lens": wav_lens}

    @classmethod
    def label(cls, recipe: "Recipe") -> str:
        """See TrainingStep."""
        return f"{recipe.network('model')} with CTC"
