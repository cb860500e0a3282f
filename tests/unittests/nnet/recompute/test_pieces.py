"""Blocks that are recomputed piece by piece over the batch.

Authors
 * The sb_memeff authors 2026
"""

import copy
import pickle

import pytest
import torch
from speechbrain.lobes.models.convolution import ConvolutionFrontEnd
from speechbrain.nnet.attention import RelPosMHAXL
from speechbrain.utils.dynamic_chunk_training import DynChunkTrainConfig
from torch import nn

from sb_memeff.memory.step import training_step_memory
from sb_memeff.nnet.recompute import recompute_blocks
from sb_memeff.nnet.recompute.outputs import DroppedOutput
from sb_memeff.nnet.recompute.pieces import SplitError
from tests.unittests.nnet.reversible.chains import relative_error
from tests.unittests.nnet.speech_networks import (
    LAYERS,
    batch,
    conformer,
    conformer_absolute,
)


def trained(net, x, *args, **kwargs):
    """Output and gradients, that of the input first."""
    x = x.detach().clone().requires_grad_()
    y = net(x, *args, **kwargs)
    first = y[0] if isinstance(y, tuple) else y
    (first * torch.linspace(-1, 1, first.shape[-1]).to(first)).sum().backward()
    return y, [x.grad, *(p.grad for p in net.parameters())]


def assert_as_whole(net, blocks, x, *args, tolerance=1e-6, **options):
    """The step is that of the network that is not split."""
    kwargs = options.pop("kwargs", {})
    twin = copy.deepcopy(net)
    recompute_blocks(net, blocks, **options)
    for _ in range(2):
        y, ours = trained(net, x, *args, **kwargs)
        y_ref, reference = trained(twin, x, *args, **kwargs)
        assert relative_error([y], [y_ref]) <= tolerance
        assert relative_error(ours, reference) <= tolerance


# --- the same as the whole batch ---------------------------------------------


@pytest.mark.parametrize("split", [2, 3, 8])
@pytest.mark.parametrize("samples", [1, 2, 3])
def test_conformers_with_lengths(split, samples):
    torch.manual_seed(0)
    x, lengths = batch(torch.float64)
    net = conformer_absolute().double()
    for part in net.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        if isinstance(part, nn.MultiheadAttention):
            part.dropout = 0.0
    assert_as_whole(
        net,
        LAYERS,
        x[:samples],
        lengths[:samples],
        split=split,
        tolerance=1e-12,
    )


def test_relative_positions_are_shared_in_float32():
    torch.manual_seed(0)
    net = conformer(dropout=0.0)
    assert_as_whole(net, LAYERS, *batch(), split=2, first_output_only=True)


def test_a_mask_with_as_many_rows_as_samples_is_shared():
    """Chunks make a [T, T] mask; here T equals B."""
    torch.manual_seed(0)
    net = conformer(dropout=0.0)
    config = DynChunkTrainConfig(chunk_size=2, left_context_size=1)
    assert_as_whole(
        net,
        LAYERS,
        torch.rand(6, 6, 20),
        torch.linspace(0.5, 1, 6),
        kwargs={"dynchunktrain_config": config},
        split=3,
    )


class Attention(nn.Module):
    """Self-attention in a block."""

    def __init__(self):
        super().__init__()
        self.block = RelPosMHAXL(8, 2)

    def forward(self, x, mask, padding=None):
        positions = torch.linspace(-1, 1, 2 * x.shape[1] - 1)
        positions = positions.view(1, -1, 1).expand(1, -1, 8)
        return self.block(x, x, x, positions, padding, mask)


def test_masks_of_each_head_are_split():
    torch.manual_seed(0)
    mask = torch.rand(5 * 2, 4, 4) > 0.7
    padding = torch.zeros(5, 4, dtype=torch.bool)
    padding[3, 2:] = True
    mask[:, :, 0] = False
    net = Attention()
    twin = copy.deepcopy(net)
    recompute_blocks(net, "block", split=2)
    x = torch.rand(5, 4, 8)
    (y, weights), ours = trained(net, x, mask, padding)
    (y_ref, weights_ref), reference = trained(twin, x, mask, padding)
    torch.testing.assert_close(y, y_ref)
    torch.testing.assert_close(weights, weights_ref)
    assert relative_error(ours, reference) < 1e-6
    with pytest.raises(ValueError, match=r"block .*attn_mask has the shape \["):
        net(x, mask[:5], padding)


@pytest.mark.parametrize("split", [2, 4])
def test_speechbrains_front_end(split):
    torch.manual_seed(0)
    front = ConvolutionFrontEnd(
        input_shape=[2, 10, 8],
        num_blocks=2,
        num_layers_per_block=1,
        out_channels=(4, 4),
        kernel_sizes=(3, 3),
        strides=(2, 2),
        residuals=(False, False),
        dropout=0.0,
    ).double()
    x = torch.rand(5, 10, 8, dtype=torch.float64)
    assert_as_whole(front, "", x, split=split, tolerance=1e-12)


def test_autocast():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.Tanh()))
    x = torch.rand(5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert net(x).dtype == torch.bfloat16
        assert_as_whole(net, "*", x, split=2, tolerance=0.02)


@pytest.mark.parametrize(
    "outer, inner",
    [
        ({"split": 2}, {}),
        ({}, {"split": 2}),
        ({"split": 2}, {"split": 3}),
    ],
)
def test_blocks_in_blocks(outer, inner):
    torch.manual_seed(0)
    net = conformer(dropout=0.1, layers=1)
    twin = copy.deepcopy(net)
    recompute_blocks(twin, LAYERS, **outer)
    recompute_blocks(net, LAYERS, **outer)
    recompute_blocks(net, f"{LAYERS}.mha_layer", **inner)
    if "split" not in inner:
        # The same random numbers.
        torch.manual_seed(1)
        y, ours = trained(net, *batch())
        torch.manual_seed(1)
        y_ref, reference = trained(twin, *batch())
        assert torch.equal(y, y_ref)
        assert relative_error(ours, reference) < 1e-6
    else:
        net.eval(), twin.eval()
        y, ours = trained(net, *batch())
        y_ref, reference = trained(twin, *batch())
        assert relative_error([y, *ours], [y_ref, *reference]) < 1e-6


def test_copies_are_split_too():
    torch.manual_seed(0)
    net = nn.Sequential(Recording())
    recompute_blocks(net, "*", split=2)
    for one in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        one(torch.rand(5, 2, requires_grad=True))
        assert [len(x) for x in SEEN[-2:]] == [3, 2]


# --- random numbers, and modes without gradients -----------------------------


def test_dropout_is_the_same_in_both_passes():
    net = nn.Sequential(nn.Dropout(0.5))
    recompute_blocks(net, "*", split=3)
    x = torch.ones(8, 50, requires_grad=True)
    found = []
    for _ in range(2):
        torch.manual_seed(1)
        y = net(x)
        found.append((y.detach(), torch.rand(1)))
        x.grad = None
        y.sum().backward()
        assert torch.equal(x.grad, y)
    assert 0 < x.grad.count_nonzero() < x.numel()
    # The check of the first call draws from no generator.
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


SEEN = []


class Recording(nn.Module):
    """Records what it is called with."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x, *args, **kwargs):
        SEEN.append(x)
        return self.linear(x)


@pytest.mark.parametrize("gradients", [True, False])
def test_the_size_of_pieces(gradients):
    net = nn.Sequential(Recording())
    recompute_blocks(net, "*", split=4)
    # The check of two samples comes first.
    net(torch.rand(2, 2))
    for samples, sizes in (
        (1, [1]),
        (3, [1, 1, 1]),
        (4, [1, 1, 1, 1]),
        (9, [3, 3, 3]),
        (10, [3, 3, 3, 1]),
    ):
        SEEN.clear()
        x = torch.rand(samples, 2)
        with torch.set_grad_enabled(gradients):
            y = net(x)
        assert [len(x) for x in SEEN] == (sizes if gradients else [samples])
        torch.testing.assert_close(y, net[0].linear(x))


def test_eval_without_gradients_is_unchanged():
    net = conformer()
    twin = copy.deepcopy(net)
    recompute_blocks(net, LAYERS, split=2)
    with torch.no_grad():
        assert torch.equal(net.eval()(*batch()), twin.eval()(*batch()))


# --- what cannot be split ----------------------------------------------------


def refused(net, message, *args, blocks="*", **kwargs):
    recompute_blocks(net, blocks, split=2)
    with pytest.raises(ValueError, match=message):
        net(*args, **kwargs)


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm1d(4),
        nn.SyncBatchNorm(4),
        nn.InstanceNorm1d(4, track_running_stats=True),
        nn.BatchNorm1d(4, track_running_stats=False).eval(),
    ],
)
def test_batch_statistics_are_refused_by_name(norm):
    net = nn.Sequential(nn.Sequential(nn.Conv1d(4, 4, 1), norm))
    before = copy.deepcopy(net.state_dict())
    kind = type(norm).__name__
    refused(net, rf"0 cannot .*split=2: 1 \({kind}\)", torch.rand(4, 4, 9))
    for a, b in zip(before.values(), net.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_frozen_batch_norms_are_split():
    norm = nn.BatchNorm1d(4).eval()
    norm.running_mean.normal_()
    net = nn.Sequential(nn.Sequential(nn.Conv1d(4, 4, 1), norm)).double()
    x = torch.rand(5, 4, 9, dtype=torch.float64)
    assert_as_whole(net, "*", x, split=2, tolerance=1e-12)


class Centred(nn.Module):
    """Takes batch statistics by itself, in training."""

    def forward(self, x):
        return x.sin() - x.mean(0) if self.training else x.sin()


class Last(nn.Module):
    """Reads the sequence [T, B, C] from its end."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(4, 4)

    def forward(self, x):
        return self.rnn(x.flip(0))[0].flip(0)


@pytest.mark.parametrize(
    "block",
    [
        Centred(),
        Last(),
        nn.Sequential(Last(), nn.LayerNorm(4)),
        nn.TransformerEncoderLayer(4, 2, 8),
    ],
)
def test_samples_that_depend_on_each_other_are_refused(block):
    x = torch.rand(6, 3, 4, requires_grad=True)
    generator = torch.get_rng_state()
    refused(nn.Sequential(block), "0 cannot .*first dimension of .* batch", x)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(p.grad is None for p in block.parameters()) and x.grad is None


def test_the_check_is_repeated_in_training():
    net = nn.Sequential(Centred()).eval()
    recompute_blocks(net, "*", split=2)
    x = torch.rand(4, 3, requires_grad=True)
    net(x)
    with pytest.raises(ValueError, match="depends on another sample"):
        net.train()(x)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_changes_of_the_input_are_refused(requires_grad):
    net = nn.Sequential(nn.ReLU(inplace=True))
    recompute_blocks(net, "*", split=2)
    x = torch.rand(4, 3, requires_grad=requires_grad)
    with pytest.raises(RuntimeError, match="in ?place"):
        net(x * 2)


class Stateful(nn.Module):
    """Counts its calls."""

    def __init__(self, buffer):
        super().__init__()
        self.calls = 0
        self.buffer = buffer
        self.register_buffer("batches", torch.zeros(1))

    def forward(self, x):
        if self.buffer:
            self.batches += 1
        else:
            self.calls += 1
        return x.sin()


@pytest.mark.parametrize("buffer", [False, True])
def test_state_that_counts_batches_is_refused(buffer):
    name = "batches" if buffer else "calls"
    x = torch.rand(6, 3, requires_grad=True)
    refused(nn.Sequential(Stateful(buffer)), f"each call changes {name}", x)


class Caching(nn.Module):
    """Creates a table in its first call."""

    table = None

    def forward(self, x):
        if self.table is None:
            self.table = (1, 2)
        return x * self.table[1]


def test_a_table_made_by_the_first_call_is_not():
    x = torch.rand(6, 3)
    assert_as_whole(nn.Sequential(Caching()), "*", x, split=3)


class Scaling(nn.Module):
    """Takes an argument that no layer of SpeechBrain has."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x, scale):
        return self.block(x, scale=scale)


class Scaled(nn.Module):
    def forward(self, x, *, scale):
        return x.sin() * scale


def test_other_arguments_must_be_named():
    x, scale = torch.rand(4, 4, requires_grad=True), torch.rand(4)
    with pytest.raises(ValueError, match=r"scale, of shape \[4\].*shared: \["):
        net = Scaling(Scaled())
        recompute_blocks(net, "block", split=2)
        net(x, scale)
    for shared, given in ((["scale"], scale), ([], scale.unsqueeze(1))):
        net = Scaling(Scaled())
        recompute_blocks(net, "block", split=2, shared=shared)
        torch.testing.assert_close(net(x, given), x.sin() * given)
    with pytest.raises(ValueError, match=r"expects 4 samples.*scale has"):
        net(x, torch.rand(1, 4))
    # A number is no tensor of samples.
    torch.testing.assert_close(net(x, torch.tensor(2.0)), x.sin() * 2)


class Packing(nn.Module):
    def __init__(self, pack):
        super().__init__()
        self.pack = pack

    def forward(self, x):
        return self.pack(x)


def test_results_are_joined():
    net = nn.Sequential(Packing(lambda x: {"a": (x, None), "b": [3, 2 * x]}))
    recompute_blocks(net, "*", split=2)
    x = torch.rand(5, 2, requires_grad=True)
    y = net(x)
    assert torch.equal(y["a"][0], x) and y["a"][1] is None
    assert y["b"][0] == 3 and torch.equal(y["b"][1], 2 * x)


@pytest.mark.parametrize(
    "pack, message",
    [
        (lambda x: (x, x.mean(1).sum()), r"a tensor of shape \[\]"),
        (lambda x: (x, x[:1]), r"2 samples .* shape \[1, 2\]"),
        (lambda x: (x, len(x)), "a int that varies"),
        (lambda x: [x] * len(x), "structure"),
    ],
)
def test_results_that_cannot_be_joined(pack, message):
    x = torch.rand(5, 2)
    refused(nn.Sequential(Packing(pack)), message, x)


def test_results_that_nobody_uses_are_not_joined():
    net = nn.Sequential(Packing(lambda x: (x, x.mean())))
    recompute_blocks(net, "*", split=2, first_output_only=True)
    x = torch.rand(5, 2, requires_grad=True)
    y, mean = net(x)
    assert torch.equal(y, x) and type(mean) is DroppedOutput


@pytest.mark.parametrize(
    "options, message",
    [
        ({"split": 0}, "split=0"),
        ({"split": 2, "segment_length": 2}, "split=2 needs segment_length=1"),
        ({"split": 2, "shared": "x"}, "shared must be a list"),
        ({"shared": ["lengths"]}, "shared names lengths.* input"),
    ],
)
def test_bad_options(options, message):
    net = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    with pytest.raises(ValueError, match=message):
        recompute_blocks(net, "*", **options)
    assert type(net[0]) is nn.Linear


# --- memory ------------------------------------------------------------------


def test_activations_of_one_piece_at_a_time():
    def body():
        return nn.Sequential(
            *(nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(8))
        )

    def activations(split):
        def build():
            net = nn.Sequential(body(), body())
            recompute_blocks(net, "*", split=split)
            return net

        return training_step_memory(build, (4096, 64)).activation_bytes

    x = 4096 * 64 * 4
    whole, split = activations(1), activations(8)
    # Eight outputs, of which one piece is an eighth; and inputs, outputs and
    # gradients of the whole batch.
    assert whole > 10 * x
    assert split < 6.5 * x


def test_a_compiled_network():
    """Split blocks run outside its graphs."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 2), Recording(), nn.Linear(2, 2))
    twin = copy.deepcopy(net)
    recompute_blocks(net, "1", split=2)
    x = torch.rand(5, 2)
    y, ours = trained(torch.compile(net, backend="aot_eager"), x)
    assert [len(x) for x in SEEN[-2:]] == [2, 3]  # backward
    y_ref, reference = trained(twin, x)
    assert relative_error([y, *ours], [y_ref, *reference]) < 1e-6
    torch._dynamo.reset()


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("batch", [2, 3, 4, 6, 8])
def test_states_that_have_no_row_for_each_sample_are_refused(layers, batch):
    """Whatever the size of a piece is: [layers, B, H]."""
    lstm = nn.LSTM(3, 3, num_layers=layers, batch_first=True)
    net = nn.Sequential(lstm)
    recompute_blocks(net, "0", split=batch // 2, shared=[])
    if batch // 2 > 1:
        with pytest.raises(SplitError, match="cannot be called with split"):
            net(torch.randn(batch, 5, 3, requires_grad=True))


def test_pieces_of_other_widths_are_refused():
    class Trimmed(nn.Module):
        """Trims to the longest sample, as packed sequences do."""

        def forward(self, x, lengths):
            return x[:, : int(lengths.max() * x.shape[1])] * 2

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Trimmed()

        def forward(self, x, lengths):
            return self.block(x, lengths)

    net = Net()
    recompute_blocks(net, "block", split=2)
    x = torch.randn(4, 10, 3, requires_grad=True)
    with pytest.raises(
        SplitError, match=r"\[2, 10, 3\] for one .* \[1, 5, 3\]"
    ):
        net(x, torch.tensor([1.0, 0.5, 0.5, 0.5]))


def test_a_shared_argument_that_is_not_passed_may_be_another_one():
    class Scaled(nn.Module):
        def forward(self, x, **arguments):
            return x * arguments.get("scale", 1)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Scaled()

        def forward(self, x, **arguments):
            return self.block(x, **arguments)

    net = Net()
    recompute_blocks(net, "block", split=2, shared=["scales"])
    x = torch.randn(4, 4, requires_grad=True)
    with pytest.raises(SplitError, match="shared names scales.*passes scale"):
        net(x, scale=torch.rand(4))
    assert torch.equal(net(x), x)
