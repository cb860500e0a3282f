"""Both transducer losses on random batches, against their definition in float64.

Authors
 * The sb_memeff authors 2026
"""

import copy

import pytest
import torch
from hypothesis import (
    given,
    strategies as st,
)
from speechbrain.nnet.linear import Linear
from speechbrain.nnet.transducer.transducer_joint import Transducer_joint
from torch import nn

from sb_memeff.nnet.transducer_loss import TransducerJointLoss, transducer_loss
from tests.unittests.nnet.transducer_loss.lattices import (
    batches,
    negative_log_likelihoods,
    reduced,
    targets_and_lengths,
    upstream,
)
from tests.unittests.random_configurations import (
    NOT_COUNTS,
    NOT_SWITCHES,
    assert_ours,
    examples,
    laid_out,
    layouts,
    tensor,
)

# Rounding of values and of gradients, relative to the largest.
TOLERANCES = {
    torch.float64: (1e-11, 1e-10),
    torch.float32: (1e-5, 1e-5),
    torch.bfloat16: (1e-5, 1e-2),
    torch.float16: (1e-5, 2e-3),
}


def assert_close(found, expected, tolerance):
    found, expected = found.detach().double(), expected.detach().double()
    assert found.shape == expected.shape
    finite = expected[expected.isfinite()].abs()
    bound = tolerance * max([1.0, *finite.tolist()])
    same = (found == expected) | ((found - expected).abs() <= bound)
    assert same.all(), (found, expected)


def reference(logits, batch):
    """Value of the loss, and gradient of the logits for ``upstream``."""
    leaf = logits.detach().double().requires_grad_()
    nll = negative_log_likelihoods(leaf, batch)
    gradient = torch.zeros_like(leaf)
    if nll.requires_grad:
        (gradient,) = torch.autograd.grad(nll.sum(), leaf)
    if batch["clamp"] is not None:
        gradient = gradient.clamp(-batch["clamp"], batch["clamp"])
    value, weights = reduced(
        nll.detach() * (1 + batch["fastemit_lambda"]),
        [frames for frames, _ in batch["samples"]],
        batch["reduction"],
    )
    weights = weights * upstream(batch)
    return value, gradient * weights[:, None, None, None]


@given(
    batches(),
    st.sampled_from(list(TOLERANCES)),
    st.booleans(),
    st.sampled_from(["", "", "impossible", "nan", "padding"]),
)
@examples(50)
def test_loss_on_logits(batch, dtype, overwrite, special):
    shape = (len(batch["samples"]), batch["rows"], batch["columns"] + 1)
    logits = tensor(
        (*shape, batch["vocabulary"]), batch["seed"], dtype, batch["scale"]
    )
    if special == "impossible":
        logits[0, 0, 0, :-1] = -torch.inf
    elif special == "nan":
        logits[0, 0, 0, 0] = torch.nan
    elif special == "padding":
        for b, (frames, labels) in enumerate(batch["samples"]):
            logits[b, frames:] = torch.nan
            logits[b, :, len(labels) + 1 :] = torch.inf
    if special:
        batch = {**batch, "layout": "contiguous"}
    logits = laid_out(logits, batch["layout"]).requires_grad_()
    expected, gradient = reference(logits, batch)
    targets, *lengths = targets_and_lengths(batch)
    loss = transducer_loss(
        logits,
        targets,
        *lengths,
        batch["blank"],
        batch["reduction"],
        batch["fastemit_lambda"],
        batch["clamp"],
        overwrite_logits=overwrite,
    )
    (found,) = torch.autograd.grad(loss, logits, upstream(batch).to(loss))
    of_value, of_gradient = TOLERANCES[dtype]
    if special == "nan":
        # Nothing of the sample counts, and all of the others.
        if loss.dim():
            assert not loss[0].isfinite()
            assert_close(loss[1:], expected[1:], of_value)
        else:
            assert not loss.isfinite()
        assert_close(found[1:], gradient[1:], of_gradient)
        return
    assert_close(loss, expected, of_value)
    assert_close(found, gradient, of_gradient)


JOINTS = ("leaky", "gelu", "none", "concat", "norm", "tied")


def modules(kind, hidden, vocabulary):
    """A joint network and a classifier, in float64."""
    torch.manual_seed(0)
    joint = {
        "gelu": lambda: Transducer_joint(nonlinearity=nn.GELU),
        "none": lambda: Transducer_joint(nonlinearity=nn.Identity),
        "concat": lambda: Transducer_joint(
            nn.Linear(2 * hidden, hidden), "concat", nonlinearity=nn.Tanh
        ),
    }.get(kind, Transducer_joint)()
    classifier = nn.Linear(hidden, vocabulary)
    if kind == "gelu":
        classifier = Linear(input_size=hidden, n_neurons=vocabulary, bias=False)
    elif kind == "norm":
        classifier = nn.Sequential(nn.LayerNorm(hidden), nn.ReLU(), classifier)
    elif kind == "tied":
        first = nn.Linear(hidden, hidden)
        last = nn.Linear(hidden, hidden)
        last.weight = first.weight
        classifier = nn.Sequential(first, nn.Tanh(), last)
        classifier.append(nn.Linear(hidden, vocabulary))
    return joint.double(), classifier.double()


@st.composite
def joint_batches(draw):
    """Of batches, what the loss with a joint network adds."""
    method = draw(st.sampled_from(["tiled", "samplewise"]))
    options = {"method": method}
    if method == "tiled":
        options["max_rows"] = draw(st.sampled_from([None, 1, 2, 7, 30]))
        options["occupancy_floor"] = draw(st.sampled_from([0.0, 1e-12]))
    return {
        **draw(batches()),
        "joint": draw(st.sampled_from(JOINTS)),
        "hidden": draw(st.integers(1, 5)),
        "dtype": draw(st.sampled_from([torch.float64, torch.float32])),
        "pred_layout": draw(layouts),
        "options": options,
        # Which of encoder, predictor and weights get no gradient.
        "frozen": draw(st.sets(st.integers(0, 4), max_size=3)),
        "special": draw(st.sampled_from(["", "", "", "nan", "padding"])),
    }


@given(joint_batches())
@examples(50)
def test_loss_without_logits(batch):
    joint, classifier = modules(
        batch["joint"], batch["hidden"], batch["vocabulary"]
    )
    exact = nn.ModuleList([joint, classifier])
    ours = copy.deepcopy(exact).to(batch["dtype"])
    enc, pred = (
        laid_out(
            tensor(
                (len(batch["samples"]), n, batch["hidden"]),
                batch["seed"] + n,
                batch["dtype"],
                batch["scale"],
            ),
            layout,
        )
        for n, layout in (
            (batch["rows"], batch["layout"]),
            (batch["columns"] + 1, batch["pred_layout"]),
        )
    )
    if batch["special"] == "nan":
        enc = enc.clone()
        enc[0, 0, 0] = torch.nan
    elif batch["special"] == "padding":
        enc, pred = enc.clone(), pred.clone()
        for b, (frames, labels) in enumerate(batch["samples"]):
            enc[b, frames:] = torch.nan
            pred[b, len(labels) + 1 :] = torch.inf
    leaves = []
    for x, weights in ((enc, ours), (enc.double(), exact)):
        mine = [x.detach(), pred.detach().to(x.dtype), *weights.parameters()]
        for number, leaf in enumerate(mine):
            leaf.requires_grad_(number not in batch["frozen"])
        leaves.append(mine)
    targets, *lengths = targets_and_lengths(batch)
    loss = TransducerJointLoss(
        *ours,
        blank_index=batch["blank"],
        reduction=batch["reduction"],
        fastemit_lambda=batch["fastemit_lambda"],
        clamp=batch["clamp"],
        **batch["options"],
    )(*leaves[0][:2], targets, *lengths)

    wide = [x.nan_to_num(0.0, 0.0) for x in leaves[1][:2]]
    logits = exact[1](exact[0](wide[0].unsqueeze(2), wide[1].unsqueeze(1)))
    expected, of_logits = reference(logits, batch)
    tolerance = 1e-9
    if batch["dtype"] == torch.float32:
        # A probability near 1 has the rounding error of its logit.
        tolerance = 2e-5 * max(1.0, batch["scale"]) ** 2
    if batch["special"] == "nan":
        if loss.dim():
            assert not loss[0].isfinite()
            assert_close(loss[1:], expected[1:], tolerance)
        else:
            assert not loss.isfinite()
        return
    assert_close(loss, expected, tolerance)
    ours, theirs = ([x for x in some if x.requires_grad] for some in leaves)
    assert loss.requires_grad == bool(ours)
    if not ours:
        return
    found = torch.autograd.grad(
        loss, ours, upstream(batch).to(loss), allow_unused=True
    )
    gradients = torch.autograd.grad(
        logits, theirs, of_logits, allow_unused=True
    )
    for x, a, b in zip(ours, found, gradients):
        a, b = (torch.zeros_like(x) if g is None else g for g in (a, b))
        assert_close(a, b, tolerance)


BATCH = {
    "targets": torch.tensor([[1, 2], [3, 1]]),
    "target_lens": torch.ones(2),
    "blank_index": 0,
}
NAN = float("nan")
SETTINGS = [
    ("blank_index", *NOT_COUNTS, 4),
    ("reduction", "batchmean", None, 3, ["nll"], True),
    ("fastemit_lambda", "0.1", None, -0.1, NAN, float("inf"), True, [0.1]),
    ("clamp", "1", 0, -1.0, NAN, True, [1.0]),
]
TENSORS = [
    ("targets", [[1, 2], [3, 1]], None),
    (
        "targets",
        torch.ones(2, 2),
        torch.ones(2, 3).long(),
        torch.ones(2).long(),
    ),
    ("targets", torch.tensor([[1, 2], [3, 0]]), torch.tensor([[1, 4], [3, 1]])),
    ("targets", torch.tensor([[1, 2], [-1, 1]]), torch.ones(2, 2).bool()),
    ("target_lens", [1.0, 1.0], None, torch.ones(3), torch.ones(2, 1)),
    ("target_lens", *(torch.tensor([1.0, x]) for x in (1.1, -0.5, NAN, 2))),
    ("target_lens", torch.ones(2).to(torch.complex64)),
]


def cases(more):
    """Each malformed value by the name of its argument."""
    return [(name, value) for name, *all in more for value in all]


def assert_refused(function, name):
    before = torch.get_rng_state()
    with pytest.raises((TypeError, ValueError)) as caught:
        function()
    # Lengths and targets are named by their sample.
    if name.endswith("_lens") and name not in str(caught.value):
        name = "target" if name == "target_lens" else "frame"
    assert_ours(caught.value, name.replace("targets", "target"))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "name, value",
    cases(
        [
            *SETTINGS,
            *TENSORS,
            ("overwrite_logits", *NOT_SWITCHES),
            ("input_lens", torch.ones(3), torch.tensor([1.0, 0.0]), None),
            (
                "logits",
                None,
                [[1.0]],
                torch.ones(2, 3, 3),
                torch.ones(0, 3, 3, 4),
            ),
            ("logits", torch.ones(2, 3, 3, 4).long(), torch.ones(2, 3, 4, 4)),
            ("logits", torch.ones(2, 3, 3, 4).to_sparse()),
        ]
    ),
)
def test_malformed_batches_of_logits_are_named(name, value):
    arguments = {
        "logits": torch.ones(2, 3, 3, 4),
        "input_lens": torch.ones(2),
        **BATCH,
        name: value,
    }
    assert_refused(lambda: transducer_loss(**arguments), name)


@pytest.mark.parametrize(
    "name, value",
    cases(
        [
            *SETTINGS,
            *TENSORS,
            ("method", "pruned", None, 3, ["tiled"]),
            ("max_rows", *(v for v in NOT_COUNTS if v is not None), 0),
            ("occupancy_floor", "0", None, True, 1.0, -1e-9, NAN),
            ("joint", None, torch.add, "joint"),
            ("classifier", None, torch.relu, nn.Linear(6, 4), nn.Linear),
            (
                "classifier",
                nn.Flatten(0),
                nn.Unflatten(1, (1, 5)),
                nn.LSTM(5, 4),
            ),
            ("enc_lens", torch.ones(3), torch.tensor([1.0, 0.0]), None),
            ("enc", None, [[1.0]], torch.ones(2, 3), torch.ones(2, 3, 6)),
            ("enc", torch.ones(2, 3, 5).long(), torch.ones(2, 3, 5).double()),
            ("enc", torch.ones(2, 3, 5).to_sparse()),
            ("pred", None, torch.ones(2, 2, 5), torch.ones(2, 3, 6)),
        ]
    ),
)
def test_malformed_batches_without_logits_are_named(name, value):
    settings = {
        "joint": Transducer_joint(),
        "classifier": nn.Linear(5, 4),
        "reduction": "nll_mean",
        "blank_index": 0,
    }
    arguments = {
        "enc": torch.ones(2, 3, 5),
        "pred": torch.ones(2, 3, 5),
        "enc_lens": torch.ones(2),
        **BATCH,
    }
    del arguments["blank_index"]
    (arguments if name in arguments else settings)[name] = value
    for method in ("tiled", "samplewise"):
        options = {"method": method, **settings}

        def call(options=options):
            TransducerJointLoss(**options)(**arguments)

        assert_refused(call, name)
