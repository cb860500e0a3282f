"""The promises of every network; a new one is a line in ``networks.py``.

Authors
 * The sb_memeff authors 2026
"""

import copy
import functools
import inspect
import math
import re

import pytest
import torch
from speechbrain.lobes.models.ECAPA_TDNN import (
    ECAPA_TDNN as SpeechBrainECAPA_TDNN,
)
from speechbrain.lobes.models.ResNet import ResNet as SpeechBrainResNet
from torch import nn

from sb_memeff.lobes.models.DFResNet import DFResNet, DownSampling
from sb_memeff.lobes.models.RecomputedECAPA_TDNN import ECAPA_TDNN
from sb_memeff.lobes.models.RevDFResNet import RevDFResNet
from sb_memeff.lobes.models.RevECAPA_TDNN import RevECAPA_TDNN
from sb_memeff.lobes.models.RevResNet import RevResNet, StridedCoupling
from sb_memeff.lobes.models.WeSpeakerResNet import ResNet
from sb_memeff.lobes.residual import ResidualBlock
from sb_memeff.lobes.reversible_blocks import ResidualBody
from sb_memeff.memory.fake import fake_tensors
from sb_memeff.memory.leftovers import no_leftovers
from sb_memeff.memory.step import training_step_memory
from sb_memeff.nnet.reversible import AdditiveCoupling, check_invertible
from tests.unittests.lobes.networks import (
    EMBEDDING,
    LETS_PADDING_IN,
    MELS,
    NETWORKS,
    small,
    trained,
)
from tests.unittests.nnet.reversible.chains import relative_error
from tests.unittests.weights import without_zeros

# Each with the vanilla class whose place it takes.
LOBES = {RevResNet: ResNet, RevDFResNet: DFResNet}
KINDS = ["strided", "invertible"]
PRESETS = [(lobe, name) for lobe in LOBES for name in lobe.PRESETS]
VANILLA = [n for n, make in NETWORKS.items() if "Rev" not in n and "_" not in n]
SAVING = [n for n in NETWORKS if n not in VANILLA]
CUTTING = [n for n in NETWORKS if n not in LETS_PADDING_IN]
FRAMES = [21, 13, 7]

each_network = pytest.mark.parametrize("name", NETWORKS)
each_cutting = pytest.mark.parametrize("name", CUTTING)
# One of each kind of block and of strides.
SHALLOW = [
    (RevResNet, "RevNet34"),
    (RevResNet, "RevNet101"),
    (RevDFResNet, "DFRevNet56"),
    (RevDFResNet, "GeminiDFRevNet60"),
]
DEEPEST = [(RevResNet, "RevNet293"), (RevDFResNet, "GeminiDFRevNet237")]


def batch(dtype=torch.float64):
    """Odd sizes at every stage, and utterances of odd lengths."""
    torch.manual_seed(1)
    x = torch.randn(3, max(FRAMES), MELS, dtype=dtype)
    return x, torch.tensor(FRAMES) / max(FRAMES)


def step(net, x, *args, **kwargs):
    """Embeddings, gradients of the parameters and of x."""
    net.zero_grad()
    x.grad = None
    y = net(x, *args, **kwargs)
    weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    (y * weight).sum().backward()
    return y.detach(), [p.grad for p in net.parameters()], x.grad


def state_of(net):
    return {key: value.clone() for key, value in net.state_dict().items()}


def assert_equal_states(net, before):
    for key, value in net.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0, msg=key)


@each_network
def test_embeddings(name):
    net = trained(name)
    x, lengths = batch()
    y = net(x, lengths)
    middle = (1,) if "ECAPA" in name else ()
    assert y.shape == (3, *middle, EMBEDDING)
    torch.testing.assert_close(net(x, lengths=lengths), y)
    torch.testing.assert_close(net(x), net(x, torch.ones(3)))
    # An utterance does not depend on those beside it.
    torch.testing.assert_close(net(x[1:2], lengths[1:2]), y[1:2])
    assert not torch.allclose(y[0], y[1])
    assert list(inspect.signature(net.forward).parameters) == ["x", "lengths"]


@pytest.mark.parametrize("lobe", [*LOBES, *LOBES.values()])
def test_without_arguments_80_features_become_256_numbers(lobe):
    with fake_tensors():
        net, x = lobe(), torch.rand(2, 40, 80)
        assert net(x).shape == (2, 256)
        if lobe in LOBES.values():
            smallest = lobe.from_preset([*lobe.PRESETS][0])
            shapes = [
                {name: value.shape for name, value in n.state_dict().items()}
                for n in (net, smallest)
            ]
            assert shapes[0] == shapes[1]


def test_called_like_speechbrains_ecapa():
    x, lengths = batch(torch.float32)
    for lobe in (SpeechBrainECAPA_TDNN, ECAPA_TDNN, RevECAPA_TDNN):
        net = lobe(MELS, lin_neurons=12, channels=[16, 16, 16, 16, 48])
        assert net(x).shape == (3, 1, 12)
        assert net(x, lengths).shape == (3, 1, 12)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.LeakyReLU])
@pytest.mark.parametrize(
    "lobe, options",
    [
        (SpeechBrainResNet, {}),
        (ResNet, {}),
        (DFResNet, {}),
        *((lobe, {"downsampling": kind}) for lobe in LOBES for kind in KINDS),
    ],
)
def test_called_like_speechbrains_resnet(lobe, options, activation):
    channels = [8, 8, 16, 16]
    if options == {"downsampling": "invertible"}:
        channels = [4, 16, 64, 256]
    net = lobe(
        input_size=40,
        channels=channels,
        block_sizes=[2, 2, 2, 2],
        strides=[1, 2, 2, 2],
        lin_neurons=12,
        activation=activation,
        **options,
    )
    feats = torch.rand(2, 30, 40)
    lengths = torch.tensor([1.0, 0.5])
    assert net(feats).shape == (2, 12)
    assert net(feats, lengths).shape == (2, 12)
    assert net(feats, lengths=lengths).shape == (2, 12)


@pytest.mark.parametrize("more", [0, 1, 2, 60])
@each_cutting
def test_padding_of_any_length_changes_nothing_in_eval_mode(name, more):
    net = trained(name)
    x, _ = batch()
    x = torch.cat((x, torch.randn(3, more, MELS).double()), dim=1)
    x = 10 * x
    together = net(x, torch.tensor(FRAMES) / x.shape[1])
    for row, n in enumerate(FRAMES):
        alone = net(x[row : row + 1, :n])
        torch.testing.assert_close(together[row : row + 1], alone)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@each_cutting
def test_short_utterances(name, n):
    """Shorter than a kernel, alone and padded."""
    net = trained(name)
    x = torch.randn(2, 9, MELS).double()
    together = net(x, torch.tensor([1.0, n / 9]))
    torch.testing.assert_close(together[1:], net(x[1:, :n]))


@pytest.mark.parametrize("training", [True, False])
@each_cutting
def test_what_padding_holds_reaches_nothing(name, training):
    """Neither embeddings nor gradients nor running statistics."""
    found = []
    for value in (0.0, math.nan, math.inf, -math.inf, 1e30):
        net = trained(name).train(training)
        x, lengths = batch()
        for row, n in enumerate(FRAMES):
            x[row, n:] = value
        y, gradients, of_x = step(net, x.requires_grad_(), lengths)
        for row, n in enumerate(FRAMES):
            assert not of_x[row, n:].any() and of_x[row, :n].any()
        found.append([y, *gradients, of_x, *net.state_dict().values()])
    for expected, *others in zip(*found, strict=True):
        assert expected.isfinite().all()
        assert all(torch.equal(ours, expected) for ours in others)


@each_network
def test_frames_that_count_may_be_nan(name):
    """Divergence is not hidden."""
    net = trained(name)
    x, lengths = batch()
    x[1, FRAMES[1] - 1, 3] = math.nan
    y = net(x, lengths)
    assert y[1].isnan().all() and y[0].isfinite().all()


LAYOUTS = {
    "transposed": lambda x: x.mT.contiguous().mT,
    "batch last": lambda x: x.permute(1, 2, 0).contiguous().permute(2, 0, 1),
    "step 2": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "part": lambda x: nn.functional.pad(x, (2, 3, 1, 4, 1, 0))[1:, 1:-4, 2:-3],
    "expanded": lambda x: x[:1].expand(3, -1, -1),
    "mels expanded": lambda x: x[..., :1].expand(-1, -1, MELS),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@each_network
def test_any_strides(name, layout):
    x, lengths = batch()
    found = []
    for contiguous in (True, False):
        net = small(name, torch.float64)
        base = x.clone().requires_grad_()
        feats = LAYOUTS[layout](base)
        if contiguous:
            feats = feats.contiguous()
        else:
            assert not feats.is_contiguous()
        feats.retain_grad()
        strided = torch.stack((lengths, 1 - lengths), dim=1)[:, 0]
        y, gradients, of_feats = step(net, feats, strided)
        found.append((y, [*gradients, base.grad, of_feats]))
    (expected, reference), (y, gradients) = found
    torch.testing.assert_close(y, expected)
    assert relative_error(gradients, reference) < 1e-9


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@each_network
def test_pure_half_precision(name, dtype):
    """Embeddings as of float64; SpeechBrain's ECAPA_TDNN takes no lengths."""
    exact = trained(name, std=0.03)
    x, lengths = batch()
    lengths = None if name in LETS_PADDING_IN else lengths
    expected = exact(x, lengths)
    half = copy.deepcopy(exact).to(dtype)
    y = half(x.to(dtype), lengths)
    assert y.dtype == dtype
    cosine = torch.cosine_similarity(y.double(), expected, dim=-1)
    assert cosine.min() > 0.99


@pytest.mark.parametrize("autocast", [torch.float16, torch.bfloat16])
@each_network
def test_features_of_half_precision_under_autocast(name, autocast):
    net = trained(name, torch.float32, std=0.03)
    x, lengths = batch(torch.float32)
    with torch.no_grad(), torch.autocast("cpu", autocast):
        y = net(x.to(autocast), lengths)
        expected = net(x, lengths)
    cosine = torch.cosine_similarity(y.float(), expected.float(), dim=-1)
    assert cosine.min() > 0.99


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float64]
)
@each_network
def test_lengths_of_any_dtype(name, dtype):
    net = trained(name)
    x, lengths = batch()
    if name in LETS_PADDING_IN:
        # Rounded up or down, as in SpeechBrain's class.
        lengths = (torch.tensor(FRAMES) - 0.5) / max(FRAMES)
    torch.testing.assert_close(net(x, lengths.to(dtype)), net(x, lengths))


@each_network
def test_whole_lengths_are_one(name):
    net = trained(name)
    x, _ = batch()
    torch.testing.assert_close(net(x, torch.ones(3, dtype=torch.long)), net(x))
    torch.testing.assert_close(net(x, torch.ones(1).expand(3)), net(x))


@pytest.mark.parametrize(
    "lengths, error, sentence",
    [
        (torch.tensor(FRAMES), ValueError, r"in \(0, 1\]; got 21"),
        (torch.tensor([1, 0.5, 13.0]), ValueError, r"in \(0, 1\]; got 13.0"),
        (torch.tensor([1, 0.5, 0.0]), ValueError, r"got 0.0"),
        (torch.tensor([1, 0.5, math.nan]), ValueError, r"got nan"),
        (torch.ones(2), ValueError, r"each of the 3 utterances.*\(2,\)"),
        (torch.ones(3, 1), ValueError, r"each of the 3.*\(3, 1\)"),
        ([1.0, 0.5, 0.5], TypeError, r"got list; use torch.tensor"),
    ],
)
@each_network
def test_lengths_that_are_refused(name, lengths, error, sentence):
    net = small(name, torch.float64)
    before = state_of(net)
    with pytest.raises(error, match=sentence):
        net(batch()[0], lengths)
    assert_equal_states(net, before)


@each_network
def test_features_that_are_refused(name):
    net = small(name)
    before = state_of(net)
    x, _ = batch(torch.float32)
    with pytest.raises(ValueError, match=r"\[N, T, 20\], got \(3, 21, 19\)"):
        net(x[..., 1:])
    with pytest.raises(ValueError, match=r"\[N, T, 20\], got \(21, 20\)"):
        net(x[0])
    for dtype in (torch.float64, torch.bfloat16, torch.long):
        with pytest.raises(TypeError, match=rf"are {dtype} .*torch.float32"):
            net(x.to(dtype))
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(
            TypeError, match=r"float64 .*feats.to\(torch.float32"
        ):
            net(x.double())
    assert_equal_states(net, before)


@pytest.mark.parametrize("name", VANILLA)
def test_every_vanilla_block_begins_as_its_shortcut(name):
    torch.manual_seed(0)
    net = NETWORKS[name]()
    blocks = [m for m in net.modules() if isinstance(m, ResidualBlock)]
    assert len(blocks) == sum(map(len, net.stages)) - sum(
        isinstance(m, DownSampling) for m in net.modules()
    )
    for block in blocks:
        x = torch.randn(2, block.conv1.in_channels, 6, 6)
        shortcut = x if block.shortcut is None else block.shortcut(x)
        assert torch.equal(block(x), shortcut.relu())
    # All else begins at random.
    others = [
        p
        for n, p in net.named_parameters()
        if n.endswith("weight") and p.dim() > 1
    ]
    assert all(p.any() for p in others)


@each_network
def test_statistics_are_counted_once(name):
    net = small(name)
    x, lengths = batch(torch.float32)
    step(net, x, lengths)
    counts = [v for k, v in net.state_dict().items() if "num_batches" in k]
    assert counts and all(count == 1 for count in counts)


@pytest.mark.parametrize("name", [n for n in NETWORKS if "ECAPA" not in n])
def test_every_activation_is_the_one_asked_for(name):
    net = NETWORKS[name](activation=nn.GELU)
    kinds = {type(m) for m in net.modules()}
    assert {k for k in kinds if "activation" in k.__module__} == {nn.GELU}


@pytest.mark.parametrize("name", SAVING)
def test_save_memory_is_an_argument(name):
    assert not NETWORKS[name](save_memory=False).save_memory
    assert NETWORKS[name]().save_memory


@pytest.mark.parametrize("name", SAVING)
def test_without_save_memory_nothing_is_computed_twice(name):
    for save_memory in (False, True):
        net, calls = small(name), []
        net.save_memory = save_memory
        for module in net.modules():
            if isinstance(module, (nn.Conv1d, nn.Conv2d)):
                module.register_forward_hook(lambda *_: calls.append(1))  # noqa: B023
        x, lengths = batch(torch.float32)
        y = net(x, lengths)
        in_forward = len(calls)
        y.sum().backward()
        assert (len(calls) > in_forward) == save_memory


@pytest.mark.parametrize("name", SAVING)
def test_save_memory_is_one_switch_that_changes_no_number(name):
    """Gradients of the features too, and from features that need none."""
    for needs in (True, False):
        found = []
        for save_memory in (False, True):
            net = small(name, torch.float64)
            assert net.save_memory
            net.save_memory = save_memory
            x, lengths = batch()
            y, gradients, of_x = step(net, x.requires_grad_(needs), lengths)
            assert (of_x is not None) == needs
            gradients += [of_x] if needs else []
            found.append((y, gradients, net.state_dict()))
        (expected, reference, state), (y, gradients, ours) = found
        torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-12)
        assert relative_error(gradients, reference) < 1e-9
        assert ours.keys() == state.keys()
        for key, value in state.items():
            torch.testing.assert_close(ours[key], value, msg=key)


each_kind = pytest.mark.parametrize("downsampling", KINDS)
each_preset = pytest.mark.parametrize(
    "lobe, name", PRESETS, ids=[name for _, name in PRESETS]
)
each_shallow_preset = pytest.mark.parametrize(
    "lobe, name", SHALLOW, ids=[name for _, name in SHALLOW]
)


def narrow(lobe, name, downsampling):
    """A narrow network, as it is made."""
    torch.manual_seed(0)
    return lobe.from_preset(
        name, downsampling=downsampling, base_channels=4, input_size=20
    )


def bodies(net):
    """The residual functions of a reversible network."""
    return [m for m in net.modules() if isinstance(m, ResidualBody)]


def channels_of(coupling):
    """Channels of both streams together."""
    norms = (m for m in coupling.f.modules() if isinstance(m, nn.BatchNorm2d))
    return 2 * next(norms).num_features


@each_kind
@each_shallow_preset
def test_every_coupling_begins_as_the_identity(lobe, name, downsampling):
    """As the vanilla blocks begin as their shortcuts."""
    net = narrow(lobe, name, downsampling)
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
    # Through the last convolution of each function: its input is not zero,
    # nor is any other weight.
    last = [m.layers[-1].conv.weight for m in bodies(net)]
    zero = [p for p in net.parameters() if p.dim() > 1 and not p.any()]
    assert {id(p) for p in zero} == {id(p) for p in last}
    net(torch.randn(3, 30, 20)).square().mean().backward()
    assert all(p.grad.any() for p in last)


@each_kind
@each_preset
def test_parameters_within_5_percent_of_the_vanilla_network(
    lobe, name, downsampling
):
    vanilla = parameters_of(LOBES[lobe], name.replace("RevNet", "ResNet"))
    ours = parameters_of(lobe, name, downsampling=downsampling)
    assert ours == pytest.approx(vanilla, rel=0.05)
    # In the table of the class: a row, or a column, for each type.
    lines = map(str.strip, lobe.__doc__.splitlines())
    rows = [line for line in lines if line.startswith(f"{name} ")]
    figures = [float(x) for row in rows for x in re.findall(r"([.\d]+) M", row)]
    assert len(figures) == 2
    written = figures[KINDS.index(downsampling)]
    assert round(ours / 1e6, 2) == written


@functools.cache
def parameters_of(lobe, name, **options):
    with torch.device("meta"):
        net = lobe.from_preset(name, **options)
    return sum(p.numel() for p in net.parameters())


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
@pytest.mark.parametrize("lobe, name", SHALLOW + DEEPEST)
def test_a_step_is_that_of_the_network_that_stores(
    lobe, name, downsampling, precision
):
    """Same gradients, weights and running statistics, which count once."""
    exact = precision == "float64"
    dtype = torch.float64 if exact else torch.float32
    net = without_zeros(narrow(lobe, name, downsampling)).to(dtype)
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
    feats, lengths = batch(torch.float32)
    net = without_zeros(narrow(lobe, name, downsampling))
    with torch.autocast("cpu", torch.bfloat16):
        report = check_invertible(net, feats, lengths)
    assert report.inversion_error == 0.0
    assert report.gradient_error < 1e-6


@each_kind
@pytest.mark.parametrize(
    "lobe, name", [(RevResNet, "RevNet101"), (RevDFResNet, "DFRevNet56")]
)
@no_leftovers()  # looks at all objects of the process once
def test_peak_memory_does_not_grow_with_depth(lobe, name, downsampling):
    """More layers need more for their parameters only."""
    shallow, deep = (
        training_step_memory(
            lambda sizes=sizes: lobe.from_preset(
                name, downsampling=downsampling, block_sizes=sizes
            ),
            (16, 200, 80),
        ).activation_bytes
        for sizes in ([1, 1, 1, 1], [2, 2, 4, 2])
    )
    assert deep < 1.01 * shallow
