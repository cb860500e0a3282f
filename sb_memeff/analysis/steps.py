"""Training steps of the known recipes, without their Brains.

A step does in ``forward`` what the recipe's Brain does between the data loader
and the loss, in training, and holds what Brain holds meanwhile. Autocast,
backward and the optimizer's step are the caller's.

Authors
 * The sb_memeff authors 2026
"""

import contextlib
import math
from collections.abc import Callable, Collection
from typing import Any

import torch

from sb_memeff.optim import keep_32bit_states

__all__ = ["SpeakerStep", "TrainingStep", "TransducerStep", "require_positive"]

# Waveforms beyond it are a slip of the keyboard; torch counts bytes in 63 bits.
MOST_SAMPLES = 2**48


def require_positive(**numbers: float | None) -> None:
    """Refuses what is no length and no number of utterances.

    Arguments
    ---------
    **numbers : dict
        Name to number; None is not given.

    Raises
    ------
    ValueError
        If one is not positive, or infinite, or not a number.

    Example
    -------
    >>> require_positive(batch=0)
    Traceback (most recent call last):
    ...
    ValueError: batch=0 must be positive and finite.
    """
    for name, number in numbers.items():
        if number is not None and not 0 < number < math.inf:
            raise ValueError(f"{name}={number} must be positive and finite.")


class TrainingStep(torch.nn.Module):
    """Base of the steps of all families.

    Objects of the yaml file are submodules by their names there: ``step.enc``.

    Arguments
    ---------
    modules : dict
        The yaml file's modules: what Brain moves to the GPU and gives to the
        optimizer.
    functions : dict
        What else ``forward`` calls, by name.
    opt_class : callable
        From parameters to an optimizer.
    settings : dict
        Plain values of the yaml file.
    copies : dict
        Name of an augmentation to the number of batches it makes of one.
    """

    # The modules that tell the family: all of one of these sets.
    layouts: tuple[set[str], ...] = ()
    # The augmentations that its Brain looks for.
    augmentations: tuple[str, ...] = ("wav_augment",)
    # Top-level numbers of the yaml file that it reads.
    numbers: tuple[str, ...] = ()

    def __init__(
        self,
        modules: dict[str, torch.nn.Module],
        functions: dict[str, Callable[..., Any]],
        opt_class: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer],
        settings: dict[str, Any],
        copies: dict[str, int],
    ):
        super().__init__()
        self.settings = settings
        # Brain.fit_batch holds what compute_forward gave until the batch is
        # done, through backward: the logits of a transducer, for one.
        self.outputs: Any = None
        # The data loader's batch, for callers that want it to live as long.
        self.inputs: Any = None
        self._trained = list(modules)
        self._functions = functions
        self._opt_class = opt_class
        self._copies = copies
        for name, module in {**functions, **modules}.items():
            if isinstance(module, torch.nn.Module):
                if hasattr(self, name):
                    raise ValueError(
                        f"modules names one {name!r}, which the analysis uses "
                        f"otherwise: give it another name."
                    )
                self.add_module(name, module)

    @classmethod
    def needs(
        cls, modules: Collection[str], settings: dict[str, Any]
    ) -> tuple[list[str], list[str]]:
        """Keys that the step needs besides its modules and opt_class.

        Arguments
        ---------
        modules : collection of str
            Names of the yaml file's modules.
        settings : dict
            Its plain values.

        Returns
        -------
        tuple of list of str
            Modules that the settings ask for; objects outside the modules.
        """
        raise NotImplementedError

    @property
    def copies(self) -> int:
        """Rows of a batch in the network for each row of the loader's."""
        result = 1
        for name in self.augmentations:
            result *= self._copies.get(name, 1)
        return result

    def optimizer(self) -> torch.optim.Optimizer:
        """The recipe's optimizer, as Brain makes it.

        Parameters that no loss reaches (those of a language model among the
        modules) belong to it, as they do in training.

        Returns
        -------
        torch.optim.Optimizer
            For all of the modules' parameters that need gradients.
        """
        modules = torch.nn.ModuleDict(
            {name: self.get_submodule(name) for name in self._trained}
        )
        keep_32bit_states(modules)
        return self._opt_class(
            [p for p in modules.parameters() if p.requires_grad]
        )

    def _call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Calls a function of the yaml file."""
        return self._functions[name](*args, **kwargs)

    def _augmented(
        self, name: str, *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """The tensors as often as an augmentation gives them out.

        The concatenation alone: what augmenting itself needs in between is a
        part of the size of the waveforms, and those are small beside a
        network's activations.
        """
        copies = self._copies.get(name, 1)
        if copies == 1:
            return tensors
        return tuple(torch.cat([x] * copies) for x in tensors)

    def _waveforms(
        self, batch: int, seconds: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Noise, and the relative lengths of utterances without padding."""
        require_positive(batch=batch, seconds=seconds)
        samples = round(seconds * self.settings["sample_rate"])
        if not 1 <= samples <= MOST_SAMPLES // batch:
            raise ValueError(
                f"A batch of {batch} utterances of {seconds} s is "
                f"{batch} x {samples} samples: give 1 at least, and "
                f"{MOST_SAMPLES} at most."
            )
        device = next(self.parameters()).device
        wavs = 0.1 * torch.randn(batch, samples, device=device)
        return wavs, torch.ones(batch, device=device)


class SpeakerStep(TrainingStep):
    """Speaker embeddings: VoxCeleb/SpeakerRec, SpeechBrain's and ours.

    Which of the two Brains is told by the embedding model's class: one of
    sb_memeff belongs to our SpeakerBrain, which gives the network the lengths
    and runs the classifier in float32, outside autocast. SpeechBrain's does
    neither.

    Arguments
    ---------
    *args : tuple
        As TrainingStep's.
    **kwargs : dict
        As TrainingStep's.
    """

    layouts = (
        {"compute_features", "mean_var_norm", "embedding_model", "classifier"},
    )
    numbers = ("sample_rate",)
    compute_features: torch.nn.Module
    mean_var_norm: torch.nn.Module
    embedding_model: torch.nn.Module
    classifier: torch.nn.Module

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        package = type(self.embedding_model).__module__.split(".")[0]
        self.ours = package == "sb_memeff"

    @classmethod
    def needs(
        cls, modules: Collection[str], settings: dict[str, Any]
    ) -> tuple[list[str], list[str]]:
        """See TrainingStep."""
        return [], ["compute_cost"]

    @staticmethod
    def default_batch(
        number: Callable[[str], Any], seconds: float | None = None
    ) -> tuple[int, float]:
        """The recipe's own batch.

        Arguments
        ---------
        number : callable
            From a key to that number of the yaml file.
        seconds : float, optional
            The length, if it is not the recipe's.

        Returns
        -------
        tuple
            Utterances, seconds.
        """
        if seconds is None:
            seconds = number("sentence_len")
        return number("batch_size"), seconds

    def batch(self, batch: int, seconds: float) -> tuple[torch.Tensor, ...]:
        """A batch as a data loader gives it, of noise.

        Arguments
        ---------
        batch : int
            Utterances.
        seconds : float
            Length of each.

        Returns
        -------
        tuple of torch.Tensor
            Waveforms [B, samples], relative lengths [B], speakers [B, 1] (all
            the first, whom every classifier knows).
        """
        wavs, lens = self._waveforms(batch, seconds)
        speakers = torch.zeros(batch, 1, dtype=torch.long, device=wavs.device)
        return wavs, lens, speakers

    def forward(
        self, wavs: torch.Tensor, lens: torch.Tensor, speakers: torch.Tensor
    ) -> torch.Tensor:
        """The loss of a batch.

        Arguments
        ---------
        wavs : torch.Tensor
            [B, samples].
        lens : torch.Tensor
            [B], relative.
        speakers : torch.Tensor
            [B, 1].

        Returns
        -------
        torch.Tensor
            A scalar.
        """
        self.outputs = None
        self.outputs = self._compute_forward(wavs, lens)
        (speakers,) = self._augmented("wav_augment", speakers)
        return self._call("compute_cost", self.outputs, speakers)

    def _compute_forward(
        self, wavs: torch.Tensor, lens: torch.Tensor
    ) -> torch.Tensor:
        wavs, lens = self._augmented("wav_augment", wavs, lens)
        feats = self.compute_features(wavs)
        feats = self.mean_var_norm(feats, lens)
        if not self.ours:
            embeddings = self.embedding_model(feats)
            return self.classifier(embeddings)
        embeddings = self.embedding_model(feats, lens)
        with _without_autocast(embeddings.device.type):
            return self.classifier(embeddings.float())


class TransducerStep(TrainingStep):
    """Neural transducer: LibriSpeech/ASR/transducer, SpeechBrain's and ours.

    The first epoch (the normalizer counts, CTC is on if there is any), and the
    whole utterance in one chunk: of the chunks that dynamic chunk training
    draws, the largest.

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

    # Tokens in a second of speech: an assumption. LibriSpeech's train-clean-100 has 5.3 of
    # 500 unigrams (95 % of the utterances 7 or less); of 1000 there are fewer.
    token_rate = 5
    # Seconds, where the yaml file names none: LibriSpeech's longest are 15 to
    # 17, but for a few.
    seconds = 15

    # Of the modules of either layout.
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
        self.joins_in_loss = hasattr(self, "transducer_loss")

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
        """The recipe's own batch.

        With dynamic batching, as many utterances as fit into max_batch_len,
        but one at least.

        Arguments
        ---------
        number : callable
            From a key to that number of the yaml file.
        seconds : float, optional
            Length of each; 15 by default.

        Returns
        -------
        tuple
            Utterances, seconds.
        """
        if seconds is None:
            seconds = cls.seconds
        if number("dynamic_batching"):
            return max(int(number("max_batch_len") // seconds), 1), seconds
        return number("batch_size"), seconds

    def batch(
        self, batch: int, seconds: float, tokens: int | None = None
    ) -> tuple[torch.Tensor, ...]:
        """A batch as a data loader gives it, of noise and arbitrary tokens.

        Arguments
        ---------
        batch : int
            Utterances.
        seconds : float
            Length of each.
        tokens : int, optional
            Length of each transcript; 5 a second by default, what LibriSpeech
            has with unigrams. Characters are about three times as many.

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
        known = self.settings["output_neurons"]
        ids = [i % (known - 1) for i in range(tokens)]
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
        """The loss of a batch; arguments are what ``batch`` returns."""
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
        if self.joins_in_loss:
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
        if self.joins_in_loss:
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
        """SpeechBrain's transducer loss, of all logits.

        Put another function in its place where this one cannot run:
        SpeechBrain's own needs a GPU and numba.

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


def _uses_ctc(settings: dict[str, Any]) -> bool:
    return settings["ctc_weight"] > 0 and settings["number_of_ctc_epochs"] >= 1


def _without_autocast(
    device_type: str,
) -> contextlib.AbstractContextManager[Any]:
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()
