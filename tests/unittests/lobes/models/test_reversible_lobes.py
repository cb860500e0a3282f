"""What every reversible lobe promises, for every preset and both types."""

import pytest
import torch
from speechbrain.lobes.models.ResNet import ResNet as SpeechBrainResNet
from torch import nn

from sb_memeff.lobes.models.DFResNet import DFResNet
from sb_memeff.lobes.models.ResNet import ResNet
from sb_memeff.lobes.models.RevDFResNet import RevDFResNet
from sb_memeff.lobes.models.RevResNet import RevResNet, StridedCoupling
from sb_memeff.nnet.reversible import AdditiveCoupling, check_invertible
from sb_memeff.utils.memory import training_step_memory
from tests.unittests.weights import without_zeros

# Each with the vanilla class whose place it takes.
LOBES = {RevResNet: ResNet, RevDFResNet: DFResNet}
KINDS = ["strided", "invertible"]
PRESETS = [(lobe, name) for lobe in LOBES for name in lobe.PRESETS]
# One of each kind of block and of strides.
SHALLOW = [
    (RevResNet, "RevNet34"),
    (RevResNet, "RevNet101"),
    (RevDFResNet, "DFRevNet56"),
    (RevDFResNet, "GeminiDFRevNet60"),
]

each_kind = pytest.mark.parametrize("downsampling", KINDS)
each_preset = pytest.mark.parametrize(
    "lobe, name", PRESETS, ids=[name for _, name in PRESETS]
)
each_shallow_preset = pytest.mark.parametrize(
    "lobe, name", SHALLOW, ids=[name for _, name in SHALLOW]
)


def small(lobe, name, downsampling):
    """A narrow network."""
    torch.manual_seed(0)
    return lobe.from_preset(
        name, downsampling=downsampling, base_channels=4, input_size=20
    )


def batch(dtype=torch.float32):
    torch.manual_seed(1)
    # Odd sizes at every stage, and utterances of odd lengths.
    return torch.randn(3, 21, 20, dtype=dtype), torch.tensor([21, 13, 7]) / 21


def channels_of(coupling):
    """Channels of both streams together."""
    norms = (m for m in coupling.f.modules() if isinstance(m, nn.BatchNorm2d))
    return 2 * next(norms).num_features


@each_kind
@each_shallow_preset
def test_every_coupling_begins_as_the_identity(lobe, name, downsampling):
    """As the vanilla blocks begin as their shortcuts."""
    net = small(lobe, name, downsampling)
    couplings = 0
    for block in net.trunk.blocks:
        if isinstance(block, AdditiveCoupling):
            x = torch.randn(2, channels_of(block), 6, 6)
            assert torch.equal(block(x), x)
            couplings += 1
        elif isinstance(block, StridedCoupling):
            x1, x2 = torch.randn(2, 2, channels_of(block) // 2, 6, 6)
            y1, y2 = block((x1, x2))
            time, frequency = block.stride
            assert torch.equal(y1, block.p(x1[..., ::time, ::frequency]))
            assert torch.equal(y2, block.q(x2[..., ::time, ::frequency]))
            couplings += 1
    assert couplings == sum(lobe.PRESETS[name]["block_sizes"])


@each_kind
@each_preset
def test_parameters_within_5_percent_of_the_vanilla_network(
    lobe, name, downsampling
):
    with torch.device("meta"):
        vanilla = LOBES[lobe].from_preset(name.replace("RevNet", "ResNet"))
        ours = lobe.from_preset(name, downsampling=downsampling)
    counts = [sum(p.numel() for p in m.parameters()) for m in (vanilla, ours)]
    assert counts[1] == pytest.approx(counts[0], rel=0.05)


def training_step(net, start, dtype, autocast):
    """Gradients, and the state_dict after a step from the state ``start``."""
    net.load_state_dict(start)
    net.zero_grad()
    feats, lengths = batch(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        embeddings = net(feats, lengths)
    # Not a sum of squares: the embeddings are normalised, it is constant.
    weight = torch.randn(embeddings.shape, dtype=dtype)
    (embeddings * weight).sum().backward()
    # What gets no gradient is not compared.
    assert all(p.grad.any() for p in net.parameters())
    gradient = torch.cat([p.grad.flatten() for p in net.parameters()])
    # Batch norms of three utterances and many layers: gradients are large.
    nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    torch.optim.SGD(net.parameters(), lr=0.01).step()
    state = {key: value.clone() for key, value in net.state_dict().items()}
    return gradient.double(), state


@pytest.mark.parametrize("precision", ["float64", "bfloat16"])
@each_kind
@each_preset
def test_a_step_is_that_of_the_network_that_stores(
    lobe, name, downsampling, precision
):
    """Same gradients, weights and running statistics, which count once."""
    exact = precision == "float64"
    dtype = torch.float64 if exact else torch.float32
    net = without_zeros(small(lobe, name, downsampling)).to(dtype)
    start = {key: value.clone() for key, value in net.state_dict().items()}
    found = []
    for save_memory in (False, True):
        net.save_memory = save_memory
        found.append(training_step(net, start, dtype, autocast=not exact))
    (reference, expected), (ours, state) = found
    error = (ours - reference).norm() / reference.norm()
    assert error < (1e-9 if exact else 1e-6)
    rtol, atol = (1e-9, 1e-12) if exact else (1e-5, 1e-7)
    for key, value in expected.items():
        torch.testing.assert_close(state[key], value, rtol=rtol, atol=atol)
        assert "num_batches" not in key or state[key] == start[key] + 1


@each_kind
@each_shallow_preset
def test_inversion_is_exact_under_bf16_autocast(lobe, name, downsampling):
    feats, lengths = batch()
    net = without_zeros(small(lobe, name, downsampling))
    with torch.autocast("cpu", torch.bfloat16):
        report = check_invertible(net, feats, lengths)
    assert report.inversion_error == 0.0
    assert report.gradient_error < 1e-6


@each_kind
@each_shallow_preset
def test_padding_changes_no_embedding(lobe, name, downsampling):
    net = without_zeros(small(lobe, name, downsampling)).double()
    feats, lengths = batch(torch.float64)
    net(feats, lengths)  # running statistics that matter
    net.eval()
    together = net(feats, lengths)
    for row, n in enumerate((21, 13, 7)):
        alone = net(feats[row : row + 1, :n])
        torch.testing.assert_close(together[row : row + 1], alone)


@each_kind
@pytest.mark.parametrize("lobe", LOBES)
def test_called_like_speechbrains(lobe, downsampling):
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
        lobe(downsampling=downsampling, **options),
    ):
        assert net(feats).shape == (2, 12)
        assert net(feats, lengths).shape == (2, 12)
        assert net(feats, lengths=lengths).shape == (2, 12)


@pytest.mark.parametrize("lobe", LOBES)
def test_save_memory_is_one_switch(lobe):
    net = lobe.from_preset(next(iter(lobe.PRESETS)), base_channels=4)
    assert net.save_memory
    net.save_memory = False
    assert not net.trunk.save_memory


@each_kind
@pytest.mark.parametrize(
    "lobe, shallow, deep",
    [
        (RevResNet, "RevNet101", "RevNet293"),
        (RevDFResNet, "DFRevNet56", "DFRevNet110"),
    ],
)
def test_peak_memory_does_not_grow_with_depth(
    lobe, shallow, deep, downsampling
):
    """More layers need more for their parameters only."""
    shallow, deep = (
        training_step_memory(
            lambda name=name: lobe.from_preset(name, downsampling=downsampling),
            (16, 200, 80),
        ).activation_bytes
        for name in (shallow, deep)
    )
    assert deep < 1.01 * shallow
