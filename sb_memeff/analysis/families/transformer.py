"""Transformers, Conformers and their kin: CTC alone, or with a decoder.

Authors
 * The sb_memeff authors 2026
"""

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch

from sb_memeff.analysis.families.transcribed import TranscribedStep

if TYPE_CHECKING:
    from sb_memeff.analysis.recipe import Recipe

__all__ = ["TransformerCTCStep", "TransformerStep"]

_LAYOUT = {"compute_features", "normalize", "CNN", "Transformer", "ctc_lin"}


class TransformerCTCStep(TranscribedStep):
    """Transformer encoder with CTC: LibriSpeech/ASR/CTC.

    Arguments
    ---------
    *args : tuple
        As TrainingStep's.
    **kwargs : dict
        As TrainingStep's.
    """

    layouts = (_LAYOUT,)
    others = frozenset()
    recomputable = ("CNN", "Transformer.encoder.layers.*")
    _losses = "CTC"

    CNN: torch.nn.Module
    Transformer: torch.nn.Module
    ctc_lin: torch.nn.Module
    seq_lin: torch.nn.Module

    @classmethod
    def needs(
        cls, modules: Collection[str], settings: dict[str, Any]
    ) -> tuple[list[str], list[str]]:
        """See TrainingStep."""
        return [], ["compute_features", "normalize", "log_softmax", "ctc_cost"]

    def _compute_forward(
        self,
        wavs: torch.Tensor,
        wav_lens: torch.Tensor,
        tokens_bos: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        wavs, feats, wav_lens, tokens_bos = self._features(
            wavs, wav_lens, tokens_bos
        )
        feats = self._call("normalize", feats, wav_lens, epoch=1)
        src = self.CNN(feats)
        # Without a decoder the second is the attention weights, which stay.
        encoded, decoded = self._transform(src, tokens_bos, wav_lens)
        logits = self.ctc_lin(encoded)
        outputs = {
            "p_ctc": self._call("log_softmax", logits),
            "wav_lens": wav_lens,
        }
        if hasattr(self, "seq_lin"):
            logits = self.seq_lin(decoded)
            outputs["p_seq"] = self._call("log_softmax", logits)
        return outputs

    def _transform(
        self,
        src: torch.Tensor,
        tokens_bos: torch.Tensor,
        wav_lens: torch.Tensor,
    ) -> tuple[torch.Tensor, Any]:
        """Encodes, and decodes if there is a decoder."""
        return self.Transformer(src, tgt=None, wav_len=wav_lens)

    @classmethod
    def label(cls, recipe: "Recipe") -> str:
        """See TrainingStep."""
        given = recipe.modules["Transformer"]
        encoder = isinstance(given, dict) and given.get("encoder_module")
        return f"{encoder or 'transformer'} with {cls._losses}"


class TransformerStep(TransformerCTCStep):
    """Transformer with CTC and attention: */ASR/transformer, CoVoST/AST.

    Arguments
    ---------
    *args : tuple
        As TrainingStep's.
    **kwargs : dict
        As TrainingStep's.
    """

    layouts = (_LAYOUT | {"seq_lin"},)
    numbers = (
        *TranscribedStep.numbers,
        *("ctc_weight", "bos_index", "eos_index"),
    )
    recomputable = (
        *TransformerCTCStep.recomputable,
        "Transformer.decoder.layers.*",
    )
    _losses = "CTC and attention"

    @classmethod
    def needs(
        cls, modules: Collection[str], settings: dict[str, Any]
    ) -> tuple[list[str], list[str]]:
        """See TrainingStep."""
        if "kl_div_weight" in settings:
            raise ValueError(
                "kl_div_weight is of a recipe whose script makes the network "
                "Bayesian, which the analysis does not: pass a step function "
                "of your own to sb_memeff.memory.step.training_step_memory."
            )
        parts, objects = super().needs(modules, settings)
        return parts, [*objects, "seq_cost"]

    def _transform(
        self,
        src: torch.Tensor,
        tokens_bos: torch.Tensor,
        wav_lens: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.Transformer(
            src, tokens_bos, wav_lens, pad_idx=self.settings.get("pad_index", 0)
        )
