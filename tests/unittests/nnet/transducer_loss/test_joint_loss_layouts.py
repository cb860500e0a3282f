"""The joint loss for inputs and weights of any strides.

Authors
 * The sb_memeff authors 2026
"""

import pytest
import speechbrain.nnet.RNN
import torch
import torchaudio
from speechbrain.lobes.models.CRDNN import CRDNN
from speechbrain.nnet.transducer.transducer_joint import Transducer_joint
from torch import nn

from sb_memeff.nnet.transducer_loss.joint_loss import TransducerJointLoss

B, T, U, H, V = 3, 7, 4, 6, 9
FRAMES = torch.tensor([7, 3, 5]) / T
COUNTS = torch.tensor([4, 2, 0]) / U
METHODS = {
    "tiled": {"method": "tiled", "max_rows": 10},
    "samplewise": {"method": "samplewise"},
}
every_method = pytest.mark.parametrize("options", METHODS.values(), ids=METHODS)
every_reduction = pytest.mark.parametrize("reduction", ["nll_sum", "nll"])


def swapped(x, a, b):
    return x.transpose(a, b).contiguous().transpose(a, b)


# The same values with other strides.
LAYOUTS = {
    "transposed": lambda x: swapped(x, 0, 1),
    "channels_first": lambda x: swapped(x, 1, 2),
    "reversed_axes": lambda x: swapped(x, 0, 2),
    "sliced": lambda x: nn.functional.pad(x, (2, 3, 1, 1))[:, 1:-1, 2:-3],
    "every_second": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "contiguous": lambda x: x,
}
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


def inputs():
    generator = torch.Generator().manual_seed(0)
    enc, pred = (
        torch.randn(B, n, H, generator=generator, dtype=torch.float64)
        for n in (T, U + 1)
    )
    return enc, pred, torch.randint(1, V, (B, U), generator=generator)


def parts():
    torch.manual_seed(0)
    joint = Transducer_joint(nn.Linear(2 * H, 5), "concat", nn.Tanh)
    return joint.double(), nn.Linear(5, V).double()


def weighted(loss):
    weights = torch.tensor([0.5, -2.0, 1.0], dtype=loss.dtype)
    return (loss * weights).sum() if loss.dim() else loss


def assert_same(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        assert theirs.abs().max() > 1e-6
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def gradients(made, reduction, enc, pred, targets, lens, given, **options):
    loss = TransducerJointLoss(*made, reduction=reduction, **options)
    value = weighted(loss(enc, pred, targets, *lens))
    return torch.autograd.grad(value, given)


@every_layout
@every_reduction
@every_method
def test_encoder_and_predictor(options, reduction, layout):
    """As leaves, and as outputs of other operations."""
    enc, pred, targets = inputs()
    made = parts()
    weights = [p for part in made for p in part.parameters()]
    lens = FRAMES, COUNTS
    contiguous = [enc.requires_grad_(), pred.requires_grad_()]
    expected = gradients(
        made, reduction, enc, pred, targets, lens, contiguous + weights,
        method="batched",
    )  # fmt: skip
    outputs = [LAYOUTS[layout](x) for x in contiguous]
    found = gradients(
        made, reduction, *outputs, targets, lens, contiguous + weights,
        **options,
    )  # fmt: skip
    assert_same(found, expected)
    leaves = [LAYOUTS[layout](x.detach()).requires_grad_() for x in contiguous]
    found = gradients(
        made, reduction, *leaves, targets, lens, leaves + weights, **options
    )
    assert_same(found, expected)


@every_reduction
@every_method
def test_expanded(options, reduction):
    """One row of memory for all samples, frames or columns."""
    enc, pred, targets = inputs()
    made = parts()
    lens = torch.tensor(1.0).expand(B), torch.tensor(0.5).expand(B)
    targets = targets[:1].expand(B, U)
    for small_enc, small_pred in (
        (enc[:1], pred[:1]),
        (enc[:, :1], pred[:, :1]),
        (enc[..., :1], pred[..., :1]),
    ):
        small = [x.clone().requires_grad_() for x in (small_enc, small_pred)]
        large = small[0].expand(B, T, H), small[1].expand(B, U + 1, H)
        expected, found = (
            gradients(made, reduction, *large, targets, lens, small, **choice)
            for choice in ({"method": "batched"}, options)
        )
        assert_same(found, expected)


@every_method
def test_targets_and_lengths(options):
    enc, pred, targets = inputs()
    enc.requires_grad_()
    made = parts()
    expected = gradients(
        made, "nll_sum", enc, pred, targets, (FRAMES, COUNTS), [enc],
        method="batched",
    )  # fmt: skip
    lens = [x.repeat_interleave(3)[::3] for x in (FRAMES, COUNTS)]
    for strided in (swapped(targets, 0, 1), targets.repeat(1, 2)[:, :U]):
        assert not strided.is_contiguous()
        found = gradients(
            made, "nll_sum", enc, pred, strided, lens, [enc], **options
        )
        assert_same(found, expected)


@every_reduction
@every_method
def test_weights(options, reduction):
    enc, pred, targets = inputs()
    made = parts()
    lens = FRAMES, COUNTS
    expected = gradients(
        made, reduction, enc, pred, targets, lens,
        [made[0].joint_network.weight, made[1].weight], method="batched",
    )  # fmt: skip
    for change in (
        lambda w: swapped(w, 0, 1),
        lambda w: nn.functional.pad(w, (1, 2))[:, 1:-2],
        lambda w: w.repeat_interleave(2, 0)[::2],
    ):
        made = parts()
        for layer in (made[0].joint_network, made[1]):
            layer.weight = nn.Parameter(change(layer.weight.detach()))
            assert not layer.weight.is_contiguous()
        found = gradients(
            made, reduction, enc, pred, targets, lens,
            [made[0].joint_network.weight, made[1].weight], **options,
        )  # fmt: skip
        assert_same(found, expected)


class FirstOutput(nn.Module):
    """A network of which the first output counts."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network(x)[0]


class WithLengths(FirstOutput):
    """torchaudio's networks, which need lengths and pad on the right."""

    def __init__(self, network, context=0):
        super().__init__(network)
        self.context = context

    def forward(self, x):
        lengths = torch.full((len(x),), x.shape[1])
        padded = nn.functional.pad(x, (0, 0, 0, self.context))
        return self.network(padded, lengths)[0]


RNN = speechbrain.nnet.RNN
NETWORKS = {
    "torch LSTM": lambda: FirstOutput(nn.LSTM(H, H, batch_first=True)),
    "torch GRU": lambda: FirstOutput(nn.GRU(H, H, batch_first=True)),
    "LSTM": lambda: FirstOutput(RNN.LSTM(H, input_size=H)),
    "GRU": lambda: FirstOutput(RNN.GRU(H, input_size=H)),
    "LiGRU": lambda: FirstOutput(RNN.LiGRU(H, (B, T, H), nonlinearity="tanh")),
    "CRDNN": lambda: CRDNN(
        input_size=H,
        cnn_blocks=1,
        cnn_channels=[4],
        cnn_kernelsize=(3, 3),
        time_pooling=False,
        rnn_layers=1,
        rnn_neurons=3,
        rnn_bidirectional=True,
        dnn_blocks=1,
        dnn_neurons=H,
        dropout=0.0,
    ),
    "Conformer": lambda: WithLengths(
        torchaudio.models.Conformer(H, 2, 8, 1, 3)
    ),
    "Emformer": lambda: WithLengths(
        torchaudio.models.Emformer(H, 2, 8, 1, T, right_context_length=1), 1
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
@every_method
def test_networks_get_their_gradients(options, name):
    """Of what encoders and predictors return, whatever its strides."""
    enc, _, targets = inputs()
    torch.manual_seed(0)
    encoder = NETWORKS[name]().double()
    predictor = FirstOutput(nn.LSTM(H, H, batch_first=True)).double()
    made = parts()
    params = [
        p
        for part in (encoder, predictor)
        for p in part.parameters()
        if p.requires_grad
    ]
    labels = torch.randn(B, U + 1, H, dtype=torch.float64)
    found = []
    for choice in ({"method": "batched"}, options):
        torch.manual_seed(1)
        loss = TransducerJointLoss(*made, reduction="nll_sum", **choice)
        value = loss(encoder(enc), predictor(labels), targets, FRAMES, COUNTS)
        found.append(torch.autograd.grad(value, params, allow_unused=True))
    expected, ours = ([g for g in some if g is not None] for some in found)
    assert any(g.abs().max() > 1e-4 for g in expected)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
