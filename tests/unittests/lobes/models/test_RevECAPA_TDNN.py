"""The reversible ECAPA-TDNN."""

import copy
import inspect

import pytest
import torch
from hyperpyyaml import load_hyperpyyaml
from speechbrain.lobes.models.ECAPA_TDNN import ECAPA_TDNN, SEBlock

from sb_memeff.lobes.models.RevECAPA_TDNN import RevECAPA_TDNN
from sb_memeff.nnet.reversible import AdditiveCoupling, check_invertible
from tests.unittests.lobes.networks import ECAPA as SMALL

VARIANTS = [
    {},
    {"channels": [24, 16, 16, 16, 140]},
    {"channels": [16, 16, 20], "kernel_sizes": [3, 5, 1], "res2net_scale": 2}
    | {"dilations": [1, 1, 1], "groups": [1, 2, 1], "inner_channels": 8},
    {"global_context": False, "dropout": 0.3},
    {"activation": torch.nn.Tanh, "res2net_scale": 1},
]


def small(**options):
    torch.manual_seed(0)
    return RevECAPA_TDNN(**{**SMALL, **options})


def batch(dtype=torch.float32):
    torch.manual_seed(1)
    return torch.randn(4, 40, 20, dtype=dtype), torch.tensor([1, 0.8, 0.5, 0.3])


@pytest.mark.parametrize("variant", VARIANTS)
def test_float64_gradients_equal_stored_ones(variant):
    feats, lengths = batch(torch.float64)
    net = small(**variant).double()
    assert check_invertible(net, feats, lengths).gradient_error < 1e-9
    assert check_invertible(net, feats).gradient_error < 1e-9


@pytest.mark.parametrize("variant", VARIANTS)
def test_exact_under_bf16_autocast(variant):
    feats, lengths = batch()
    net = small(**variant)
    with torch.autocast("cpu", torch.bfloat16):
        report = check_invertible(net, feats, lengths)
    assert report.inversion_error == 0.0
    assert report.gradient_error < 1e-6


def test_state_dict_after_steps_is_that_of_the_stored_network():
    feats, lengths = batch(torch.float64)
    net = small(dropout=0.1).double()
    twin = copy.deepcopy(net)
    twin.save_memory = False
    for module in (net, twin):
        torch.manual_seed(3)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
        for _ in range(2):
            optimizer.zero_grad()
            module(feats, lengths).square().sum().backward()
            optimizer.step()
    for key, value in twin.state_dict().items():
        ours = net.state_dict()[key]
        torch.testing.assert_close(ours, value, rtol=1e-9, atol=1e-12)
    counts = {int(v) for k, v in net.state_dict().items() if "num_batches" in k}
    assert counts == {2}


def test_arguments_are_speechbrains():
    ours, theirs = (
        list(inspect.signature(cls).parameters)
        for cls in (RevECAPA_TDNN, ECAPA_TDNN)
    )
    assert ours[: len(theirs)] == theirs


@pytest.mark.parametrize("options", [{}, {"global_context": False}])
def test_what_lies_behind_the_blocks_is_named_as_in_speechbrains(options):
    theirs, ours = (
        {
            key: value.shape
            for key, value in net.state_dict().items()
            if not key.startswith(("blocks.", "trunk."))
        }
        for net in (ECAPA_TDNN(**SMALL, **options), small(**options))
    )
    assert ours == theirs


def test_each_block_has_the_kernel_and_dilation_of_speechbrains():
    options = {
        **SMALL,
        "kernel_sizes": [5, 3, 5, 3, 1],
        "dilations": [1, 2, 3, 5, 1],
    }

    def convolutions(block):
        """Kernel and dilation of each convolution in its Res2Net."""
        return [
            (layer.conv.conv.kernel_size, layer.conv.conv.dilation)
            for layer in block.res2net_block.blocks
        ]

    theirs = [convolutions(b) for b in ECAPA_TDNN(**options).blocks[1:]]
    couplings = [
        b
        for b in small(**options).trunk.blocks
        if isinstance(b, AdditiveCoupling)
    ]
    for function in ("f", "g"):
        ours = [convolutions(getattr(c, function)) for c in couplings]
        assert ours == theirs


@pytest.mark.parametrize(
    "option",
    [
        {"dropout": 0.3},
        {"activation": torch.nn.GELU},
        {"groups": [1, 2, 1, 4, 1]},
        {"se_channels": 6},
    ],
    ids=lambda option: [*option][0],
)
def test_an_option_acts_where_speechbrains_does(option):
    def parts(module):
        """What the parts are, but for the channels of the streams."""
        return {
            name: (type(part), vars(part).get("p"), vars(part).get("groups"))
            for name, part in module.named_modules()
        } | {
            name: part.conv1.conv.out_channels
            for name, part in module.named_modules()
            if isinstance(part, SEBlock)
        }

    options = {**SMALL, **option}
    theirs, ours = ECAPA_TDNN(**options), small(**option)
    usual = ECAPA_TDNN(**SMALL)
    assert parts(theirs.blocks) != parts(usual.blocks)
    stem, *others = ours.trunk.blocks
    assert parts(stem.block) == parts(theirs.blocks[0])
    couplings = [b for b in others if isinstance(b, AdditiveCoupling)]
    for coupling, block in zip(couplings, theirs.blocks[1:], strict=True):
        found = [
            {k: v for k, v in parts(x).items() if k}
            for x in (coupling.f, coupling.g, block)
        ]
        assert found[0] == found[1] == found[2]
    for name in ("mfa", "asp", "asp_bn", "fc"):
        assert parts(getattr(ours, name)) == parts(getattr(theirs, name))


@pytest.mark.parametrize("first", [16, 24])
def test_the_stem_leaves_padded_frames_zero(first):
    """Else the batch norms behind it would count the bias of its shortcut."""
    stem = small(channels=[first, 16, 16, 16, 140]).trunk.blocks[0]
    padding = (torch.arange(9) >= torch.tensor([[9], [4]]))[:, None]
    y = stem(torch.randn(2, 9, SMALL["input_size"]), padding)
    assert not y.masked_select(padding).any() and y[1, :, 3].all()


def test_aggregation_is_the_convolution_over_all_blocks():
    """The sum that the taps form is what SpeechBrain's mfa would compute."""
    net = small().double().eval()
    feats, _ = batch(torch.float64)
    inputs, states = [], []
    net.mfa.activation.register_forward_hook(
        lambda module, args, result: inputs.append(args[0])
    )
    for block in net.trunk.blocks:
        if hasattr(block, "read"):
            block.read.register_forward_hook(
                lambda module, args, result: states.append(args[0])
            )
    with torch.no_grad():
        net(feats)
        expected = net.mfa.conv(torch.cat(states, dim=1))
    assert len(states) == 3
    torch.testing.assert_close(inputs[0], expected)


def test_from_yaml():
    hparams = load_hyperpyyaml(
        """
        embedding_model: !new:sb_memeff.lobes.models.RevECAPA_TDNN.RevECAPA_TDNN
            input_size: 20
            channels: [16, 16, 16, 16, 48]
            kernel_sizes: [5, 3, 3, 3, 1]
            dilations: [1, 2, 3, 4, 1]
            attention_channels: 8
            lin_neurons: 12
        """
    )
    assert hparams["embedding_model"](torch.rand(2, 16, 20)).shape == (2, 1, 12)


def graph_of(y):
    """Names of the nodes of the autograd graph."""
    nodes, seen = [y.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [following for following, _ in node.next_functions]
    return {type(node).__name__ for node in seen}


def test_save_memory_is_one_switch():
    """For the chain, the chunks of Res2Net and the pooling."""
    ours = {"_OutputNodeBackward", "_OverChannelsBackward"}
    net = small()
    assert net.save_memory and ours <= graph_of(net(batch()[0]))
    net.save_memory = False
    assert not ours & graph_of(net(batch()[0]))


def test_errors():
    with pytest.raises(ValueError, match=r"dilations .*\[1, 2\]"):
        small(dilations=[1, 2])
    with pytest.raises(ValueError, match=r"even, got 15"):
        small(channels=[16, 15, 15, 15, 48])
    with pytest.raises(ValueError, match=r"all the same.*\[16, 16, 32, 32, 4"):
        small(channels=[16, 16, 32, 32, 48])
    with pytest.raises(ValueError, match=r"all the same.*\[16, 48\]"):
        small(
            channels=[16, 48],
            **dict.fromkeys(("kernel_sizes", "dilations", "groups"), [1, 1]),
        )
    with pytest.raises(ValueError, match=r"inner_channels=6 .* multiple of 4"):
        small(inner_channels=6)
    with pytest.raises(ValueError, match=r"1x1.*a kernel of 3 in 1 groups"):
        small(kernel_sizes=[5, 3, 3, 3, 3])
    with pytest.raises(ValueError, match=r"kernel of 4 .*1 would lose.*\[4, 3"):
        small(kernel_sizes=[4, 3, 3, 3, 1])
    with pytest.raises(ValueError, match=r"each of the 4 utterances.*\(1,\)"):
        small()(batch(torch.float32)[0], torch.ones(1))
