"""The transducer loss without logits, against the one with all of them.

Authors
 * The sb_memeff authors 2026
"""

import copy
import logging

import pytest
import torch
from speechbrain.nnet.linear import Linear
from speechbrain.nnet.transducer.transducer_joint import Transducer_joint
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sb_memeff.memory.tracker import StorageTracker
from sb_memeff.nnet.transducer_loss.batch import REDUCTIONS
from sb_memeff.nnet.transducer_loss.joint_loss import TransducerJointLoss
from tests.unittests.two_processes import run_in_two_processes

H, V = 12, 11
FRAMES = torch.tensor([20, 1, 7, 13, 20]) / 20
COUNTS = torch.tensor([8, 0, 3, 8, 1]) / 8
METHODS = {
    "samplewise": {"method": "samplewise"},
    # 13 rows: of no lattice's size.
    "tiled": {"max_rows": 13, "occupancy_floor": 0.0},
    "sparse": {"max_rows": 13, "occupancy_floor": 1e-12},
    "one_tile": {"occupancy_floor": 0.0},
}
every_method = pytest.mark.parametrize("options", METHODS.values(), ids=METHODS)
every_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)


def inputs(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    enc, pred = (
        torch.randn(5, n, H, generator=generator, dtype=torch.float64)
        .to(dtype)
        .requires_grad_()
        for n in (20, 9)
    )
    targets = torch.randint(1, V, (5, 8), generator=generator)
    return enc, pred, targets


def modules(kind="sum", dtype=torch.float64):
    torch.manual_seed(0)
    if kind == "sum":
        joint = Transducer_joint(nonlinearity=nn.GELU)
        classifier = Linear(input_size=H, n_neurons=V, bias=False)
    elif kind == "concat":
        joint = Transducer_joint(
            nn.Linear(2 * H, 7), "concat", nonlinearity=nn.Tanh
        )
        classifier = nn.Linear(7, V)
    else:
        joint = Transducer_joint()
        classifier = nn.Sequential(
            nn.Linear(H, 9), nn.Dropout(0.4), nn.ReLU(), nn.Linear(9, V)
        )
    return joint.to(dtype), classifier.to(dtype)


def weights_of(loss):
    """Sums of the samples' losses that a user might form, negative ones too."""
    weights = torch.tensor([0.5, 0.0, -2.0, 1.0, 0.25], dtype=loss.dtype)
    return (loss * weights).sum() if loss.dim() else 3 * loss


def gradients(made, loss, enc, pred, *lens):
    targets = lens[0] if lens else inputs()[2]
    value = loss(enc, pred, targets, FRAMES, COUNTS)
    return value, torch.autograd.grad(
        weights_of(value), [enc, pred, *made.parameters()]
    )


def both(kind="sum", dtype=torch.float64, reduction="nll", **options):
    """Values and gradients of a method and of the reference."""
    found = []
    for choice in (options, {"method": "batched"}):
        joint, classifier = modules(kind, dtype)
        extra = {
            k: v
            for k, v in options.items()
            if k in ("clamp", "fastemit_lambda", "blank_index")
        }
        loss = TransducerJointLoss(
            joint, classifier, reduction=reduction, **{**extra, **choice}
        )
        found.append(gradients(loss, loss, *inputs(dtype)))
    return found


def check(found, rtol, atol):
    (value, ours), (expected, theirs) = found
    assert torch.allclose(value, expected, rtol=rtol, atol=atol)
    for a, b in zip(ours, theirs):
        assert torch.allclose(a, b, rtol=0, atol=atol + rtol * b.abs().max())


@every_method
@every_reduction
@pytest.mark.parametrize("kind", ["sum", "concat"])
def test_float64(options, reduction, kind):
    check(both(kind, reduction=reduction, **options), 1e-9, 1e-9)


@every_method
def test_float32(options):
    check(both("concat", torch.float32, **options), 1e-5, 1e-6)


@every_method
def test_clamp_fastemit_and_blank(options):
    options = {**options, "clamp": 0.1, "fastemit_lambda": 0.3}
    for reduction in ("nll", "nll_mean"):
        check(both(reduction=reduction, **options), 1e-9, 1e-9)


@every_method
def test_bfloat16_is_as_close_as_the_batched_path(options):
    joint, classifier = modules("concat")
    loss = TransducerJointLoss(
        joint, classifier, reduction="nll", method="batched"
    )
    half = [p.bfloat16().double() for p in loss.parameters()]
    exact = copy.deepcopy(loss)
    for p, q in zip(exact.parameters(), half):
        p.data = q
    wide = [
        x.detach().double().requires_grad_() for x in inputs(torch.bfloat16)[:2]
    ]
    _, truth = gradients(exact, exact, *wide)
    errors = []
    for choice in (options, {"method": "batched"}):
        made = TransducerJointLoss(
            *modules("concat", torch.bfloat16), reduction="nll", **choice
        )
        _, found = gradients(made, made, *inputs(torch.bfloat16)[:2])
        errors.append(
            [
                ((a.double() - b).norm() / b.norm()).item()
                for a, b in zip(found, truth)
            ]
        )
    for ours, theirs in zip(*errors):
        # Of 75 tiles, added up in float32 and rounded once, as batched is.
        assert ours < 1.05 * theirs


@every_method
def test_backward_outside_autocast(options):
    """As SpeechBrain's Brain does it."""
    found = []
    for choice in (options, {"method": "batched"}):
        joint, classifier = modules("concat", torch.float32)
        loss = TransducerJointLoss(
            joint, classifier, reduction="nll_sum", **choice
        )
        enc, pred, targets = inputs(torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(enc, pred, targets, FRAMES, COUNTS)
        found.append(
            (value, torch.autograd.grad(value, [enc, pred, *loss.parameters()]))
        )
    check(found, 2e-2, 1e-2)
    assert all(g.dtype == torch.float32 for g in found[0][1])


@pytest.mark.parametrize("reduction", ["nll", "nll_sum"])
@every_method
def test_dropout_is_the_same_in_recompute(options, reduction):
    """Against autograd through the very masks that forward drew."""
    joint, classifier = modules("dropout")
    loss = TransducerJointLoss(
        joint, classifier, reduction=reduction, **options
    )
    enc, pred, targets = inputs()

    def value():
        torch.manual_seed(3)
        return weights_of(loss(enc, pred, targets, FRAMES, COUNTS))

    first = value()
    after = torch.rand(3)
    direction = torch.randn_like(enc)
    gradient = torch.autograd.grad(first, enc)[0]
    torch.manual_seed(3)
    loss(enc, pred, targets, FRAMES, COUNTS)
    assert torch.equal(after, torch.rand(3))
    # The masks depend on the seed alone: finite differences hold them.
    with torch.no_grad():
        step = 1e-6
        enc += step * direction
        up = value()
        enc -= 2 * step * direction
        down = value()
    slope = (up - down) / (2 * step)
    assert slope.item() == pytest.approx(
        (gradient * direction).sum().item(), rel=1e-5
    )


@every_method
def test_hooks_on_weights_and_inputs_run_once(options):
    joint, classifier = modules()
    loss = TransducerJointLoss(joint, classifier, **options)
    enc, pred, targets = inputs()
    calls = []
    for x in (classifier.w.weight, enc):
        x.register_hook(lambda g: calls.append(g.shape))
    loss(enc, pred, targets, FRAMES, COUNTS).backward()
    assert sorted(calls) == sorted([classifier.w.weight.shape, enc.shape])


@every_method
def test_frozen_parts(options):
    joint, classifier = modules("concat")
    loss = TransducerJointLoss(joint, classifier, **options)
    enc, pred, targets = inputs()
    classifier.bias.requires_grad_(False)
    value = loss(enc.detach(), pred, targets, FRAMES, COUNTS)
    value.backward()
    assert enc.grad is None and classifier.bias.grad is None
    assert pred.grad is not None and classifier.weight.grad is not None


@every_method
def test_no_gradients_without_need(options):
    loss = TransducerJointLoss(*modules(), **options)
    enc, pred, targets = inputs()
    expected = loss(enc, pred, targets, FRAMES, COUNTS)
    with torch.no_grad():
        value = loss(enc, pred, targets, FRAMES, COUNTS)
    assert torch.equal(value, expected) and not value.requires_grad


@pytest.mark.parametrize("reduction", ["nll", "nll_mean"])
@pytest.mark.parametrize("kind", ["sum", "dropout"])
@every_method
def test_second_backward(options, kind, reduction):
    loss = TransducerJointLoss(*modules(kind), reduction=reduction, **options)
    enc, pred, targets = inputs()
    value = weights_of(loss(enc, pred, targets, FRAMES, COUNTS))
    some = [enc, pred, *loss.parameters()]
    first = torch.autograd.grad(value, some, retain_graph=True)
    copies = [g.clone() for g in first]
    second = torch.autograd.grad(2 * value, some)
    for one, two, copy_ in zip(first, second, copies):
        assert torch.equal(one, copy_)
        torch.testing.assert_close(two, 2 * one, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"method": "samplewise"}])
def test_memory_does_not_grow_with_the_batch(options):
    """But for enc, pred and their gradients."""
    extra = []
    for batch in (1, 16, 64):
        joint = Transducer_joint(nonlinearity=nn.GELU)
        loss = TransducerJointLoss(
            joint, nn.Linear(24, 200), max_rows=128, **options
        )
        enc = torch.randn(batch, 60, 24, requires_grad=True)
        pred = torch.randn(batch, 11, 24, requires_grad=True)
        targets = torch.randint(1, 200, (batch, 10))
        lens = torch.ones(batch)
        given = [enc, pred, *loss.parameters()]
        with StorageTracker(exclude=[*given, targets, lens]) as tracker:
            value = loss(enc, pred, targets, lens, lens)
            found = torch.autograd.grad(value, given)
        extra.append(tracker.peak - sum(g.nbytes for g in found))
    # A few numbers of each sample, and at most 64 tiles' planes.
    assert extra[2] - extra[1] < 64 * 1000


@pytest.mark.parametrize("reduction", ["nll_sum", "nll"])
@every_method
def test_memory(options, reduction):
    """Tiles are all that is alive, however many samples and frames."""
    tile = {**options}
    if "max_rows" in tile:
        tile["max_rows"] = 100
    peaks = []
    for frames in (50, 200):
        joint = Transducer_joint(nonlinearity=nn.Tanh)
        classifier = nn.Linear(16, 300)
        loss = TransducerJointLoss(
            joint, classifier, reduction=reduction, **tile
        )
        enc = torch.randn(3, frames, 16, requires_grad=True)
        pred = torch.randn(3, 11, 16, requires_grad=True)
        targets = torch.randint(1, 300, (3, 10))
        with StorageTracker() as tracker:
            loss(
                enc, pred, targets, torch.ones(3), torch.ones(3)
            ).sum().backward()
        peaks.append(tracker.peak)
    logits = 4 * 300 * 3 * 11 * torch.tensor([50, 200])
    if "max_rows" in tile:
        # Planes and gradients of encoder rows grow; logits do not.
        assert peaks[1] - peaks[0] < 0.2 * (logits[1] - logits[0])
        assert peaks[1] < 0.5 * logits[1]
    elif options.get("method") == "samplewise":
        assert peaks[1] < 1.7 * logits[1]


def test_three_numbers_of_each_cell_wait_for_backward():
    """Where each sample has a weight of its own, and nothing else does."""
    loss = TransducerJointLoss(
        Transducer_joint(nonlinearity=nn.Tanh),
        nn.Linear(4, 6),
        reduction="nll",
    )
    enc = torch.randn(2, 200, 4, requires_grad=True)
    pred = torch.randn(2, 41, 4, requires_grad=True)
    targets, lens = torch.randint(1, 6, (2, 40)), torch.ones(2)
    given = [enc, pred, targets, lens, *loss.parameters()]
    with StorageTracker(exclude=given) as tracker:
        value = loss(enc, pred, targets, lens, lens)
    numbers = tracker.alive / 4 / (2 * 200 * 41)
    assert value.requires_grad and 3 <= numbers < 3.5


def test_sparse_backward_leaves_little_out():
    """A peaked model: few cells, the same gradient to float32."""
    torch.manual_seed(0)
    joint, classifier = modules(dtype=torch.float32)
    enc, pred, targets = inputs(torch.float32)
    with torch.no_grad():
        classifier.w.weight *= 20
    found, rows = [], []
    for floor in (0.0, 1e-8):
        loss = TransducerJointLoss(
            joint, classifier, reduction="nll", occupancy_floor=floor
        )
        value = loss(enc, pred, targets, FRAMES, COUNTS)
        seen = []
        handle = classifier.register_forward_hook(
            lambda m, args, out, seen=seen: seen.append(len(args[0]))
        )
        found.append(
            torch.autograd.grad(
                weights_of(value), [enc, pred, *loss.parameters()]
            )
        )
        handle.remove()
        rows.append(sum(seen))
    assert rows[1] < 0.6 * rows[0]
    for a, b in zip(*found):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-6 * a.abs().max())


@pytest.mark.parametrize("kind", ["sum", "dropout"])
@every_method
def test_sample_that_is_not_finite(options, kind, caplog):
    loss = TransducerJointLoss(*modules(kind), reduction="nll", **options)
    if kind == "dropout":
        # Which changes nothing, but the exponential of a logit is infinite.
        torch.nn.init.constant_(loss.classifier[-1].bias, 1000.0)
    enc, pred, targets = inputs()
    bad = enc.detach().clone()
    bad[2, 3] = torch.nan
    bad.requires_grad_()
    torch.manual_seed(1)
    with caplog.at_level(logging.WARNING):
        value = loss(bad, pred, targets, FRAMES, COUNTS)
    assert "loss of sample 2 of the batch is not finite" in caplog.text
    assert value.isfinite().tolist() == [True, True, False, True, True]
    found = torch.autograd.grad(
        value[value.isfinite()].sum(), [bad, pred, *loss.parameters()]
    )
    torch.manual_seed(1)
    clean = loss(enc, pred, targets, FRAMES, COUNTS)[[0, 1, 3, 4]].sum()
    expected = torch.autograd.grad(clean, [enc, pred, *loss.parameters()])
    for a, b in zip(found, expected):
        assert torch.allclose(a, b, atol=1e-12)


INTEGERS = [
    torch.int8,
    torch.int16,
    torch.int32,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
]


@pytest.mark.parametrize("dtype", INTEGERS)
@every_method
def test_targets_of_any_integer_dtype(options, dtype):
    targets = inputs()[2]
    assert targets.unique().numel() > 2
    found = []
    for some in (targets, targets.to(dtype)):
        loss = TransducerJointLoss(*modules(), **options)
        enc, pred, _ = inputs()
        value, grads = gradients(loss, loss, enc, pred, some)
        found.append((value, *grads))
    for a, b in zip(*found):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "options", [*METHODS.values(), {"occupancy_floor": 0.9, "max_rows": 13}]
)
@pytest.mark.parametrize("reduction", ["nll", "nll_sum"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_sample_that_is_not_finite_and_is_kept(options, reduction, bad):
    """Its NaN comes out, also if the floor leaves out nearly all cells."""
    loss = TransducerJointLoss(*modules(), reduction=reduction, **options)
    enc, pred, targets = inputs()
    with torch.no_grad():
        enc[2, 3] = bad
    value = loss(enc, pred, targets, FRAMES, COUNTS)
    found = torch.autograd.grad(value.sum(), [enc, pred, *loss.parameters()])
    for gradient in found[:2]:
        assert gradient[2].isnan().any()
        assert gradient[[0, 1, 3, 4]].isfinite().all()
    assert all(g.isnan().any() for g in found[2:])


@pytest.mark.parametrize("options", [*METHODS.values(), {"method": "batched"}])
def test_the_last_frame_and_the_last_target_are_no_padding(options):
    """Non-finite values there come out."""
    loss = TransducerJointLoss(*modules(), reduction="nll", **options)
    for which, last in enumerate((6, 3)):
        *given, targets = inputs()
        with torch.no_grad():
            given[which][2, last] = torch.nan
        value = loss(*given, targets, FRAMES, COUNTS)
        assert value.isfinite().tolist() == [True, True, False, True, True]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("options", [*METHODS.values(), {"method": "batched"}])
def test_padding_has_no_influence(options, bad):
    found = []
    # Padded with the blank, as SpeechBrain does it, or with what is no symbol.
    for symbol in (None, 0, -5, V):
        loss = TransducerJointLoss(*modules("concat"), **options)
        enc, pred, targets = inputs()
        if symbol is not None:
            with torch.no_grad():
                for b in range(5):
                    enc[b, int((20 * FRAMES[b]).round()) :] = bad
                    pred[b, int((8 * COUNTS[b]).round()) + 1 :] = bad
                    targets[b, int((8 * COUNTS[b]).round()) :] = symbol
        value, grads = gradients(loss, loss, enc, pred, targets)
        found.append((value, *grads))
    for clean, *others in zip(*found):
        for soiled in others:
            torch.testing.assert_close(soiled, clean, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
@every_method
def test_values_alone_compute_each_cell_once(options, off):
    joint, classifier = modules()
    loss = TransducerJointLoss(
        joint, classifier, reduction="nll_sum", **options
    )
    enc, pred, targets = inputs()
    expected = loss(enc, pred, targets, FRAMES, COUNTS)
    rows = []
    classifier.register_forward_hook(lambda m, args, y: rows.append(len(y)))
    with off():
        value = loss(enc, pred, targets, FRAMES, COUNTS)
    assert torch.equal(value, expected)
    frames, counts = (20 * FRAMES).round(), (8 * COUNTS).round()
    assert sum(rows) == (frames * (counts + 1)).sum()


@pytest.mark.parametrize("reduction", ["nll", "nll_sum"])
@every_method
def test_changes_between_forward_and_backward(options, reduction):
    """autograd finds them, also where gradients were formed in forward."""
    for name in ("enc", "pred", "weight"):
        joint, classifier = modules()
        loss = TransducerJointLoss(
            joint, classifier, reduction=reduction, **options
        )
        enc, pred, targets = (x.clone() for x in inputs())
        value = loss(enc, pred, targets, FRAMES, COUNTS).sum()
        changed = {"enc": enc, "pred": pred, "weight": classifier.w.weight}
        with torch.no_grad():
            changed[name].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace"):
            value.backward()
        assert classifier.w.weight.grad is None


@every_method
def test_other_modes_or_weights_in_backward(options):
    """Where backward computes cells again, it must find what forward had."""
    joint, classifier = modules("dropout")
    loss = TransducerJointLoss(joint, classifier, reduction="nll", **options)
    enc, pred, targets = inputs()
    value = loss(enc, pred, targets, FRAMES, COUNTS).sum()
    classifier[1].eval()
    with pytest.raises(
        RuntimeError, match=r"eval\(\) of classifier\.1 was called"
    ):
        value.backward(retain_graph=True)
    classifier[1].train()
    classifier[0].weight.data = classifier[0].weight.data.clone()
    with pytest.raises(
        RuntimeError, match=r"classifier\.0\.weight was changed"
    ):
        value.backward()
    assert enc.grad is None


@every_method
def test_no_double_backward(options):
    loss = TransducerJointLoss(*modules(), **options)
    enc, pred, targets = inputs()
    value = loss(enc, pred, targets, FRAMES, COUNTS)
    # Beside another term the missing derivative would not be noticed.
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(value, enc, create_graph=True)


@every_method
def test_no_targets_at_all(options):
    """U = 0: one column of cells."""
    found = []
    for choice in ({"method": "batched"}, options):
        loss = TransducerJointLoss(*modules(), **choice)
        enc, pred, _ = inputs()
        none = torch.empty(5, 0, dtype=torch.long)
        value = loss(enc, pred[:, :1], none, FRAMES, torch.ones(5))
        found.append((value, *torch.autograd.grad(value, [enc, pred])))
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def gradients_under_ddp(rank):
    """Of each method, in each mode of DDP."""
    found = {}
    for mode in (None, "find_unused_parameters", "static_graph"):
        for name, options in METHODS.items():
            loss = TransducerJointLoss(
                *modules("concat"), reduction="nll_sum", **options
            )
            wrapped = DistributedDataParallel(
                loss, **({} if mode is None else {mode: True})
            )
            enc, pred, targets = inputs(seed=rank)
            # static_graph learns in the first step and must hold in the second.
            for _ in range(2):
                loss.zero_grad()
                wrapped(enc, pred, targets, FRAMES, COUNTS).backward()
            found[name, mode] = [p.grad for p in loss.parameters()]
    return found


def test_two_processes(tmp_path):
    found = run_in_two_processes(gradients_under_ddp, tmp_path)
    loss = TransducerJointLoss(
        *modules("concat"), reduction="nll_sum", method="batched"
    )
    for seed in range(2):
        enc, pred, targets = inputs(seed=seed)
        (loss(enc, pred, targets, FRAMES, COUNTS) / 2).backward()
    for key in found[0]:
        for a, b, p in zip(found[0][key], found[1][key], loss.parameters()):
            assert torch.equal(a, b)
            assert torch.allclose(a, p.grad, atol=1e-9)


def call(loss=None, **changes):
    enc, pred, targets = inputs()
    arguments = {
        "enc": enc,
        "pred": pred,
        "targets": targets,
        "enc_lens": FRAMES,
        "target_lens": COUNTS,
    }
    loss = loss or TransducerJointLoss(*modules())
    return loss(**{**arguments, **changes})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"enc": torch.zeros(5, 20)}, r"enc must be \[B, T, H\]"),
        ({"enc": torch.zeros(0, 20, H)}, "not empty"),
        ({"pred": torch.zeros(5, 8, H)}, r"\[B, U\+1, H\] = \[5, 9, H\]"),
        ({"pred": torch.zeros(5, 9, H)}, "torch.float64 and torch.float32"),
        (
            {
                "enc": torch.zeros(5, 20, H).long(),
                "pred": torch.zeros(5, 9, H).long(),
            },
            "floating-point dtype, not torch.int64 and torch.int64",
        ),
        ({"targets": torch.zeros(5, 8)}, "integers, not torch.float32"),
        ({"targets": torch.ones(5, 8).bool()}, "integers, not torch.bool"),
        ({"targets": torch.ones(5, 8).cfloat()}, "integers, not torch.comp"),
        ({"targets": -torch.ones(5, 8).long()}, "Sample 0: target 0 is -1"),
        ({"enc_lens": FRAMES * torch.nan}, "Sample 0: its length in frames"),
        ({"target_lens": -COUNTS}, "Sample 0: its length in targets, -1"),
        ({"targets": torch.ones(4, 8).long()}, "B = 5"),
        (
            {"targets": torch.zeros(5, 8).long()},
            "Sample 0: target 0 is 0.*blank",
        ),
        ({"targets": torch.full((5, 8), V)}, "Sample 0: target 0 is 11"),
        ({"enc_lens": FRAMES * 20}, "Sample 0.*relative"),
        ({"enc_lens": FRAMES * 0}, "Sample 0 has no frame"),
        ({"enc_lens": FRAMES[:4]}, r"enc_lens must be \[B\]"),
        ({"target_lens": COUNTS.to("meta")}, "one device"),
        ({"targets": torch.ones(5, 8).long().to("meta")}, "one device"),
        (
            {
                "enc": torch.zeros(5, 20, H, device="meta"),
                "pred": torch.zeros(5, 9, H, device="meta"),
            },
            "enc, pred, targets and lengths must be on one device",
        ),
        ({"enc_lens": FRAMES.cfloat()}, "in frames must be real"),
    ],
)
def test_clear_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        call(**changes)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"method": "pruned"}, "method='pruned'"),
        ({"max_rows": 0}, "max_rows=0"),
        ({"occupancy_floor": 1.0}, "occupancy_floor=1.0"),
        ({"reduction": "batchmean"}, "reduction='batchmean'"),
    ],
)
def test_clear_errors_of_the_yaml(options, message):
    with pytest.raises(ValueError, match=message):
        TransducerJointLoss(*modules(), **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_lengths_that_cannot_tell_frames_apart(dtype):
    """1021 of 2048 frames is 1020 or 1024 in half precision."""
    loss = TransducerJointLoss(*modules())
    enc, pred = torch.zeros(1, 2048, H).double(), torch.zeros(1, 2, H).double()
    lens = torch.tensor([1021 / 2048])
    arguments = enc, pred, torch.ones(1, 1).long()
    with pytest.raises(ValueError, match="float32"):
        loss(*arguments, lens.to(dtype), torch.ones(1))
    short = enc[:, :100], pred, torch.ones(1, 1).long()
    lens = torch.tensor([37 / 100])
    value = loss(*short, lens, torch.ones(1))
    assert torch.equal(loss(*short, lens.to(dtype), torch.ones(1)), value)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool])
def test_full_lengths_of_any_dtype(dtype):
    """More frames and targets than a number of that dtype can count."""
    loss = TransducerJointLoss(*modules())
    enc, pred = torch.randn(1, 300, H).double(), torch.randn(1, 271, H).double()
    arguments = enc, pred, torch.ones(1, 270).long()
    one = torch.ones(1)
    value = loss(*arguments, one.to(dtype), one.to(dtype))
    assert torch.equal(value, loss(*arguments, one, one))


def test_blank_outside_the_vocabulary():
    with pytest.raises(ValueError, match="blank_index=11"):
        call(TransducerJointLoss(*modules(), blank_index=11))
