"""Exports speaker models as folders that SpeechBrain's inference loads.

Authors
 * The sb_memeff authors 2026
"""

import io
import shutil
from pathlib import Path
from typing import Any, cast

import ruamel.yaml
import ruamel.yaml.comments
import torch
from hyperpyyaml import load_hyperpyyaml

from sb_memeff.export.standalone import export_onnx
from sb_memeff.utils.atomic_checkpoints import trained_weights

__all__ = ["export_speaker_model", "export_speaker_onnx"]

# Keys of a training's hyperparams.yaml that inference needs.
KEYS = (
    "sample_rate",
    "compute_features",
    "mean_var_norm",
    "embedding_model",
    "classifier",
)
# The rest of the yaml file, for EncoderClassifier and SpeakerRecognition. Scores
# are cosines of unnormalised embeddings: mean_var_norm_emb does nothing.
INFERENCE_YAML = """
mean_var_norm_emb: !new:speechbrain.nnet.containers.LengthsCapableSequential
    - !new:torch.nn.Identity

label_encoder: !new:speechbrain.dataio.encoder.CategoricalEncoder

modules:
    compute_features: !ref <compute_features>
    mean_var_norm: !ref <mean_var_norm>
    mean_var_norm_emb: !ref <mean_var_norm_emb>
    embedding_model: !ref <embedding_model>
    classifier: !ref <classifier>

pretrainer: !new:speechbrain.utils.parameter_transfer.Pretrainer
    loadables:
        embedding_model: !ref <embedding_model>
        classifier: !ref <classifier>
        label_encoder: !ref <label_encoder>
"""


def export_speaker_model(
    output_folder: str | Path, destination: str | Path
) -> Path:
    """Makes a folder for SpeakerRecognition and EncoderClassifier.

    Arguments
    ---------
    output_folder : str
        The ``output_folder`` of a training with the VoxCeleb recipe.
    destination : str
        Folder to write to; it is created.

    Returns
    -------
    Path
        The folder whose weights were exported: ``save`` with the mean of
        checkpoints, or else the checkpoint with the lowest ErrorRate.

    Raises
    ------
    FileNotFoundError
        If ``output_folder`` is not of a training with a finished epoch.
    ValueError
        If its yaml file lacks a key that inference needs.

    Example
    -------
    >>> export_speaker_model("results/RevNet34/1986", "model")  # doctest: +SKIP
    >>> from speechbrain.inference.speaker import SpeakerRecognition
    >>> model = SpeakerRecognition.from_hparams("model")  # doctest: +SKIP
    >>> model.verify_files("a.wav", "b.wav")  # doctest: +SKIP
    """
    output_folder, destination = Path(output_folder), Path(destination)
    save_folder = output_folder / "save"
    hyperparams = output_folder / "hyperparams.yaml"
    weights = trained_weights(save_folder)
    sources = {
        "hyperparams.yaml": hyperparams,
        "label_encoder.ckpt": save_folder / "label_encoder.txt",
    }
    if weights is not None:
        for name in ("embedding_model", "classifier"):
            sources[f"{name}.ckpt"] = weights / f"{name}.ckpt"
    missing = [path for path in sources.values() if not path.is_file()]
    if weights is None or missing:
        missing_item = missing[0] if missing else f"checkpoint in {save_folder}"
        raise FileNotFoundError(
            f"There is no {missing_item}: export needs the output_folder of a "
            f"training that has finished at least one epoch."
        )
    text = inference_yaml(hyperparams)

    destination.mkdir(parents=True, exist_ok=True)
    for name, path in sources.items():
        if name != "hyperparams.yaml":
            shutil.copyfile(path, destination / name)
    # Last, so that a folder with a yaml file is complete.
    (destination / "hyperparams.yaml").write_text(text, encoding="utf-8")
    return weights


def export_speaker_onnx(folder: str | Path) -> Path:
    """Adds the embedding network as ONNX to a folder for inference.

    Arguments
    ---------
    folder : str
        Folder made by ``export_speaker_model``. ``embedding_model.onnx``
        takes the features of ``mean_var_norm``, ``feats`` [B, T, F], and
        ``lengths`` [B]; see ``sb_memeff.export.standalone``.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    ImportError
        If the package onnx is missing.
    """
    folder = Path(folder)
    with open(folder / "hyperparams.yaml", encoding="utf-8") as f:
        params = load_hyperpyyaml(f)
    network = params["embedding_model"]
    weights = torch.load(
        folder / "embedding_model.ckpt", map_location="cpu", weights_only=True
    )
    network.load_state_dict(weights)
    second = torch.zeros(1, params["sample_rate"])
    input_size = params["compute_features"](second).shape[-1]
    path = folder / "embedding_model.onnx"
    export_onnx(network, path, input_size, with_lengths=True)
    return path


def inference_yaml(hyperparams: Path) -> str:
    """Makes the yaml text for inference from that of a training.

    Arguments
    ---------
    hyperparams : Path
        ``hyperparams.yaml`` as SpeechBrain saved it: overrides applied and
        references resolved.

    Returns
    -------
    str
        The text.

    Raises
    ------
    ValueError
        If a key is missing.
    """
    yaml = ruamel.yaml.YAML()
    hparams = yaml.load(hyperparams)
    missing = [key for key in KEYS if key not in hparams]
    if missing:
        raise ValueError(
            f"{hyperparams} lacks {', '.join(missing)}, which inference needs."
        )
    stream = io.StringIO()
    stream.write("# Made by sb-memeff export from a training.\n")
    # The nodes carry comments of the training's yaml file.
    kept = ruamel.yaml.comments.CommentedMap(
        (key, hparams[key]) for key in KEYS
    )
    strip_comments(kept)
    yaml.dump(kept, stream)
    return stream.getvalue() + INFERENCE_YAML


def strip_comments(node: Any) -> None:
    """Removes the comments of a yaml tree in place."""
    if isinstance(node, (dict, list)):
        comments = cast(Any, node).ca
        comments.items.clear()
        comments.comment = None
        comments.end = []
        for child in node.values() if isinstance(node, dict) else node:
            strip_comments(child)
