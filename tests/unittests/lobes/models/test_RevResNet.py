"""The reversible networks."""

import copy

import pytest
import torch
from hyperpyyaml import load_hyperpyyaml
from speechbrain.lobes.models.ResNet import ResNet as SpeechBrainResNet
from torch import nn

from sb_memeff.lobes.models.ResNet import ResNet
from sb_memeff.lobes.models.RevResNet import RevResNet
from sb_memeff.nnet.reversible import check_invertible
from sb_memeff.utils.memory import training_step_memory

KINDS = ["strided", "invertible"]


def small(name, downsampling):
    torch.manual_seed(0)
    return RevResNet.from_preset(
        name, downsampling=downsampling, base_channels=4, input_size=20
    )


def batch(dtype=torch.float32):
    torch.manual_seed(1)
    # Odd sizes at every stage, and utterances of odd lengths.
    return torch.randn(3, 21, 20, dtype=dtype), torch.tensor([21, 13, 7]) / 21


@pytest.mark.parametrize("downsampling", KINDS)
@pytest.mark.parametrize("name", RevResNet.PRESETS)
def test_parameters_within_5_percent_of_the_vanilla_network(name, downsampling):
    with torch.device("meta"):
        vanilla = ResNet.from_preset(name.replace("Rev", "Res"))
        ours = RevResNet.from_preset(name, downsampling=downsampling)
    counts = [sum(p.numel() for p in m.parameters()) for m in (vanilla, ours)]
    assert counts[1] == pytest.approx(counts[0], rel=0.05)


@pytest.mark.parametrize("downsampling", KINDS)
@pytest.mark.parametrize("name", RevResNet.PRESETS)
def test_float64_gradients_equal_stored_ones(name, downsampling):
    feats, lengths = batch(torch.float64)
    net = small(name, downsampling).double()
    assert check_invertible(net, feats, lengths).gradient_error < 1e-9


@pytest.mark.parametrize("downsampling", KINDS)
@pytest.mark.parametrize("name", RevResNet.PRESETS)
def test_exact_under_bf16_autocast(name, downsampling):
    feats, lengths = batch()
    net = small(name, downsampling)
    with torch.autocast("cpu", torch.bfloat16):
        report = check_invertible(net, feats, lengths)
    assert report.inversion_error == 0.0
    assert report.gradient_error < 1e-6


@pytest.mark.parametrize("downsampling", KINDS)
@pytest.mark.parametrize("name", ["RevNet34", "RevNet101"])
def test_state_dict_after_a_step_is_that_of_the_stored_network(
    name, downsampling
):
    feats, lengths = batch(torch.float64)
    net = small(name, downsampling).double()
    twin = copy.deepcopy(net)
    twin.save_memory = False
    for module in (net, twin):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
        module(feats, lengths).square().sum().backward()
        optimizer.step()
    for key, value in twin.state_dict().items():
        ours = net.state_dict()[key]
        torch.testing.assert_close(ours, value, rtol=1e-9, atol=1e-12)
    counts = {int(v) for k, v in net.state_dict().items() if "num_batches" in k}
    assert counts == {1}


@pytest.mark.parametrize("downsampling", KINDS)
@pytest.mark.parametrize("name", ["RevNet34", "RevNet101"])
def test_padding_changes_no_embedding(name, downsampling):
    net = small(name, downsampling).double()
    feats, lengths = batch(torch.float64)
    net(feats, lengths)  # running statistics that matter
    net.eval()
    together = net(feats, lengths)
    for row, n in enumerate((21, 13, 7)):
        alone = net(feats[row : row + 1, :n])
        torch.testing.assert_close(together[row : row + 1], alone)


@pytest.mark.parametrize("downsampling", KINDS)
def test_called_like_speechbrains(downsampling):
    channels = [8, 8, 16, 16] if downsampling == "strided" else None
    channels = channels or [4, 16, 64, 256]
    options = dict(
        input_size=40,
        channels=channels,
        block_sizes=[2, 2, 2, 2],
        strides=[1, 2, 2, 2],
        lin_neurons=12,
        activation=nn.ReLU,
    )
    feats = torch.rand(2, 30, 40)
    lengths = torch.tensor([1.0, 0.5])
    for net in (
        SpeechBrainResNet(**options),
        RevResNet(downsampling=downsampling, **options),
    ):
        assert net(feats).shape == (2, 12)
        assert net(feats, lengths).shape == (2, 12)


@pytest.mark.parametrize("strides", [[2, 1, 2, 2], [1, 1, 1, 1], [2, 2, 2, 3]])
@pytest.mark.parametrize("downsampling", KINDS)
def test_other_strides(strides, downsampling):
    channels = [8, 8, 16, 16]
    if downsampling == "invertible":
        channels = [4]
        for stride in strides[1:]:
            channels.append(channels[-1] * stride**2)
    net = RevResNet(
        input_size=20,
        channels=channels,
        block_sizes=[1, 2, 2, 1],
        strides=strides,
        inner_channels=[4, 4, 4, 4],
        downsampling=downsampling,
    ).double()
    feats, lengths = batch(torch.float64)
    assert check_invertible(net, feats, lengths).gradient_error < 1e-9
    net.eval()
    alone = net(feats[1:2, :13])
    torch.testing.assert_close(net(feats, lengths)[1:2], alone)


def test_from_yaml():
    """One key chooses the preset, one the type; references are shared."""
    hparams = load_hyperpyyaml(
        """
        preset: RevNet34
        downsampling: invertible
        by_name: !apply:sb_memeff.lobes.models.RevResNet.RevResNet.from_preset
            name: !ref <preset>
            downsampling: !ref <downsampling>
            base_channels: 4
        modules:
            embedding_model: !ref <by_name>
        by_hand: !new:sb_memeff.lobes.models.RevResNet.RevResNet
            input_size: 80
            channels: [8, 8, 16, 16]
            block_sizes: [1, 1, 1, 1]
            lin_neurons: 12
        """
    )
    assert hparams["modules"]["embedding_model"] is hparams["by_name"]
    assert hparams["by_name"](torch.rand(2, 16, 80)).shape == (2, 256)
    assert hparams["by_hand"](torch.rand(2, 16, 80)).shape == (2, 12)


def test_save_memory_is_one_switch():
    net = small("RevNet34", "strided")
    assert net.save_memory
    net.save_memory = False
    assert not net.trunk.save_memory


@pytest.mark.parametrize("downsampling", KINDS)
def test_peak_memory_does_not_grow_with_depth(downsampling):
    """RevNet293 needs what RevNet101 needs, but for its parameters."""

    def activations(name):
        memory = training_step_memory(
            lambda: RevResNet.from_preset(name, downsampling=downsampling),
            (16, 200, 80),
        )
        return memory.activation_bytes

    shallow = activations("RevNet101")
    assert activations("RevNet293") < 1.01 * shallow


def test_stored_stages_are_freed_when_backward_is_done_with_them():
    """The peak is in stage 1; what stages 2 to 4 stored is gone by then."""
    memory = training_step_memory(
        lambda: RevResNet.from_preset("RevNet101"), (16, 200, 80)
    )
    state = 4 * 16 * 128 * 200 * 80
    # 5.0 of them; 6.1 if the stages were kept.
    assert memory.activation_bytes < 5.3 * state


@pytest.mark.parametrize("downsampling", KINDS)
def test_memory_of_the_deepest_network_against_the_vanilla_one(downsampling):
    """The paper's headline is 16.2 times less in total."""
    shape = (64, 200, 80)
    vanilla = training_step_memory(
        lambda: ResNet.from_preset("ResNet293"), shape
    )
    ours = training_step_memory(
        lambda: RevResNet.from_preset("RevNet293", downsampling=downsampling),
        shape,
    )
    assert vanilla.peak_bytes > 16.2 * ours.peak_bytes


def test_errors():
    with pytest.raises(ValueError, match="RevNet18.*RevNet34, RevNet101"):
        RevResNet.from_preset("RevNet18")
    with pytest.raises(ValueError, match="'strided'.*got 'haar'"):
        RevResNet.from_preset("RevNet34", downsampling="haar")
    with pytest.raises(ValueError, match="base_channels=3.*multiple of 2"):
        RevResNet.from_preset(
            "RevNet34", base_channels=3, downsampling="invertible"
        )
    with pytest.raises(ValueError, match=r"even, got \[7, 8, 8, 8\]"):
        RevResNet(channels=[7, 8, 8, 8])
    with pytest.raises(ValueError, match=r"channels=\[8, 32, 128, 512\]"):
        RevResNet(channels=[8, 8, 16, 16], downsampling="invertible")
    with pytest.raises(ValueError, match=r"strides.*four"):
        RevResNet(strides=[1, 2])
