"""Base of training steps on transcribed speech.

Authors
 * The sb_memeff authors 2026
"""

from typing import TYPE_CHECKING, NamedTuple

import torch

from sb_memeff.analysis.families.step import (
    TrainingStep,
    Variant,
    recomputed_variant,
)
from sb_memeff.nnet.recompute.fit import Recomputation

if TYPE_CHECKING:
    from sb_memeff.analysis.recipe import Recipe

__all__ = ["Transcribed", "TranscribedStep"]


class Transcribed(NamedTuple):
    """A batch of transcribed utterances."""

    # [B, samples], and lengths relative to the longest, [B].
    wavs: torch.Tensor
    wav_lens: torch.Tensor
    # [B, U + 1], after a bos.
    tokens_bos: torch.Tensor
    # [B, U], and their relative lengths.
    tokens: torch.Tensor
    token_lens: torch.Tensor
    # [B, U + 1], before an eos, and their relative lengths.
    tokens_eos: torch.Tensor
    token_eos_lens: torch.Tensor


class TranscribedStep(TrainingStep):
    """Base of the steps of speech recognition.

    It is a step of the first epoch: global normalization updates its statistics,
    and CTC is on. Augmentation multiplies the batch from the first step on, even
    if the recipe begins it later.

    Arguments
    ---------
    *args : tuple
        As TrainingStep's.
    **kwargs : dict
        As TrainingStep's.
    """

    augmentations = ("wav_augment", "fea_augment")
    numbers = ("sample_rate", "output_neurons")
    has_transcripts = True
    # Assumed tokens in a second of speech. LibriSpeech's train-clean-100 has 5.3
    # with 500 unigrams (95 % of the utterances at most 7), and fewer with 1000.
    token_rate = 5
    # Default length of utterances. LibriSpeech's longest have 15 to 17 seconds,
    # except for a few.
    seconds = 15
    # Key of the CTC loss.
    _ctc_cost = "ctc_cost"

    @classmethod
    def default_batch(
        cls, recipe: "Recipe", seconds: float | None = None
    ) -> tuple[int, float]:
        """See TrainingStep; 15 s by default.

        With dynamic batching, as many utterances as fit into a batch, but at
        least one.
        """
        if seconds is None:
            seconds = cls.seconds
        dynamic = recipe.dynamic_batching
        if dynamic is None:
            return recipe.number("batch_size"), seconds
        length = recipe.number(dynamic.key) * dynamic.unit
        count = min(length // seconds, dynamic.most)
        return max(int(count), 1), seconds

    def batch(
        self, batch: int, seconds: float, tokens: int | None = None
    ) -> Transcribed:
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
        Transcribed
            The batch.
        """
        if tokens is None:
            tokens = max(round(seconds * self.token_rate), 1)
        wavs, ones = self._waveforms(batch, seconds)
        blank = self.settings.get("blank_index", 0)
        ids = [i % (self.settings["output_neurons"] - 1) for i in range(tokens)]
        ids = [i + (i >= blank) for i in ids]
        # Recipes without a decoder have neither; a few integers do not count.
        bos = self.settings.get("bos_index", blank)
        eos = self.settings.get("eos_index", blank)

        def rows(row: list[int]) -> torch.Tensor:
            return torch.tensor(row, device=wavs.device).repeat(batch, 1)

        return Transcribed(
            wavs,
            ones,
            tokens_bos=rows([bos, *ids]),
            tokens=rows(ids),
            token_lens=ones,
            tokens_eos=rows([*ids, eos]),
            token_eos_lens=ones,
        )

    def forward(self, *batch: torch.Tensor) -> torch.Tensor:
        """Computes the loss of a batch.

        Arguments
        ---------
        *batch : torch.Tensor
            The parts of a Transcribed.

        Returns
        -------
        torch.Tensor
            A scalar.
        """
        given = Transcribed(*batch)
        self.outputs = None
        self.outputs = self._compute_forward(
            given.wavs, given.wav_lens, given.tokens_bos
        )
        labels = given[3:]
        for name in self.augmentations:
            labels = self._augmented(name, *labels)
        return self._compute_objectives(*labels)

    def _compute_forward(
        self,
        wavs: torch.Tensor,
        wav_lens: torch.Tensor,
        tokens_bos: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        raise NotImplementedError

    def _compute_objectives(
        self,
        tokens: torch.Tensor,
        token_lens: torch.Tensor,
        tokens_eos: torch.Tensor,
        token_eos_lens: torch.Tensor,
    ) -> torch.Tensor:
        if "p_seq" not in self.outputs:
            return self._ctc_loss(tokens, token_lens)
        loss_seq = self._call(
            "seq_cost", self.outputs["p_seq"], tokens_eos, length=token_eos_lens
        )
        if "p_ctc" not in self.outputs:
            return loss_seq
        loss_ctc = self._ctc_loss(tokens, token_lens)
        weight = self.settings["ctc_weight"]
        return weight * loss_ctc + (1 - weight) * loss_seq

    def _features(
        self, wavs: torch.Tensor, *labels: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Augments, and computes features.

        It also returns the augmented waveforms, which Brain's compute_forward
        keeps to its end.
        """
        wavs, *rest = self._augmented("wav_augment", wavs, *labels)
        feats = self._call("compute_features", wavs)
        return wavs, *self._augmented("fea_augment", feats, *rest)

    def _ctc_loss(
        self, tokens: torch.Tensor, token_lens: torch.Tensor
    ) -> torch.Tensor:
        outputs = self.outputs
        return self._call(
            self._ctc_cost,
            outputs["p_ctc"],
            tokens,
            outputs["wav_lens"],
            token_lens,
        )

    @property
    def tokens(self) -> int | None:
        """See TrainingStep."""
        return None if self.inputs is None else self.inputs.tokens.shape[1]

    @classmethod
    def variants(cls, recipe: "Recipe") -> list[Variant]:
        """The recipe itself, and with recomputed blocks if there are any."""
        own = Variant(cls.label(recipe))
        if not cls.recomputable:
            return [own]
        recomputed = {
            "blocks recomputed": Recomputation(),
            "recomputed without attention weights": Recomputation(
                first_output_only=True
            ),
            "recomputed in 8 pieces": Recomputation(
                first_output_only=True, split=8
            ),
        }
        return [own] + [
            recomputed_variant(own, cls.recomputable, how, label)
            for label, how in recomputed.items()
        ]
