"""WeSpeaker's published weights.

Authors
 * The sb_memeff authors 2026
"""

import pytest
import soundfile
import torch
import torch.nn.functional as F
from speechbrain.inference.speaker import SpeakerRecognition
from torchaudio.compliance import kaldi

from sb_memeff.export.wespeaker import (
    convert_wespeaker,
    convert_wespeaker_state,
)
from sb_memeff.lobes.models.WeSpeakerResNet import ResNet
from tests.unittests.utils.test_malicious_files import write

BLOCKS = {"ResNet34": [3, 4, 6, 3], "ResNet101": [3, 4, 23, 3]}
MELS = 16


def published(preset, width):
    """Random weights with WeSpeaker's names and shapes."""
    torch.manual_seed(0)
    expansion = 1 if preset == "ResNet34" else 4
    state = {}

    def convolution(name, norm, inputs, outputs, kernel):
        fan = inputs * kernel**2
        weight = torch.randn(outputs, inputs, kernel, kernel)
        state[f"{name}.weight"] = weight * (2 / fan) ** 0.5
        state[f"{norm}.weight"] = 0.5 + torch.rand(outputs)
        state[f"{norm}.bias"] = 0.1 * torch.randn(outputs)
        state[f"{norm}.running_mean"] = 0.1 * torch.randn(outputs)
        state[f"{norm}.running_var"] = 0.5 + torch.rand(outputs)
        state[f"{norm}.num_batches_tracked"] = torch.tensor(7)

    convolution("conv1", "bn1", 1, width, 3)
    inputs = width
    for stage, blocks in enumerate(BLOCKS[preset]):
        planes = width * 2**stage
        for block in range(blocks):
            here = f"layer{stage + 1}.{block}"
            sizes = [(inputs, planes, 3), (planes, planes, 3)]
            if expansion == 4:
                sizes = [
                    (inputs, planes, 1),
                    (planes, planes, 3),
                    (planes, 4 * planes, 1),
                ]
            for n, size in enumerate(sizes, start=1):
                convolution(f"{here}.conv{n}", f"{here}.bn{n}", *size)
            if block == 0 and (stage or expansion > 1):
                convolution(
                    f"{here}.shortcut.0",
                    f"{here}.shortcut.1",
                    inputs,
                    planes * expansion,
                    1,
                )
            inputs = planes * expansion
    pooled = 2 * inputs * (MELS // 8)
    state["seg_1.weight"] = torch.randn(12, pooled) / pooled**0.5
    state["seg_1.bias"] = torch.randn(12)
    state["projection.weight"] = torch.randn(5, 12)
    return state


def reference(state, feats):
    """WeSpeaker's network, from the names and shapes of its weights."""

    def norm(x, name):
        return F.batch_norm(
            x,
            state[f"{name}.running_mean"],
            state[f"{name}.running_var"],
            state[f"{name}.weight"],
            state[f"{name}.bias"],
        )

    def convolve(x, name, stride=1):
        weight = state[f"{name}.weight"]
        return F.conv2d(x, weight, None, stride, weight.shape[-1] // 2)

    # Images [N, 1, F, T].
    x = feats.transpose(1, 2)[:, None]
    x = norm(convolve(x, "conv1"), "bn1").relu()
    names = [n[: -len(".conv1.weight")] for n in state if "conv1.w" in n][1:]
    for name in names:
        stride = 2 if name.endswith(".0") and name != "layer1.0" else 1
        deep = f"{name}.conv3.weight" in state
        # The 3x3 convolution has the stride: of two the first, of three the
        # second.
        y = convolve(x, f"{name}.conv1", 1 if deep else stride)
        y = norm(y, f"{name}.bn1").relu()
        y = convolve(y, f"{name}.conv2", stride if deep else 1)
        y = norm(y, f"{name}.bn2")
        if deep:
            y = norm(convolve(y.relu(), f"{name}.conv3"), f"{name}.bn3")
        if f"{name}.shortcut.0.weight" in state:
            x = convolve(x, f"{name}.shortcut.0", stride)
            x = norm(x, f"{name}.shortcut.1")
        x = (y + x).relu()
    mean, std = x.mean(3), (x.var(3) + 1e-7).sqrt()
    stats = torch.cat([mean.flatten(1), std.flatten(1)], 1)
    return F.linear(stats, state["seg_1.weight"], state["seg_1.bias"])


@pytest.mark.parametrize("preset", list(BLOCKS))
def test_converted_network_is_wespeakers(preset):
    weights = published(preset, width=4)
    network = ResNet.from_preset(
        preset,
        base_channels=4,
        input_size=MELS,
        lin_neurons=12,
        published_head=True,
    )
    network.load_state_dict(convert_wespeaker_state(weights))
    feats = torch.randn(2, 50, MELS)
    expected = reference(weights, feats)
    with torch.no_grad():
        found = network.eval()(feats)
        # Padding does not count.
        padded = torch.cat([feats, torch.full((2, 14, MELS), torch.nan)], 1)
        again = network(padded, torch.full((2,), 50 / 64))
    scale = expected.abs().max()
    assert (found - expected).abs().max() < 1e-5 * scale
    assert (again - expected).abs().max() < 1e-5 * scale


def test_folder_for_speechbrain(tmp_path):
    """From the file of an utterance to WeSpeaker's embedding."""
    weights = published("ResNet34", width=32)
    torch.save(weights, tmp_path / "avg_model.pt")
    folder = tmp_path / "resnet34"
    convert_wespeaker(tmp_path / "avg_model.pt", folder, "ResNet34")
    model = SpeakerRecognition.from_hparams(source=str(folder), savedir=None)
    torch.manual_seed(1)
    wav = (0.1 * torch.randn(8000)).clamp(-1, 1)
    soundfile.write(tmp_path / "a.wav", wav.numpy(), 16000, subtype="FLOAT")
    audio = model.load_audio(str(tmp_path / "a.wav"))
    found = model.encode_batch(audio[None])
    feats = kaldi.fbank(
        wav[None] * 2**15,
        num_mel_bins=MELS,
        frame_length=25,
        frame_shift=10,
        sample_frequency=16000,
        window_type="hamming",
    )
    feats = feats - feats.mean(0)
    expected = reference(weights, feats[None])
    similarity = torch.cosine_similarity(found.reshape(1, -1), expected)
    assert similarity.item() > 1 - 1e-5


def test_other_networks(tmp_path):
    weights = published("ResNet34", width=8)
    torch.save(weights, tmp_path / "x.pt")
    with pytest.raises(
        ValueError, match=r"ResNet34, .* 8 channels .* \[3, 4, 6"
    ):
        convert_wespeaker(tmp_path / "x.pt", tmp_path / "y", "ResNet34")
    assert not (tmp_path / "y").exists()
    with pytest.raises(ValueError, match="have pool.linear1.weight: only"):
        convert_wespeaker_state({"pool.linear1.weight": torch.ones(1)})


def test_a_file_that_runs_code_is_not_loaded(tmp_path):
    marker, path = tmp_path / "marker", tmp_path / "avg_model.pt"
    write(path, marker)
    with pytest.raises(Exception, match="[Ww]eights.only"):
        convert_wespeaker(path, tmp_path / "out", "ResNet34")
    assert not marker.exists()
