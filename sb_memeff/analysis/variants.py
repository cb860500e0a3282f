"""The networks and losses that a recipe could have instead of its own.

Authors
 * The sb_memeff authors 2026
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from speechbrain.lobes.models import ECAPA_TDNN as speechbrain_ecapa

from sb_memeff.analysis.recipe import Recipe
from sb_memeff.lobes.models.DFResNet import DFResNet
from sb_memeff.lobes.models.ECAPA_TDNN import ECAPA_TDNN
from sb_memeff.lobes.models.ResNet import ResNet
from sb_memeff.lobes.models.RevDFResNet import RevDFResNet
from sb_memeff.lobes.models.RevECAPA_TDNN import RevECAPA_TDNN
from sb_memeff.lobes.models.RevResNet import RevResNet
from sb_memeff.lobes.presets import Presets
from sb_memeff.nnet.recompute import recompute_blocks
from sb_memeff.nnet.transducer.joint_loss import TransducerJointLoss

__all__ = [
    "RESNETS",
    "TYPES",
    "Variant",
    "own_variant",
    "reversible_twin",
    "variants",
]

# Vanilla networks and the reversible ones that take their place.
RESNETS = ((ResNet, RevResNet), (DFResNet, RevDFResNet))
TYPES = {"strided": "Type I", "invertible": "Type II"}
ECAPAS = (speechbrain_ecapa.ECAPA_TDNN, ECAPA_TDNN, RevECAPA_TDNN)
METHODS: tuple[Literal["batched", "samplewise", "tiled"], ...] = (
    "batched",
    "samplewise",
    "tiled",
)
# Which blocks per-block checkpointing recomputes, and how many at a time.
BLOCKS = {
    "sb_memeff.lobes.models.ResNet.ResNet": ("stages.*.*", 1),
    "sb_memeff.lobes.models.DFResNet.DFResNet": ("stages.*.*", 1),
    "speechbrain.lobes.models.ResNet.ResNet": ("layer?.*", 1),
    "speechbrain.lobes.models.ECAPA_TDNN.ECAPA_TDNN": ("blocks.*", 1),
    # Convolution, activation, norm.
    "speechbrain.lobes.models.Xvector.Xvector": ("blocks.*", 3),
}
ENCODER_LAYERS = "enc.transformer.encoder.layers.*"


@dataclass
class Variant:
    """One of several ways to train a recipe.

    Arguments
    ---------
    label : str
        For tables.
    change : callable, optional
        Changes a training step that the recipe has built.
    """

    label: str
    change: Callable[[Any], None] | None = None


def own_variant(recipe: Recipe) -> Variant:
    """The recipe as it is.

    Arguments
    ---------
    recipe : Recipe
        The recipe.

    Returns
    -------
    Variant
        Without a change, labelled by its network or loss.
    """
    if recipe.family == "transducer":
        if "transducer_loss" not in recipe.modules:
            return Variant("SpeechBrain's loss")
        return Variant(recipe.modules["transducer_loss"].get("method", "tiled"))
    path = recipe.callee("embedding_model")
    if path.endswith(".from_preset"):
        given = recipe.modules["embedding_model"]
        kind = ""
        if path in [_preset(reversible) for _, reversible in RESNETS]:
            # By default Type I.
            kind = TYPES.get(given.get("downsampling", "strided"), "")
        return Variant(f"{given.get('name', '')} {kind}".strip())
    return Variant(_label(path) or "embedding_model")


def variants(recipe: Recipe) -> list[Variant]:
    """Alternatives to compare a recipe with.

    Speaker recipes: the vanilla network with all activations stored and with
    its blocks recomputed, and its reversible twins where there are any.
    Transducer recipes: the methods of the loss, the last one with the
    encoder's layers recomputed too.

    Arguments
    ---------
    recipe : Recipe
        The recipe.

    Returns
    -------
    list of Variant
        The recipe itself is among them.
    """
    if recipe.family == "transducer":
        return _losses(recipe)
    own = own_variant(recipe)
    # As the yaml file has it, with what only its network takes.
    return [own if row.label == own.label else row for row in _networks(recipe)]


def reversible_twin(name: str) -> str:
    """The reversible preset of a vanilla preset's name.

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


def _networks(recipe: Recipe) -> list[Variant]:
    path = recipe.callee("embedding_model")
    for vanilla, reversible in RESNETS:
        if path in (_preset(vanilla), _preset(reversible)):
            arguments = recipe.arguments("embedding_model")
            return _resnets(vanilla, reversible, **arguments)
    if path in map(_path, ECAPAS):
        return _ecapas(recipe.arguments("embedding_model"))
    own = own_variant(recipe)
    if path in BLOCKS:
        return [own, Variant(f"{own.label}, blocks recomputed", _recompute)]
    return [own]


def _resnets(
    vanilla: type[Presets],
    reversible: type[Presets],
    name: str = "",
    **arguments: Any,
) -> list[Variant]:
    # What only the reversible networks have.
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
    for kind, label in TYPES.items():
        twin = reversible_twin(plain)
        build = partial(
            reversible.from_preset, twin, downsampling=kind, **arguments
        )
        rows.append(Variant(f"{twin} {label}", _with_network(build)))
    return rows


def _ecapas(arguments: dict[str, Any]) -> list[Variant]:
    rows = []
    # What SpeechBrain's does not have.
    for own in ("save_memory", "inner_channels"):
        arguments.pop(own, None)
    for network in ECAPAS:
        build = partial(network, **arguments)
        label = _label(_path(network))
        rows.append(Variant(label, _with_network(build)))
        if not rows[1:]:
            rows.append(
                Variant(
                    f"{label}, blocks recomputed",
                    _with_network(build, recompute=True),
                )
            )
    return rows


def _losses(recipe: Recipe) -> list[Variant]:
    rows = [Variant(m, partial(_with_method, method=m)) for m in METHODS]
    if "transducer_loss" not in recipe.modules:
        rows.insert(0, own_variant(recipe))

    def both(step: Any) -> None:
        _with_method(step, "tiled")
        recompute_blocks(step, ENCODER_LAYERS)

    return [*rows, Variant("tiled, encoder recomputed", both)]


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


def _with_method(
    step: Any, method: Literal["batched", "samplewise", "tiled"]
) -> None:
    if step.joins_in_loss:
        step.transducer_loss.method = method
        return
    step.transducer_loss = TransducerJointLoss(
        step.Tjoint,
        step.transducer_lin,
        step.settings["blank_index"],
        method=method,
    )
    step.joins_in_loss = True


def _path(network: type) -> str:
    return f"{network.__module__}.{network.__qualname__}"


def _preset(network: type) -> str:
    return f"{_path(network)}.from_preset"


def _label(path: str) -> str:
    owner = "SpeechBrain's " if path.startswith("speechbrain.") else ""
    return owner + path.rpartition(".")[2]
