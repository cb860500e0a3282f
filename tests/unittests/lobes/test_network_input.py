"""Check the features that a network is called with."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sb_memeff.lobes.models.RevResNet import RevResNet
from sb_memeff.lobes.models.WeSpeakerResNet import ResNet
from sb_memeff.lobes.network_input import check_features, for_tensor_cores

HALF = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("shape", [(2, 5), (2, 5, 7), (2, 1, 5, 8), (8,)])
def test_shapes_that_do_not_fit(shape):
    with pytest.raises(ValueError, match=r"\[N, T, 8\], got .*input_size"):
        check_features(torch.rand(shape), 8, torch.float32)
    check_features(torch.rand(2, 5, 8), 8, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_autocast_converts(dtype):
    x = torch.rand(2, 5, 8, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        check_features(x, 8, torch.float32)
        for wrong in (x.double(), x.long()):
            with pytest.raises(
                TypeError, match=f"{wrong.dtype}.*torch.float32"
            ):
                check_features(wrong, 8, torch.float32)
        with pytest.raises(TypeError, match="weights torch.float64"):
            check_features(torch.rand(2, 5, 8), 8, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.long, *HALF])
def test_without_autocast_dtypes_are_equal(dtype):
    x = torch.zeros(2, 5, 8, dtype=dtype)
    check_features(x, 8, dtype)
    with pytest.raises(TypeError, match=rf"net.to\({dtype}\)"):
        check_features(x, 8, torch.float32)


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF])
def test_channels_are_last_in_half_precision_on_a_gpu(kind, dtype):
    with FakeTensorMode():
        x = torch.empty(2, 3, 4, 5, device=kind, dtype=dtype)
        y = for_tensor_cores(x)
    last = kind == "cuda" and dtype in HALF
    assert y.is_contiguous(memory_format=torch.channels_last) == last
    assert last or y is x


@pytest.mark.parametrize(
    "network, module", [(ResNet, "residual"), (RevResNet, "reversible_blocks")]
)
def test_layers_keep_channels_last(monkeypatch, network, module):
    """A convolution that gets another format would transpose."""
    monkeypatch.setattr(
        f"sb_memeff.lobes.{module}.for_tensor_cores",
        lambda x: x.contiguous(memory_format=torch.channels_last),
    )
    options = {"base_channels": 8}
    if network is RevResNet:
        options |= {"downsampling": "invertible", "save_memory": False}
    torch.manual_seed(0)
    net = network.from_preset(next(iter(network.PRESETS)), **options)
    formats = {}

    def note(name):
        def hook(conv, inputs, output):
            formats[name] = output.is_contiguous(
                memory_format=torch.channels_last
            )

        return hook

    for name, conv in net.named_modules():
        if isinstance(conv, torch.nn.Conv2d) and conv.in_channels > 1:
            conv.register_forward_hook(note(name))
    net(torch.randn(2, 24, 80)).sum().backward()
    assert len(formats) > 30 and all(formats.values())
