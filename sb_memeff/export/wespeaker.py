"""WeSpeaker's published ResNets as folders that SpeechBrain's inference loads.

Authors
 * The sb_memeff authors 2026
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch

from sb_memeff.lobes.models.WeSpeakerResNet import ResNet

__all__ = ["convert_wespeaker", "convert_wespeaker_state"]

YAML = """# Converted from WeSpeaker's {source}.
sample_rate: 16000
compute_features: !new:sb_memeff.lobes.kaldi_features.KaldiFbank
    n_mels: {input_size}
mean_var_norm: !new:speechbrain.processing.features.InputNormalization
    norm_type: sentence
    std_norm: False
embedding_model: !apply:sb_memeff.lobes.models.WeSpeakerResNet.ResNet.from_preset
    name: {preset}
    input_size: {input_size}
    lin_neurons: {lin_neurons}
    published_head: True
mean_var_norm_emb: !new:speechbrain.nnet.containers.LengthsCapableSequential
    - !new:torch.nn.Identity

modules:
    compute_features: !ref <compute_features>
    mean_var_norm: !ref <mean_var_norm>
    mean_var_norm_emb: !ref <mean_var_norm_emb>
    embedding_model: !ref <embedding_model>

pretrainer: !new:speechbrain.utils.parameter_transfer.Pretrainer
    loadables:
        embedding_model: !ref <embedding_model>
"""


def convert_wespeaker(
    checkpoint: str | Path, destination: str | Path, preset: str
) -> None:
    """Makes a folder for SpeakerRecognition from WeSpeaker's weights.

    Arguments
    ---------
    checkpoint : str
        WeSpeaker's avg_model.pt, a state_dict.
    destination : str
        Folder to write to; it is created. ``embedding_model.ckpt`` can also be
        trained further: it fits ``ResNet`` with ``published_head``.
    preset : str
        Name of the network, such as ResNet34.

    Raises
    ------
    ValueError
        If the weights are of another network.

    Example
    -------
    >>> convert_wespeaker(
    ...     "avg_model.pt", "resnet34", "ResNet34"
    ... )  # doctest: +SKIP
    >>> from speechbrain.inference.speaker import SpeakerRecognition
    >>> model = SpeakerRecognition.from_hparams("resnet34")  # doctest: +SKIP
    """
    published = torch.load(checkpoint, map_location="cpu", weights_only=True)
    state = convert_wespeaker_state(published)
    lin_neurons, pooled = state["embedding.fc_embed.weight"].shape
    width = state["conv1.weight"].shape[0]
    # Of the preset at its published width: bands after three strides of 2.
    arguments = ResNet.preset_arguments(preset)
    input_size = 8 * pooled // (2 * arguments["channels"][-1])
    try:
        network = ResNet.from_preset(
            preset,
            input_size=input_size,
            lin_neurons=lin_neurons,
            published_head=True,
        )
        network.load_state_dict(state)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"{checkpoint} does not hold the weights of {preset}, but of a "
            f"network with {width} channels in its first convolution and "
            f"{_blocks(state)} blocks."
        ) from error
    destination = Path(destination)
    destination.mkdir(parents=True, exist_ok=True)
    torch.save(network.state_dict(), destination / "embedding_model.ckpt")
    # Last, so that a folder with a yaml file is complete.
    (destination / "hyperparams.yaml").write_text(
        YAML.format(
            source=Path(checkpoint).name,
            preset=preset,
            input_size=input_size,
            lin_neurons=lin_neurons,
        ),
        encoding="utf-8",
    )


def convert_wespeaker_state(
    published: Mapping[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Renames WeSpeaker's weights of a ResNet.

    Arguments
    ---------
    published : dict
        WeSpeaker's state_dict. Its classifier ("projection") is left out.

    Returns
    -------
    dict
        The state_dict of ``ResNet`` with ``published_head``.

    Raises
    ------
    ValueError
        If it is not of a ResNet with statistics pooling (TSTP) and one
        embedding layer.

    Example
    -------
    >>> list(convert_wespeaker_state({"layer1.0.bn1.weight": torch.ones(4)}))
    ['stages.0.0.bn1.weight']
    """
    state = {}
    for name, value in published.items():
        if name.startswith("projection."):
            continue
        if re.match(r"layer\d\.", name):
            stage = int(name[len("layer")]) - 1
            name = f"stages.{stage}{name[len('layer1') :]}"
        elif name.startswith("seg_1."):
            name = name.replace("seg_1", "embedding.fc_embed")
        elif not name.startswith(("conv1.", "bn1.")):
            raise ValueError(
                f"These weights have {name}: only WeSpeaker's ResNets with "
                f"TSTP pooling and one embedding layer can be converted."
            )
        if value.dim() == 4:
            # WeSpeaker's images are [frequency, time].
            value = value.transpose(2, 3).contiguous()
        state[name] = value
    return state


def _blocks(state: Mapping[str, torch.Tensor]) -> list[int]:
    """Blocks in each stage of a converted state_dict."""
    found = {re.match(r"stages\.(\d)\.(\d+)\.", name) for name in state}
    stages = [(int(m[1]), int(m[2])) for m in found if m]
    return [1 + max(b for s, b in stages if s == stage) for stage in range(4)]
