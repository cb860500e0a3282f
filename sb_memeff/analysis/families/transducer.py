"""Neural transducers: the training step and its alternative losses.

Authors
 * The sb_memeff authors 2026
"""

from collections.abc import Callable, Collection
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch

from sb_memeff.analysis.families.step import (
    TrainingStep,
    Variant,
    recomputed_variant,
)
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


class TransducerStep(TrainingStep):
    """Neural transducer: LibriSpeech/ASR/transducer, SpeechBrain's and ours.

    It is a step of the first epoch: the normalizer updates its statistics, and
    CTC is enabled if the recipe has it. The whole utterance is one chunk, the
    largest that dynamic chunk training draws.

    Arguments
    ---------
    *args : tuple
        As TrainingStep's.
    **kwargs : dict
        As TrainingStep's.
    """

    _encoders = {"CNN", "enc", "emb", "dec", "proj_enc", "proj_dec"}
    layouts = (
        _encoders | {"normalize", "transducer_loss"},
        _encoders | {"normalize", "Tjoint", "transducer_lin"},
    )
    augmentations = ("wav_augment", "fea_augment")
    numbers = (
        *("sample_rate", "output_neurons", "dec_emb_dropout", "dec_dropout"),
        *("blank_index", "bos_index", "eos_index", "pad_index"),
        *("ctc_weight", "number_of_ctc_epochs", "ce_weight"),
    )

    has_transcripts = True
    recomputable = ("CNN", ENCODER_LAYERS)
    # Assumed tokens in a second of speech. LibriSpeech's train-clean-100 has 5.3
    # with 500 unigrams (95 % of the utterances at most 7), and fewer with 1000.
    token_rate = 5
    # Default length of utterances. LibriSpeech's longest have 15 to 17 seconds,
    # except for a few.
    seconds = 15

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
        parts, objects = [], ["compute_features"]
        if "transducer_loss" not in modules:
            objects.append("transducer_cost")
        if _uses_ctc(settings):
            parts.append("proj_ctc")
            objects += ["ctc_cost", "log_softmax"]
        if settings["ce_weight"] > 0:
            parts.append("dec_lin")
            objects += ["ce_cost", "log_softmax"]
        return parts, objects

    @classmethod
    def default_batch(
        cls, number: Callable[[str], Any], seconds: float | None = None
    ) -> tuple[int, float]:
        """See TrainingStep; 15 s by default.

        With dynamic batching, as many utterances as fit into max_batch_len,
        but at least one.
        """
        if seconds is None:
            seconds = cls.seconds
        if number("dynamic_batching"):
            return max(int(number("max_batch_len") // seconds), 1), seconds
        return number("batch_size"), seconds

    def batch(
        self, batch: int, seconds: float, tokens: int | None = None
    ) -> tuple[torch.Tensor, ...]:
        """Makes a batch of noise and arbitrary tokens, as the data loader's.

        Arguments
        ---------
        batch : int
            Utterances.
        seconds : float
            Length of each.
        tokens : int, optional
            Length of each transcript; by default 5 a second, as for unigrams
            on LibriSpeech. There are about three times as many characters.

        Returns
        -------
        tuple of torch.Tensor
            Waveforms [B, samples], their relative lengths [B]; tokens
            [B, U + 1] after a bos; tokens [B, U], their relative lengths [B];
            tokens [B, U + 1] before an eos, their relative lengths [B].
        """
        if tokens is None:
            tokens = max(round(seconds * self.token_rate), 1)
        wavs, ones = self._waveforms(batch, seconds)
        vocabulary = self.settings["output_neurons"]
        ids = [i % (vocabulary - 1) for i in range(tokens)]
        ids = [i + (i >= self.settings["blank_index"]) for i in ids]

        def rows(row: list[int]) -> torch.Tensor:
            return torch.tensor(row, device=wavs.device).repeat(batch, 1)

        with_bos = rows([self.settings["bos_index"], *ids])
        with_eos = rows([*ids, self.settings["eos_index"]])
        return wavs, ones, with_bos, rows(ids), ones, with_eos, ones

    def forward(
        self,
        wavs: torch.Tensor,
        wav_lens: torch.Tensor,
        tokens_bos: torch.Tensor,
        tokens: torch.Tensor,
        token_lens: torch.Tensor,
        tokens_eos: torch.Tensor,
        token_eos_lens: torch.Tensor,
    ) -> torch.Tensor:
        """Computes the loss of a batch, as returned by ``batch``."""
        self.outputs = None
        self.outputs = self._compute_forward(wavs, wav_lens, tokens_bos)
        labels = tokens, token_lens, tokens_eos, token_eos_lens
        for name in self.augmentations:
            labels = self._augmented(name, *labels)
        return self._compute_objectives(*labels)

    def _compute_forward(
        self,
        wavs: torch.Tensor,
        wav_lens: torch.Tensor,
        tokens_bos: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        wavs, wav_lens, tokens_bos = self._augmented(
            "wav_augment", wavs, wav_lens, tokens_bos
        )
        feats = self._call("compute_features", wavs)
        feats, wav_lens, tokens_bos = self._augmented(
            "fea_augment", feats, wav_lens, tokens_bos
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

        outputs = {"wav_lens": wav_lens}
        if self.has_joint_loss:
            outputs.update(encoded=encoded, predicted=predicted)
        else:
            joint = self.Tjoint(encoded.unsqueeze(2), predicted.unsqueeze(1))
            outputs["logits"] = self.transducer_lin(joint)
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
        lengths = outputs["wav_lens"], token_lens
        if self.has_joint_loss:
            loss = self.transducer_loss(
                outputs["encoded"], outputs["predicted"], tokens, *lengths
            )
        else:
            loss = self.logits_loss(outputs["logits"], tokens, *lengths)
        ctc_weight = self.settings["ctc_weight"]
        ce_weight = self.settings["ce_weight"]
        loss = (1 - (ctc_weight + ce_weight)) * loss
        if "p_ctc" in outputs:
            loss = loss + ctc_weight * self._call(
                "ctc_cost", outputs["p_ctc"], tokens, *lengths
            )
        if "p_ce" in outputs:
            loss = loss + ce_weight * self._call(
                "ce_cost", outputs["p_ce"], tokens_eos, length=token_eos_lens
            )
        return loss

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
        return self._call(
            "transducer_cost", logits, tokens, wav_lens, token_lens
        )

    @property
    def tokens(self) -> int | None:
        """See TrainingStep."""
        return None if self.inputs is None else self.inputs[3].shape[1]

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
        step.transducer_lin,
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
