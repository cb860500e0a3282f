"""Reversible ResNets: what test_lobe_contract.py does not know of them."""

import pytest
import torch
from hyperpyyaml import load_hyperpyyaml
from torch import nn

from sb_memeff.lobes.models.RevResNet import RevResNet, StridedCoupling
from sb_memeff.lobes.models.WeSpeakerResNet import ResNet
from sb_memeff.lobes.residual import stride_pairs
from sb_memeff.memory.step import training_step_memory
from sb_memeff.nnet.padding import mask, padding_masks
from sb_memeff.nnet.reversible import check_invertible
from tests.unittests.one_analysis import one_analysis  # noqa: F401
from tests.unittests.weights import without_zeros

pytestmark = pytest.mark.usefixtures("one_analysis")

KINDS = ["strided", "invertible"]


def batch(dtype=torch.float32):
    torch.manual_seed(1)
    # Odd sizes at every stage, and utterances of odd lengths.
    return torch.randn(3, 21, 20, dtype=dtype), torch.tensor([21, 13, 7]) / 21


@pytest.mark.parametrize(
    "strides",
    [
        [2, 1, 2, 2],
        [1, 1, 1, 1],
        [2, 2, 2, 3],
        [[1, 2], [2, 2], [1, 2], [3, 1]],
    ],
)
@pytest.mark.parametrize("downsampling", KINDS)
def test_other_strides(strides, downsampling):
    channels = [8, 8, 16, 16]
    if downsampling == "invertible":
        channels = [4]
        for time, frequency in stride_pairs(strides[1:]):
            channels.append(channels[-1] * time * frequency)
    torch.manual_seed(0)
    net = RevResNet(
        input_size=20,
        channels=channels,
        block_sizes=[1, 2, 2, 1],
        strides=strides,
        inner_channels=[4, 4, 4, 4],
        downsampling=downsampling,
    )
    net = without_zeros(net).double()
    feats, lengths = batch(torch.float64)
    assert check_invertible(net, feats, lengths).gradient_error < 1e-9
    net.eval()
    alone = net(feats[1:2, :13])
    torch.testing.assert_close(net(feats, lengths)[1:2], alone)


@pytest.mark.parametrize("block, share", [("basic", 1), ("bottleneck", 4)])
def test_inner_channels_are_a_share_of_those_of_a_stream(block, share):
    shapes = []
    channels = [16, 16, 32, 64]
    for options in (
        {},
        {"inner_channels": [c // 2 // share for c in channels]},
    ):
        net = RevResNet(
            channels=channels, block_sizes=[2, 1, 1, 1], block=block, **options
        )
        shapes.append({k: v.shape for k, v in net.state_dict().items()})
    assert shapes[0] == shapes[1]


def test_a_transition_leaves_padded_frames_zero():
    """Else the batch norms behind it would count what its own norms add."""
    torch.manual_seed(0)
    transition = StridedCoupling("basic", 4, 4, 6, stride=2, stage=1)
    for norm in (transition.p[0], transition.q[0]):
        nn.init.normal_(norm.bias)
    masks = padding_masks(
        torch.tensor([1.0, 0.5]), torch.rand(2, 12, 8), [1, 2]
    )
    streams = [mask(torch.randn(2, 4, 12, 8), masks[0]) for _ in range(2)]
    for y in transition(streams, masks):
        assert y.shape == (2, 6, 6, 4)
        assert y[0].all() and y[1, :, :3].all() and not y[1, :, 3:].any()


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


def test_stored_stages_are_freed_when_backward_is_done_with_them():
    """The peak is in stage 1; what stages 2 to 4 stored is gone by then."""
    memory = training_step_memory(
        lambda: RevResNet.from_preset("RevNet101"), (16, 200, 80)
    )
    state = 4 * 16 * 128 * 200 * 80
    # 5.0 of them; 6.1 if the stages were kept.
    assert memory.activation_bytes < 5.3 * state


def test_memory_against_the_vanilla_network():
    """The paper's headline, for RevNet293, is 16.2 times less."""
    shape = (64, 200, 80)
    vanilla = training_step_memory(
        lambda: ResNet.from_preset("ResNet101"), shape
    )
    # Type I, which takes more than Type II.
    ours = training_step_memory(
        lambda: RevResNet.from_preset("RevNet101", downsampling="strided"),
        shape,
    )
    assert vanilla.peak_bytes > 9.6 * ours.peak_bytes


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
    with pytest.raises(ValueError, match=r"inner_channels.*four.*\[4\]"):
        RevResNet(inner_channels=[4])
