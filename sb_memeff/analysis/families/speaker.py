"""Speaker embeddings: the training step and its alternative networks.

Authors
 * The sb_memeff authors 2026
"""

import contextlib
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from speechbrain.lobes.features import Leaf
from speechbrain.lobes.models import ECAPA_TDNN as speechbrain_ecapa

from sb_memeff.analysis.families.step import (
    TrainingStep,
    Variant,
    class_label,
)
from sb_memeff.lobes.models.DFResNet import DFResNet
from sb_memeff.lobes.models.RecomputedECAPA_TDNN import ECAPA_TDNN
from sb_memeff.lobes.models.RevDFResNet import RevDFResNet
from sb_memeff.lobes.models.RevECAPA_TDNN import RevECAPA_TDNN
from sb_memeff.lobes.models.RevResNet import RevResNet
from sb_memeff.lobes.models.WeSpeakerResNet import ResNet
from sb_memeff.lobes.presets import Presets
from sb_memeff.nnet.recompute import recompute_blocks

if TYPE_CHECKING:
    from sb_memeff.analysis.recipe import Recipe

__all__ = ["RESNETS", "TYPES", "SpeakerStep", "reversible_twin"]

# Vanilla networks and their reversible counterparts.
RESNETS = ((ResNet, RevResNet), (DFResNet, RevDFResNet))
TYPES = {"strided": "Type I", "invertible": "Type II"}
ECAPAS = (speechbrain_ecapa.ECAPA_TDNN, ECAPA_TDNN, RevECAPA_TDNN)
SPEECHBRAINS_RESNET = "speechbrain.lobes.models.ResNet.ResNet"
# Blocks that per-block checkpointing recomputes, and blocks in a segment.
BLOCKS = {
    "sb_memeff.lobes.models.WeSpeakerResNet.ResNet": ("stages.*.*", 1),
    "sb_memeff.lobes.models.DFResNet.DFResNet": ("stages.*.*", 1),
    SPEECHBRAINS_RESNET: ("layer?.*", 1),
    "speechbrain.lobes.models.ECAPA_TDNN.ECAPA_TDNN": ("blocks.*", 1),
    # Convolution, activation, norm.
    "speechbrain.lobes.models.Xvector.Xvector": ("blocks.*", 3),
}


class SpeakerStep(TrainingStep):
    """Speaker embeddings: VoxCeleb/SpeakerRec, SpeechBrain's and ours.

    SpeechBrain's recipes that classify languages, sounds, commands and emotions
    by an embedding have the same step. The embedding model's class determines
    which recipe it is. Ours has a network of sb_memeff: its Brain passes lengths
    to the network and runs the classifier in float32, outside autocast.
    SpeechBrain's does neither.

    Arguments
    ---------
    *args : tuple
        As TrainingStep's.
    **kwargs : dict
        As TrainingStep's.
    """

    _parts = {"compute_features", "embedding_model", "classifier"}
    layouts = (
        _parts | {"mean_var_norm"},
        _parts | {"mean_var_norm_input"},
    )
    numbers = ("sample_rate",)
    # Batch norm cannot train on one utterance.
    min_batch = 2
    embedding_model: torch.nn.Module
    classifier: torch.nn.Module

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        package = type(self.embedding_model).__module__.split(".")[0]
        self.ours = package == "sb_memeff"
        self._normalize = next(
            name
            for name in ("mean_var_norm", "mean_var_norm_input")
            if hasattr(self, name)
        )

    @classmethod
    def needs(
        cls, modules: Collection[str], settings: dict[str, Any]
    ) -> tuple[list[str], list[str]]:
        """See TrainingStep."""
        return [], ["compute_features", "compute_cost"]

    @classmethod
    def default_batch(
        cls, recipe: "Recipe", seconds: float | None = None
    ) -> tuple[int, float]:
        """See TrainingStep."""
        if seconds is None:
            seconds = recipe.number(
                "sentence_len", "give the length of the utterances by --seconds"
            )
        return recipe.number("batch_size"), seconds

    def batch(
        self, batch: int, seconds: float, tokens: int | None = None
    ) -> tuple[torch.Tensor, ...]:
        """Makes a batch of noise, in the form of the data loader's.

        Arguments
        ---------
        batch : int
            Utterances.
        seconds : float
            Length of each.
        tokens : None
            Not used; there are no transcripts.

        Returns
        -------
        tuple of torch.Tensor
            Waveforms [B, samples], relative lengths [B], speakers [B, 1] (all
            0, which every classifier has).
        """
        wavs, lens = self._waveforms(batch, seconds)
        speakers = torch.zeros(batch, 1, dtype=torch.long, device=wavs.device)
        return wavs, lens, speakers

    def forward(
        self, wavs: torch.Tensor, lens: torch.Tensor, speakers: torch.Tensor
    ) -> torch.Tensor:
        """Computes the loss of a batch.

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
        feats = self._features(wavs, lens)
        if not self.ours:
            embeddings = self.embedding_model(feats)
            outputs = self.classifier(embeddings)
            # Of the Speech Commands.
            softmax = getattr(self, "softmax", None)
            return outputs if softmax is None else softmax(outputs)
        embeddings = self.embedding_model(feats, lens)
        with _without_autocast(embeddings.device.type):
            return self.classifier(embeddings.float())

    def _features(self, wavs: torch.Tensor, lens: torch.Tensor) -> torch.Tensor:
        if self.settings.get("use_tacotron2_mel_spec"):
            feats = self._call("compute_features", audio=wavs)
            feats = feats.transpose(1, 2)
        elif isinstance(getattr(self, "compute_features", None), Leaf):
            # Learned filters, of normalised waveforms.
            wavs = self._call(self._normalize, wavs, lens)
            return self._call("compute_features", wavs)
        else:
            feats = self._call("compute_features", wavs)
        return self._call(self._normalize, feats, lens)

    @classmethod
    def label(cls, recipe: "Recipe") -> str:
        """See TrainingStep."""
        path = recipe.callee("embedding_model")
        if path.endswith(".from_preset"):
            given = recipe.modules["embedding_model"]
            kind = ""
            if path in [_preset(reversible) for _, reversible in RESNETS]:
                # The default is Type I.
                kind = TYPES.get(given.get("downsampling", "strided"), "")
            return f"{given.get('name', '')} {kind}".strip()
        return recipe.network("embedding_model")

    @classmethod
    def variants(cls, recipe: "Recipe") -> list[Variant]:
        """The vanilla network, stored and recomputed, and reversible ones."""
        own = Variant(cls.label(recipe))
        # The yaml file's own network keeps arguments that others lack.
        return [
            own if row.label == own.label else row for row in _networks(recipe)
        ]


def reversible_twin(name: str) -> str:
    """Returns the reversible counterpart of a vanilla preset.

    Arguments
    ---------
    name : str
        Such as "ResNet34".

    Returns
    -------
    str
        Such as "RevNet34".

    Example
    -------
    >>> reversible_twin("GeminiDFResNet114")
    'GeminiDFRevNet114'
    """
    return name.replace("ResNet", "RevNet")


def _networks(recipe: "Recipe") -> list[Variant]:
    path = recipe.callee("embedding_model")
    for vanilla, reversible in RESNETS:
        if path in (_preset(vanilla), _preset(reversible)):
            arguments = recipe.arguments("embedding_model")
            return _resnets(vanilla, reversible, **arguments)
    if path in map(_path, ECAPAS):
        return _ecapas(recipe.arguments("embedding_model"))
    own = Variant(SpeakerStep.label(recipe))
    rows = [own]
    if path in BLOCKS:
        rows.append(Variant(f"{own.label}, blocks recomputed", _recompute))
    if path == SPEECHBRAINS_RESNET:
        rows += _like_resnet(**recipe.arguments("embedding_model"))
    return rows


def _like_resnet(
    input_size: int = 80,
    block_sizes: Sequence[int] = (3, 4, 6, 3),
    lin_neurons: int = 256,
    **others: Any,
) -> list[Variant]:
    """Reversible networks instead of SpeechBrain's ResNet, as deep."""
    deep = [
        name
        for name, preset in ResNet.PRESETS.items()
        if preset["block_sizes"] == list(block_sizes)
    ]
    name = deep[0] if deep else next(iter(ResNet.PRESETS))
    return _reversible(
        RevResNet, name, input_size=input_size, lin_neurons=lin_neurons
    )


def _resnets(
    vanilla: type[Presets],
    reversible: type[Presets],
    name: str = "",
    **arguments: Any,
) -> list[Variant]:
    # Arguments of the reversible networks only.
    for own in ("downsampling", "save_memory"):
        arguments.pop(own, None)
    plain = str(name).replace("RevNet", "ResNet")
    build = partial(vanilla.from_preset, plain, **arguments)
    rows = [
        Variant(plain, _with_network(build)),
        Variant(
            f"{plain}, blocks recomputed", _with_network(build, recompute=True)
        ),
    ]
    return rows + _reversible(reversible, plain, **arguments)


def _reversible(
    network: type[Presets], plain: str, **arguments: Any
) -> list[Variant]:
    """Both types of the reversible counterpart of a preset."""
    twin = reversible_twin(plain)
    return [
        Variant(
            f"{twin} {label}",
            _with_network(
                partial(
                    network.from_preset, twin, downsampling=kind, **arguments
                )
            ),
        )
        for kind, label in TYPES.items()
    ]


def _ecapas(arguments: dict[str, Any]) -> list[Variant]:
    rows = []
    # Arguments that SpeechBrain's network lacks.
    for own in ("save_memory", "inner_channels"):
        arguments.pop(own, None)
    for network in ECAPAS:
        build = partial(network, **arguments)
        label = class_label(_path(network))
        rows.append(Variant(label, _with_network(build)))
        if not rows[1:]:
            rows.append(
                Variant(
                    f"{label}, blocks recomputed",
                    _with_network(build, recompute=True),
                )
            )
    return rows


def _with_network(
    build: Callable[[], object], recompute: bool = False
) -> Callable[[Any], None]:
    def change(step: Any) -> None:
        step.embedding_model = build()
        if recompute:
            _recompute(step)

    return change


def _recompute(step: Any) -> None:
    network = step.embedding_model
    blocks, length = BLOCKS[_path(type(network))]
    recompute_blocks(network, blocks, segment_length=length)


def _path(network: type) -> str:
    return f"{network.__module__}.{network.__qualname__}"


def _preset(network: type) -> str:
    return f"{_path(network)}.from_preset"


def _without_autocast(
    device_type: str,
) -> contextlib.AbstractContextManager[Any]:
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()
