"""Networks as ONNX and TorchScript, against themselves.

Authors
 * The sb_memeff authors 2026
"""

import importlib.util

import onnx
import onnxruntime
import pytest
import torch

from sb_memeff.export.standalone import export_onnx, trace
from sb_memeff.lobes.models.DFResNet import DFResNet
from sb_memeff.lobes.models.RecomputedECAPA_TDNN import ECAPA_TDNN
from sb_memeff.lobes.models.RevDFResNet import RevDFResNet
from sb_memeff.lobes.models.RevECAPA_TDNN import RevECAPA_TDNN
from sb_memeff.lobes.models.RevResNet import RevResNet
from sb_memeff.lobes.models.WeSpeakerResNet import ResNet
from tests.unittests.weights import without_zeros

MELS = 20
# Odd and even numbers of frames, of frames after one stride and after two.
SIZES = [(1, 101), (3, 64), (2, 50), (4, 27), (1, 16)]
ECAPA = {
    "channels": [16, 16, 16, 24],
    "kernel_sizes": [5, 3, 3, 1],
    "dilations": [1, 2, 3, 1],
    "groups": [1, 1, 1, 1],
    "attention_channels": 8,
    "se_channels": 8,
    "res2net_scale": 4,
    "lin_neurons": 12,
}
BLOCKS = {"block_sizes": [1, 2, 1, 1]}
INVERTIBLE = {**BLOCKS, "downsampling": "invertible"}
NETWORKS = {
    "ResNet": (ResNet, "ResNet34", BLOCKS),
    "RevResNet-I": (RevResNet, "RevNet34", BLOCKS),
    "RevResNet-II": (RevResNet, "RevNet34", INVERTIBLE),
    "DFResNet": (DFResNet, "GeminiDFResNet60", BLOCKS),
    "RevDFResNet-I": (RevDFResNet, "GeminiDFRevNet60", BLOCKS),
    "RevDFResNet-II": (RevDFResNet, "DFRevNet56", INVERTIBLE),
    "ECAPA_TDNN": (ECAPA_TDNN, None, ECAPA),
    "RevECAPA_TDNN": (RevECAPA_TDNN, None, ECAPA),
}
REVERSIBLE = [name for name in NETWORKS if name.startswith("Rev")]


def features(size, frames):
    """Utterances that differ from each other, as those of speakers do."""
    timbre = 3 * torch.randn(size, 1, MELS) + torch.randn(size, 1, 1)
    loudness = 2 * torch.rand(size, frames, 1)
    return timbre + loudness * torch.randn(size, frames, MELS)


def lengths_of(size):
    return torch.linspace(1, 0.45, size)


def build(name):
    """A network whose every weight and running statistic counts."""
    torch.manual_seed(0)
    cls, preset, options = NETWORKS[name]
    if preset is None:
        net = cls(MELS, **options)
    else:
        net = cls.from_preset(
            preset, base_channels=4, input_size=MELS, **options
        )
    with torch.no_grad():
        without_zeros(net, std=0.2)
        for _ in range(6):
            net(features(16, 24))
    return net


def run(path, *inputs):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options)
    names = [given.name for given in session.get_inputs()]
    for each in inputs:
        values = [x.numpy() for x in each]
        yield torch.from_numpy(
            session.run(["embeddings"], dict(zip(names, values, strict=True)))[
                0
            ]
        )


def largest_error(path, net, with_lengths):
    """Of onnxruntime, over batches of all sizes."""
    export_onnx(net, path, MELS, with_lengths)
    inputs = [(features(*size), lengths_of(size[0])) for size in SIZES]
    if not with_lengths:
        inputs = [each[:1] for each in inputs]
    net.eval()
    errors = []
    for each, found in zip(inputs, run(path, *inputs), strict=True):
        with torch.no_grad():
            expected = net(*each)
        assert found.shape == expected.shape
        assert expected.abs().max() > 0.25
        errors.append((found - expected).abs().max().item())
    return max(errors)


@pytest.mark.parametrize(
    ("name", "with_lengths"),
    [(name, True) for name in NETWORKS]
    + [(name, False) for name in ("RevResNet-II", "ResNet", "RevECAPA_TDNN")],
)
def test_onnxruntime_gives_the_same(name, with_lengths, tmp_path):
    net = build(name)
    if name in REVERSIBLE:
        net.trunk.exact = False
    assert largest_error(tmp_path / "net.onnx", net, with_lengths) < 1e-4


@pytest.mark.parametrize("name", ["RevResNet-I", "RevECAPA_TDNN"])
def test_the_grid_is_exported_too(name, tmp_path):
    # Two programs round a few values to different points of the grid. That
    # is less than no grid would change, but can be more than 1e-4 where
    # untrained embeddings hang on small differences.
    path = tmp_path / "net.onnx"
    net = build(name)
    assert largest_error(path, net, with_lengths=True) < 2e-3
    # Two streams at the entrance, two increments for each coupling.
    nodes = onnx.load(path).graph.node
    assert sum(node.op_type == "Round" for node in nodes) >= 6


@pytest.mark.parametrize("name", ["RevResNet-II", "ECAPA_TDNN"])
def test_torchscript_gives_the_same(name, tmp_path):
    net = build(name)
    trace(net, MELS, with_lengths=True).save(tmp_path / "net.pt")
    loaded = torch.jit.load(tmp_path / "net.pt")
    net.eval()
    for size in SIZES:
        x, lengths = features(*size), lengths_of(size[0])
        with torch.no_grad():
            expected = net(x, lengths)
            found = loaded(x, lengths)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["RevResNet-II", "ECAPA_TDNN"])
def test_export_does_not_change_the_network(name, tmp_path):
    net = build(name)
    first = next(net.children()).eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    export_onnx(net, tmp_path / "net.onnx", MELS)
    trace(net, MELS)
    assert net.training and not first.training and net.save_memory
    after = net.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[k], before[k]) for k in before)


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ImportError, match="pip install onnx"):
        export_onnx(torch.nn.Linear(2, 2), tmp_path / "net.onnx", 2)
    assert not (tmp_path / "net.onnx").exists()
