"""Neural transducers: the training step and its alternative losses.

Authors
 * The sb_memeff authors 2026
"""

from collections.abc import Collection
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch

from sb_memeff.analysis.families.step import Variant, recomputed_variant
from sb_memeff.analysis.families.transcribed import TranscribedStep
from sb_memeff.nnet.recompute.fit import Recomputation
from sb_memeff.nnet.transducer_loss.joint_loss import TransducerJointLoss

if TYPE_CHECKING:
    from sb_memeff.analysis.recipe import Recipe

__all__ = ["TransducerStep"]

METHODS: tuple[Literal["batched", "samplewise", "tiled"], ...] = (
    "batched",
    "samplewise",
    "tiled",
)
ENCODER_LAYERS = "enc.transformer.encoder.layers.*"


class TransducerStep(TranscribedStep):
    """Neural transducer: */ASR/transducer, SpeechBrain's and ours.

    The whole utterance is one chunk, the largest that dynamic chunk training
    draws.

    Arguments
    ---------
    *args : tuple
        As TrainingStep's.
    **kwargs : dict
        As TrainingStep's.
    """

    _encoders = {
        *("normalize", "CNN", "enc", "emb", "dec"),
        *("proj_enc", "proj_dec"),
    }
    layouts = (
        _encoders | {"transducer_loss"},
        _encoders | {"Tjoint", "transducer_lin"},
    )
    numbers = (
        *TranscribedStep.numbers,
        *("dec_emb_dropout", "dec_dropout"),
        *("blank_index", "bos_index", "eos_index", "pad_index"),
        *("ctc_weight", "number_of_ctc_epochs", "ce_weight"),
    )
    recomputable = ("CNN", ENCODER_LAYERS)
    # Keys of the last layer and of the loss of its logits.
    _classifier = "transducer_lin"
    _cost = "transducer_cost"

    # Modules of either layout.
    normalize: torch.nn.Module
    CNN: torch.nn.Module
    enc: torch.nn.Module
    emb: torch.nn.Module
    dec: torch.nn.Module
    proj_enc: torch.nn.Module
    proj_dec: torch.nn.Module
    proj_ctc: torch.nn.Module
    dec_lin: torch.nn.Module
    Tjoint: torch.nn.Module
    transducer_lin: torch.nn.Module
    transducer_loss: torch.nn.Module

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.has_joint_loss = hasattr(self, "transducer_loss")

    @classmethod
    def needs(
        cls, modules: Collection[str], settings: dict[str, Any]
    ) -> tuple[list[str], list[str]]:
        """See TrainingStep."""
        parts, objects = [], ["compute_features", "normalize"]
        if "transducer_loss" not in modules:
            objects.append(cls._cost)
        if _uses_ctc(settings):
            parts.append("proj_ctc")
            objects += ["ctc_cost", "log_softmax"]
        if settings["ce_weight"] > 0:
            parts.append("dec_lin")
            objects += ["ce_cost", "log_softmax"]
        return parts, objects

    def _compute_forward(
        self,
        wavs: torch.Tensor,
        wav_lens: torch.Tensor,
        tokens_bos: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        wavs, feats, wav_lens, tokens_bos = self._features(
            wavs, wav_lens, tokens_bos
        )
        feats = self.normalize(feats, wav_lens, epoch=1)
        encoded = self.enc(
            self.CNN(feats),
            wav_lens,
            pad_idx=self.settings["pad_index"],
            dynchunktrain_config=None,
        )
        encoded = self.proj_enc(encoded)

        embedded = torch.nn.functional.dropout(
            self.emb(tokens_bos), self.settings["dec_emb_dropout"]
        )
        predicted, _ = self.dec(embedded)
        predicted = torch.nn.functional.dropout(
            predicted, self.settings["dec_dropout"]
        )
        predicted = self.proj_dec(predicted)

        outputs = {"wav_lens": wav_lens, **self._joined(encoded, predicted)}
        if _uses_ctc(self.settings):
            p_ctc = self._call("log_softmax", self.proj_ctc(encoded))
            outputs["p_ctc"] = p_ctc
        if self.settings["ce_weight"] > 0:
            p_ce = self._call("log_softmax", self.dec_lin(predicted))
            outputs["p_ce"] = p_ce
        return outputs

    def _compute_objectives(
        self,
        tokens: torch.Tensor,
        token_lens: torch.Tensor,
        tokens_eos: torch.Tensor,
        token_eos_lens: torch.Tensor,
    ) -> torch.Tensor:
        outputs = self.outputs
        loss = self._transducer_loss(tokens, token_lens)
        ctc_weight = self.settings["ctc_weight"]
        ce_weight = self.settings["ce_weight"]
        loss = (1 - (ctc_weight + ce_weight)) * loss
        if "p_ctc" in outputs:
            loss = loss + ctc_weight * self._ctc_loss(tokens, token_lens)
        if "p_ce" in outputs:
            loss = loss + ce_weight * self._call(
                "ce_cost", outputs["p_ce"], tokens_eos, length=token_eos_lens
            )
        return loss

    def _joined(
        self, encoded: torch.Tensor, predicted: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The outputs that the transducer loss needs."""
        if self.has_joint_loss:
            return {"encoded": encoded, "predicted": predicted}
        joint = self.Tjoint(encoded.unsqueeze(2), predicted.unsqueeze(1))
        return {"logits": self._call(self._classifier, joint)}

    def _transducer_loss(
        self, tokens: torch.Tensor, token_lens: torch.Tensor
    ) -> torch.Tensor:
        outputs = self.outputs
        lengths = outputs["wav_lens"], token_lens
        if not self.has_joint_loss:
            return self.logits_loss(outputs["logits"], tokens, *lengths)
        return self.transducer_loss(
            outputs["encoded"], outputs["predicted"], tokens, *lengths
        )

    def logits_loss(
        self,
        logits: torch.Tensor,
        tokens: torch.Tensor,
        wav_lens: torch.Tensor,
        token_lens: torch.Tensor,
    ) -> torch.Tensor:
        """Computes SpeechBrain's transducer loss from all logits.

        SpeechBrain's function needs a GPU and numba. Replace this method where
        it cannot run.

        Arguments
        ---------
        logits : torch.Tensor
            [B, T, U + 1, V].
        tokens : torch.Tensor
            [B, U].
        wav_lens : torch.Tensor
            [B], relative to T.
        token_lens : torch.Tensor
            [B], relative to U.

        Returns
        -------
        torch.Tensor
            A scalar.
        """
        return self._call(self._cost, logits, tokens, wav_lens, token_lens)

    def imitate_gpu(self) -> None:
        """Replaces SpeechBrain's loss by a function with the same memory."""
        self.logits_loss = _speechbrain_loss

    @classmethod
    def label(cls, recipe: "Recipe") -> str:
        """See TrainingStep."""
        if "transducer_loss" not in recipe.modules:
            return "SpeechBrain's loss"
        return recipe.modules["transducer_loss"].get("method", "tiled")

    @classmethod
    def variants(cls, recipe: "Recipe") -> list[Variant]:
        """The methods of the loss, the last with recomputed blocks too."""
        rows = [Variant(m, partial(_with_method, method=m)) for m in METHODS]
        if "transducer_loss" not in recipe.modules:
            rows.insert(0, Variant(cls.label(recipe)))
        if not cls.recomputable:
            return rows
        recomputed = {
            "encoder recomputed": ([ENCODER_LAYERS], Recomputation()),
            "CNN and encoder recomputed": (
                cls.recomputable,
                Recomputation(first_output_only=True),
            ),
            "CNN and encoder in 8 pieces": (
                cls.recomputable,
                Recomputation(first_output_only=True, split=8),
            ),
        }
        tiled = rows[-1]
        return rows + [
            recomputed_variant(tiled, blocks, how, label)
            for label, (blocks, how) in recomputed.items()
        ]


def _with_method(
    step: Any, method: Literal["batched", "samplewise", "tiled"]
) -> None:
    if step.has_joint_loss:
        step.transducer_loss.method = method
        return
    step.transducer_loss = TransducerJointLoss(
        step.Tjoint,
        step.get_submodule(step._classifier),
        step.settings["blank_index"],
        method=method,
    )
    step.has_joint_loss = True


class _NumbaLoss(torch.autograd.Function):
    """Allocates as SpeechBrain 1.1's kernels do: gradients of all logits."""

    @staticmethod
    def forward(ctx: Any, log_probs: torch.Tensor) -> torch.Tensor:
        """Frees alphas and betas at once; keeps the gradients until backward."""
        ctx.gradient = torch.zeros_like(log_probs)
        alpha, beta = (torch.zeros_like(log_probs[..., 0]) for _ in range(2))
        del alpha, beta
        return log_probs.new_zeros(len(log_probs)).mean()

    @staticmethod
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, upstream: torch.Tensor) -> torch.Tensor:
        """Scales the gradients in place."""
        return ctx.gradient.mul_(upstream.view(-1, 1, 1, 1))


def _speechbrain_loss(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    wav_lens: torch.Tensor,
    token_lens: torch.Tensor,
) -> torch.Tensor:
    # SpeechBrain's loss runs on a GPU only. This allocates the same memory.
    return _NumbaLoss.apply(logits.log_softmax(-1))


def _uses_ctc(settings: dict[str, Any]) -> bool:
    return settings["ctc_weight"] > 0 and settings["number_of_ctc_epochs"] >= 1
