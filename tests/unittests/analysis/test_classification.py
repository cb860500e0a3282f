"""Recipes that classify utterances by an embedding, as speakers are."""

import pytest
import torch
from speechbrain.lobes.models import Tacotron2

from sb_memeff.analysis.profile import profile
from sb_memeff.analysis.recipe import read_recipe
from tests.unittests.analysis.yaml_files import UPSTREAM_SPEAKERS
from tests.unittests.one_analysis import one_analysis  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_analysis")

ECAPA = UPSTREAM_SPEAKERS["ecapa"]
XVECTOR = UPSTREAM_SPEAKERS["xvector"]


def changed(text, *replacements):
    for old, new in replacements:
        assert old in text, old
        text = text.replace(old, new)
    return text


# SpeechBrain corrected its name after 1.1.0.
MEL_SPECTROGRAM = next(x for x in vars(Tacotron2) if x.startswith("mel_spec"))
# CommonLanguage's name.
LANGUAGE = changed(ECAPA, ("mean_var_norm", "mean_var_norm_input"))
# Features by a function, which is not among the modules.
MEL = changed(
    ECAPA,
    ("    compute_features: !ref <compute_features>\n", ""),
    (
        "compute_features: !new:speechbrain.lobes.features.Fbank\n"
        "    n_mels: !ref <n_mels>\n"
        "    left_frames: !ref <left_frames>\n"
        "    right_frames: !ref <right_frames>\n"
        "    deltas: !ref <deltas>\n",
        "use_tacotron2_mel_spec: True\n"
        "compute_features: !name:speechbrain.lobes.models.Tacotron2."
        f"{MEL_SPECTROGRAM}\n"
        "    sample_rate: !ref <sample_rate>\n"
        "    hop_length: 256\n"
        "    win_length: 1024\n"
        "    n_fft: 1024\n"
        "    n_mels: !ref <n_mels>\n"
        "    f_min: 0.0\n"
        "    f_max: 8000.0\n"
        "    power: 1\n"
        "    normalized: False\n"
        "    norm: slaney\n"
        "    mel_scale: slaney\n"
        "    compression: True\n",
    ),
)
# Those of the Speech Commands.
SOFTMAX = changed(
    XVECTOR,
    ("modules:\n", "modules:\n    softmax: !ref <softmax>\n"),
    (
        "compute_cost:",
        "softmax: !new:speechbrain.nnet.activations.Softmax\n"
        # Twice the logarithm would be the same as once.
        "    apply_log: False\n\ncompute_cost:",
    ),
)
LEAF = changed(
    SOFTMAX,
    (
        "features.Fbank\n    n_mels: !ref <n_mels>\n"
        "    left_frames: !ref <left_frames>\n"
        "    right_frames: !ref <right_frames>\n"
        "    deltas: !ref <deltas>\n",
        "features.Leaf\n    out_channels: !ref <n_mels>\n"
        "    in_channels: 1\n    min_freq: 0.0\n    n_fft: 400\n"
        "    use_legacy_complex: True\n",
    ),
)


def features(step, wavs, lens):
    """Of each recipe, from the modules of the step."""
    norm = step.get_submodule(
        "mean_var_norm_input"
        if hasattr(step, "mean_var_norm_input")
        else "mean_var_norm"
    )
    if "compute_features" in step._functions:
        mel = step._functions["compute_features"](audio=wavs)
        return norm(mel.transpose(1, 2), lens)
    if type(step.compute_features).__name__ == "Leaf":
        return step.compute_features(norm(wavs, lens))
    return norm(step.compute_features(wavs), lens)


@pytest.mark.parametrize(
    "text",
    [LANGUAGE, MEL, SOFTMAX, LEAF],
    ids=["language", "mel", "softmax", "leaf"],
)
def test_the_loss_is_the_scripts(text, tmp_path):
    path = tmp_path / "train.yaml"
    path.write_text(text.replace("wav_augment:", "other:"))
    recipe = read_recipe(path)
    assert recipe.family == "speaker"
    torch.manual_seed(0)
    step = recipe.build()
    wavs, lens, labels = step.batch(3, 0.5)
    # The pooling of x-vectors adds noise.
    torch.manual_seed(1)
    loss = step(wavs, lens, labels)
    loss.backward()
    assert all(p.grad is not None for p in step.parameters())
    torch.manual_seed(1)
    outputs = step.classifier(step.embedding_model(features(step, wavs, lens)))
    if hasattr(step, "softmax"):
        outputs = step.softmax(outputs)
    expected = step._functions["compute_cost"](outputs, labels)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("text", [MEL, LEAF], ids=["mel", "leaf"])
def test_features_on_fake_tensors(text, tmp_path):
    """Functions that read values, or learn."""
    path = tmp_path / "train.yaml"
    path.write_text(text)
    found = profile(read_recipe(path), 2, 0.5)
    assert found.rows == 10
    learned = "compute_features" in {x for x, _ in found.memory.split}
    assert learned == (text is LEAF)


def test_16_kilohertz_are_assumed(tmp_path, caplog):
    path = tmp_path / "train.yaml"
    path.write_text(changed(ECAPA, ("sample_rate: 16000\n", "")))
    step = read_recipe(path).build()
    assert step.batch(2, 0.5)[0].shape == (2, 8000)
    assert f"{path} has no sample_rate: 16000 Hz are assumed." in caplog.text


def test_a_length_that_is_missing_is_an_option(tmp_path):
    path = tmp_path / "train.yaml"
    path.write_text(changed(ECAPA, ("sentence_len: 3.0\n", "")))
    recipe = read_recipe(path)
    with pytest.raises(ValueError, match="no number sentence_len.*--seconds"):
        recipe.default_batch()
    assert recipe.default_batch(0.5) == (32, 0.5)


def test_features_that_are_missing(tmp_path):
    path = tmp_path / "train.yaml"
    path.write_text(changed(MEL, ("\ncompute_features:", "\nothers:")))
    with pytest.raises(ValueError, match="not those of a known family"):
        read_recipe(path)
