"""Which joint networks and classifiers the joint loss takes.

Authors
 * The sb_memeff authors 2026
"""

import pytest
import speechbrain.nnet.linear
import speechbrain.nnet.normalization
import torch
from speechbrain.nnet.transducer.transducer_joint import Transducer_joint
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from sb_memeff.nnet.transducer_loss.batch import check_counts
from sb_memeff.nnet.transducer_loss.joint_loss import TransducerJointLoss
from sb_memeff.nnet.transducer_loss.modules import declared_vocabulary

B, T, U, H, V = 3, 7, 4, 6, 9
METHODS = {
    "tiled": {"method": "tiled", "max_rows": 10},
    "samplewise": {"method": "samplewise"},
}
every_method = pytest.mark.parametrize("options", METHODS.values(), ids=METHODS)


class Joint(nn.Module):
    """A joint network with something behind it."""

    def __init__(self, behind):
        super().__init__()
        self.joint = Transducer_joint(nonlinearity=nn.Tanh)
        self.behind = behind

    def forward(self, enc, pred):
        return self.behind(self.joint(enc, pred))


class Opaque(nn.Module):
    """A classifier that does not say how many symbols it has."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return self.layers(x)


def call(loss, targets=None):
    torch.manual_seed(0)
    enc = torch.randn(B, T, H, requires_grad=True)
    pred = torch.randn(B, U + 1, H, requires_grad=True)
    if targets is None:
        targets = torch.randint(1, V, (B, U))
    frames, counts = torch.tensor([7, 3, 5]) / T, torch.tensor([4, 2, 0]) / U
    return loss(enc, pred, targets, frames, counts), enc, pred


class OverChannels(nn.Module):
    """A module of [N, H, T, U] on [N, T, U, H]."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class OverRows(nn.Module):
    """A module of sequences or rows [N, U, H] on [N, T, U, H]."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        rows = x.flatten(0, 1)
        if isinstance(self.module, nn.MultiheadAttention):
            return self.module(rows, rows, rows)[0].view_as(x)
        if isinstance(self.module, nn.RNNCellBase):
            return self.module(rows.flatten(0, 1)).view_as(x)
        return self.module(rows)[0].view_as(x)


class Rows(nn.Module):
    """A module of rows [N, H], on [..., H] too."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x.flatten(0, -2)).view_as(x)


def with_statistics_switched_off():
    norm = nn.InstanceNorm2d(H, track_running_stats=True).eval()
    norm.track_running_stats = False
    return OverChannels(norm)


MIXING = {
    "batch norm": lambda: OverChannels(nn.BatchNorm2d(H)),
    "SpeechBrain's batch norm": lambda: (
        speechbrain.nnet.normalization.BatchNorm2d(input_size=H)
    ),
    "without statistics": lambda: OverChannels(
        nn.BatchNorm2d(H, track_running_stats=False).eval()
    ),
    "instance norm": lambda: OverChannels(nn.InstanceNorm2d(H)),
    "instance norm that was one of statistics": with_statistics_switched_off,
    "recurrent": lambda: OverRows(nn.GRU(H, H, batch_first=True)),
    "recurrent cell": lambda: OverRows(nn.GRUCell(H, H)),
    "attention": lambda: OverRows(nn.MultiheadAttention(H, 2)),
    "group norm": lambda: OverChannels(nn.GroupNorm(2, H)),
    "convolution": lambda: OverChannels(nn.Conv2d(H, H, 3, padding=1)),
}


@pytest.mark.parametrize("name", MIXING)
@every_method
def test_modules_that_mix_cells_are_refused(options, name):
    joint = Joint(MIXING[name]())
    state = {k: v.clone() for k, v in joint.state_dict().items()}
    loss = TransducerJointLoss(joint, nn.Linear(H, V), **options)
    with pytest.raises(ValueError, match=r'joint\.behind.*method="batched"'):
        call(loss)
    for key, value in joint.state_dict().items():
        assert torch.equal(value, state[key])
    # What the message recommends works.
    loss.method = "batched"
    assert call(loss)[0].isfinite()


TAKE_ROWS_FOR_A_SEQUENCE = {
    "lstm": lambda: nn.LSTM(H, V),
    "attention": lambda: nn.MultiheadAttention(H, 2),
    "in a sequence": lambda: nn.Sequential(
        nn.Tanh(), nn.Sequential(nn.GRU(H, V))
    ),
}


@pytest.mark.parametrize("name", TAKE_ROWS_FOR_A_SEQUENCE)
@every_method
def test_classifiers_that_mix_rows_are_refused(options, name):
    loss = TransducerJointLoss(
        Transducer_joint(), TAKE_ROWS_FOR_A_SEQUENCE[name](), **options
    )
    with pytest.raises(ValueError, match=r'classifier.*method="batched"'):
        call(loss)


@every_method
def test_classifiers_may_call_a_recurrent_layer_on_each_row(options):
    class EachRow(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.GRU(H, V, batch_first=True)

        def forward(self, x):
            return self.layer(x.reshape(-1, 1, H))[0].view(*x.shape[:-1], V)

    torch.manual_seed(0)
    classifier = EachRow()
    values = [
        call(TransducerJointLoss(Transducer_joint(), classifier, **choice))[0]
        for choice in (options, {"method": "batched"})
    ]
    torch.testing.assert_close(*values)


@every_method
def test_batch_norm_of_the_classifier(options):
    norm = nn.BatchNorm1d(H)
    loss = TransducerJointLoss(
        Transducer_joint(), nn.Sequential(norm, nn.Linear(H, V)), **options
    )
    with pytest.raises(ValueError, match=r"classifier\.0 \(BatchNorm1d\)"):
        call(loss)
    assert norm.num_batches_tracked == 0


@every_method
def test_group_norm_of_the_classifier(options):
    """It treats each row by itself."""
    found = []
    for choice in (options, {"method": "batched"}):
        torch.manual_seed(0)
        layers = Rows(nn.GroupNorm(2, H)), nn.Linear(H, V)
        loss = TransducerJointLoss(
            Transducer_joint(), nn.Sequential(*layers), **choice
        )
        value, enc, _ = call(loss)
        value.backward()
        found.append((value, enc.grad, *(p.grad for p in loss.parameters())))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@every_method
def test_batch_norm_in_eval_mode(options):
    """Then it is the same for each cell."""
    norm = nn.BatchNorm2d(H).eval()
    with torch.no_grad():
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        norm.weight.uniform_(0.5, 2)
    found = []
    for choice in ({"method": "batched"}, options):
        torch.manual_seed(0)
        loss = TransducerJointLoss(
            Joint(OverChannels(norm)), nn.Linear(H, V), **choice
        ).double()
        enc, pred = torch.randn(2, 5, H).double(), torch.randn(2, 4, H).double()
        ones = torch.ones(2)
        value = loss(
            enc, pred, torch.tensor([[1, 2, 3], [4, 5, 6]]), ones, ones
        )
        found.append((value, *torch.autograd.grad(value, loss.parameters())))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@every_method
def test_buffers_that_change_in_each_call_are_refused(options):
    layer = spectral_norm(nn.Linear(H, V))
    state = {k: v.clone() for k, v in layer.state_dict().items()}
    loss = TransducerJointLoss(Joint(nn.Dropout(0.1)), layer, **options)
    torch.manual_seed(0)
    after = torch.get_rng_state()
    with pytest.raises(ValueError, match=r"_SpectralNorm\) changes its buffer"):
        call(loss)
    for key, value in layer.state_dict().items():
        assert torch.equal(value, state[key])
    # The inputs above are drawn from the seed; nothing else was.
    torch.set_rng_state(after)
    torch.randn(B, T, H), torch.randn(B, U + 1, H)
    torch.randint(1, V, (B, U))
    expected = torch.get_rng_state()
    with pytest.raises(ValueError):
        call(loss)
    assert torch.equal(torch.get_rng_state(), expected)
    layer.eval()
    call(loss)[0].backward()


class Reserved(nn.Module):
    """Has the name of a buffer, and a buffer in its place if it is filled."""

    def __init__(self, buffer, drops=False):
        super().__init__()
        self.register_buffer("table", buffer)
        self.drops = drops

    def forward(self, x):
        if self.drops:
            self.table = None
        return 2 * x


@every_method
def test_buffers_that_are_none_are_no_change(options):
    loss = TransducerJointLoss(
        Joint(Reserved(None)), nn.Linear(H, V), **options
    )
    value, enc, pred = call(loss)
    value.backward()
    assert value.isfinite() and enc.grad.isfinite().all()
    assert pred.grad.abs().sum() > 0


@every_method
def test_buffers_that_become_none_are_refused(options):
    module, table = Reserved(torch.ones(2), drops=True), torch.ones(2)
    module.table = table
    loss = TransducerJointLoss(Joint(module), nn.Linear(H, V), **options)
    with pytest.raises(ValueError, match=r"\(Reserved\) changes its buffer t"):
        call(loss)
    assert module.table is table


@every_method
def test_weights_that_change_in_each_call_are_refused(options):
    layer = speechbrain.nnet.linear.Linear(V, input_size=H, max_norm=0.1)
    before = layer.w.weight.detach().clone()
    loss = TransducerJointLoss(Transducer_joint(), layer, **options)
    with pytest.raises(ValueError, match=r"classifier \(Linear\).*max_norm"):
        call(loss)
    assert torch.equal(layer.w.weight, before)


@every_method
def test_weight_norm(options):
    found = []
    for choice in ({"method": "batched"}, options):
        torch.manual_seed(0)
        layer = weight_norm(nn.Linear(H, V).double())
        loss = TransducerJointLoss(Joint(nn.Identity()), layer, **choice)
        enc, pred = torch.randn(2, 5, H).double(), torch.randn(2, 4, H).double()
        ones = torch.ones(2)
        value = loss(
            enc, pred, torch.tensor([[1, 2, 3], [4, 5, 6]]), ones, ones
        )
        found.append(torch.autograd.grad(value, loss.parameters()))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    "classifier, size",
    [
        (nn.Linear(H, V), V),
        (speechbrain.nnet.linear.Linear(V, input_size=H), V),
        (nn.Sequential(nn.Linear(H, 3), nn.ReLU(), nn.Linear(3, V)), V),
        (nn.Sequential(nn.Linear(H, V), nn.LogSoftmax(-1)), None),
        (nn.Sequential(), None),
        (Opaque(nn.Linear(H, V)), None),
    ],
)
def test_declared_vocabulary(classifier, size):
    assert declared_vocabulary(classifier) == size


@pytest.mark.parametrize("opaque", [True, False])
@every_method
def test_forward_computes_each_cell_once(options, opaque):
    """No extra call to learn the size of the vocabulary."""
    layer = nn.Linear(H, V)
    classifier = Opaque(layer) if opaque else layer
    joint = Transducer_joint()
    loss = TransducerJointLoss(joint, classifier, reduction="nll", **options)
    rows = {"joint": 0, "classifier": 0}

    def count(name):
        def hook(module, args, output):
            rows[name] += output.shape[:-1].numel()

        return hook

    joint.register_forward_hook(count("joint"))
    layer.register_forward_hook(count("classifier"))
    call(loss)
    cells = 7 * 5 + 3 * 3 + 5 * 1
    assert rows == {"joint": cells, "classifier": cells}


@pytest.mark.parametrize("opaque", [True, False])
def test_targets_are_checked_once_for_each_size_that_is_known(
    opaque, monkeypatch
):
    """Each time the host waits for the device."""
    sizes = []

    def check(*args):
        sizes.append(args[-1])
        return check_counts(*args)

    monkeypatch.setattr(
        "sb_memeff.nnet.transducer_loss.joint_loss.check_counts", check
    )
    layer = nn.Linear(H, V)
    classifier = Opaque(layer) if opaque else layer
    call(TransducerJointLoss(Transducer_joint(), classifier, max_rows=10))
    assert sizes == ([None, V] if opaque else [V])


@every_method
def test_dropout_draws_for_the_cells_alone(options):
    """The global stream is where calls for these cells leave it."""
    loss = TransducerJointLoss(
        Joint(nn.Dropout(0.5)), nn.Linear(H, V), reduction="nll", **options
    )
    call(loss)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    torch.randn(B, T, H), torch.randn(B, U + 1, H), torch.randint(1, V, (B, U))
    sizes = [35, 9, 5] if options["method"] == "samplewise" else [10] * 4 + [9]
    for size in sizes:
        nn.functional.dropout(torch.ones(size, 1, 1, H), 0.5)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("opaque", [True, False])
@every_method
def test_wrong_targets_leave_no_trace(options, opaque):
    """Also where the size of the vocabulary is known after a tile only."""
    layer = nn.Linear(H, V)
    loss = TransducerJointLoss(
        Joint(nn.Dropout(0.5)), Opaque(layer) if opaque else layer, **options
    )
    targets = torch.ones(B, U, dtype=torch.long)
    targets[1, 1] = V
    torch.manual_seed(0)
    torch.randn(B, T, H), torch.randn(B, U + 1, H)
    expected = torch.get_rng_state()
    with pytest.raises(ValueError, match=f"Sample 1: target 1 is {V}.*{V} sym"):
        call(loss, targets)
    assert torch.equal(torch.get_rng_state(), expected)
    loss.blank_index = V
    with pytest.raises(ValueError, match=f"blank_index={V} is not in the voc"):
        call(loss)


class Calls:
    """A counter that is no attribute of a module."""

    count = 0


class HiddenState(nn.Module):
    """Computes something else each time, with a state kept elsewhere."""

    def forward(self, x):
        Calls.count += 1
        return x * (1 + 0.1 * Calls.count)


@pytest.mark.parametrize(
    "options",
    [
        {"max_rows": 10, "reduction": "nll_sum"},
        {"max_rows": 10, "reduction": "nll"},
        {"method": "samplewise", "reduction": "nll"},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_another_result_in_backward_is_noticed(dtype, options):
    Calls.count = 0
    loss = TransducerJointLoss(
        Joint(HiddenState()), nn.Linear(H, V), **options
    ).to(dtype)
    enc = torch.randn(2, 5, H, dtype=dtype, requires_grad=True)
    pred, ones = torch.randn(2, 4, H, dtype=dtype), torch.ones(2)
    targets = torch.tensor([[1, 2, 3], [4, 5, 6]])
    with pytest.raises(RuntimeError, match="other logits in backward"):
        loss(enc, pred, targets, ones, ones).sum().backward()
    assert enc.grad is None


class Scaled(nn.Module):
    """Computes something else when a number kept elsewhere is another one."""

    def forward(self, x):
        return x * Calls.count


class OtherInOneCall(nn.Module):
    """Computes something else in one of its calls."""

    def __init__(self, number):
        super().__init__()
        self.number = number

    def forward(self, x):
        Calls.count += 1
        return x * (2 if Calls.count == self.number else 1)


@pytest.mark.parametrize("sample", range(B))
def test_another_result_of_one_sample_is_noticed(sample):
    """Though those before and after it come out as they were."""
    Calls.count = 0
    loss = TransducerJointLoss(
        # Backward begins when each sample has been computed once.
        Joint(OtherInOneCall(B + 1 + sample)),
        nn.Linear(H, V),
        method="samplewise",
        reduction="nll",
    )
    value, enc, _ = call(loss)
    with pytest.raises(RuntimeError, match="other logits in backward"):
        value.sum().backward()
    assert enc.grad is None


@every_method
def test_another_result_in_a_second_backward_is_noticed(options):
    joint = Joint(nn.Identity())
    loss = TransducerJointLoss(joint, nn.Linear(H, V), **options)
    value, enc, _ = call(loss)
    value.backward(retain_graph=True)
    first = enc.grad.clone()
    joint.behind = HiddenState()
    with pytest.raises(RuntimeError, match="between forward|other logits"):
        value.backward()
    assert torch.equal(enc.grad, first)


@every_method
def test_another_result_in_all_of_a_second_backward_is_noticed(options):
    """Its cells agree with each other, but not with those of forward."""
    Calls.count = 1
    loss = TransducerJointLoss(Joint(Scaled()), nn.Linear(H, V), **options)
    value, enc, _ = call(loss)
    value.backward(retain_graph=True)
    first = enc.grad.clone()
    Calls.count = 2
    with pytest.raises(RuntimeError, match="other logits"):
        value.backward()
    assert torch.equal(enc.grad, first)
