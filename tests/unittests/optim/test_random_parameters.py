"""Random parameters, gradients and settings, against torch's class in float64.

Authors
 * The sb_memeff authors 2026
"""

import copy
import weakref

import pytest
import torch
from hypothesis import (
    given,
    strategies as st,
)
from torch import nn

from sb_memeff.ops.blocks_8bit import BLOCK, Quantized8bit
from tests.unittests.optim.optimizers import (
    OPTIMIZERS,
    each_class,
    moved_by_rounding,
)
from tests.unittests.optim.test_optimizer_contract import check_bound
from tests.unittests.random_configurations import (
    NOT_COUNTS,
    NOT_SWITCHES,
    assert_ours,
    examples,
    laid_out,
    layouts,
    tensor,
)

SHAPES = [(1,), (), (0,), (5,), (16, 17), (300,), (3, 4, 5), (20, 30), (257,)]
DTYPES = [torch.float32, torch.float32, torch.float64, torch.bfloat16]
# Of a gradient, besides those of its strides.
SPECIAL = [None, None, None, None, "zero tensor", "negative", "nan", "inf"]


@st.composite
def optimizers(draw):
    """A kind of optimizer, its parameters and their gradients."""
    number = draw(st.integers(1, 3))
    dtype = draw(st.sampled_from(DTYPES))
    parameters = [
        {
            "shape": draw(st.sampled_from(SHAPES)),
            "layout": draw(layouts),
            "grad_layout": draw(layouts),
            "scale": draw(st.sampled_from([1.0, 1.0, 1e-12, 100.0, 0.0])),
            "special": draw(st.sampled_from(SPECIAL)),
            "used": draw(st.sampled_from([True, True, True, False])),
        }
        for _ in range(number)
    ]
    options = {}
    if draw(st.booleans()):
        options["fused"] = draw(st.sampled_from([None, True]))
        options["foreach"] = None
    if draw(st.sampled_from([False, False, True])):
        options["weight_decay"] = draw(st.sampled_from([0.0, 0.3]))
    return {
        "kind": draw(st.sampled_from(list(OPTIMIZERS))),
        "options": options,
        "lr": draw(st.sampled_from(["number", "number", "tensor"])),
        "min_8bit_size": draw(st.sampled_from([0, 0, 1, 200, 4096])),
        "dtype": dtype,
        "parameters": parameters,
        "steps": draw(st.integers(1, 3)),
        "seed": draw(st.integers(0, 1000)),
    }


def gradient_of(p, of_parameter, seed):
    """A gradient of the parameter's shape and dtype, or None."""
    if not of_parameter["used"]:
        return None
    special = of_parameter["special"]
    if special == "zero tensor":
        return torch._efficientzerotensor(p.shape, dtype=p.dtype)
    x = tensor(p.shape, seed, p.dtype, of_parameter["scale"])
    if special == "negative":
        return torch._neg_view(x)
    if special and x.numel():
        x.view(-1)[0] = float(special)
    # Scalars and empty tensors have one layout.
    return laid_out(x, of_parameter["grad_layout"]) if x.dim() else x


def with_values(p):
    """In float64, with memory of its own."""
    return p.detach().clone().double()


@given(optimizers())
@examples(40)
def test_as_torchs_class(config):
    kind = OPTIMIZERS[config["kind"]]
    params = []
    for number, of_parameter in enumerate(config["parameters"]):
        x = tensor(
            of_parameter["shape"], config["seed"] + number, config["dtype"]
        )
        layout = of_parameter["layout"]
        if x.dim() and layout != "expanded":
            x = laid_out(x, layout)
        params.append(nn.Parameter(x))
    options = {**kind.options, **config["options"]}
    if config["lr"] == "tensor" and not options.get("foreach"):
        options["lr"] = torch.tensor(options["lr"], dtype=torch.float64)
    ours = kind.ours(params, **options, min_8bit_size=config["min_8bit_size"])
    for number in range(config["steps"]):
        theirs, copies = in_float64(kind, options, ours, params)
        poisoned = []
        for i, (p, q) in enumerate(zip(params, copies)):
            of_parameter = config["parameters"][i]
            seed = config["seed"] + 10 * number + i
            p.grad = gradient_of(p, of_parameter, seed)
            q.grad = None if p.grad is None else with_values(p.grad)
            poisoned.append(q.grad is not None and not q.grad.isfinite().all())
        before = [with_values(p) for p in params]
        ours.step()
        theirs.step()
        for p, q, old, bad in zip(params, copies, before, poisoned):
            if p.grad is None:
                assert torch.equal(p.double(), old)
            else:
                check(kind, ours, p, theirs, q, old, bad)
        if any(poisoned):
            return


def in_float64(kind, options, ours, params):
    """torch's class, with the same states and values."""
    copies = [nn.Parameter(with_values(p)) for p in params]
    options = {**options, "foreach": None, "fused": None}
    theirs = kind.torchs(copies, **options)
    saved = ours.state_dict()
    for group in saved["param_groups"]:
        group.update(foreach=None, fused=None)
    theirs.load_state_dict(copy.deepcopy(saved))
    return theirs, copies


def check(kind, ours, p, theirs, q, old, poisoned):
    """The values and states; not in a block of one that is not finite."""
    expected = moved_by_rounding(ours, p, theirs, q).flatten()
    good = expected.isfinite()
    if poisoned:
        good[:BLOCK] = False
    moved = (q.detach() - old).flatten()[good].abs()
    moved = moved.max() if moved.numel() else 0.0
    precision = 1e-12
    if p.dtype != torch.float64:
        precision = torch.finfo(p.dtype).eps
    bound = 4 * precision * old.flatten().abs() + 2e-5 * moved + 1e-12
    bound += 4 * precision * moved
    error = (p.detach().double().flatten() - expected).abs()
    assert (error <= bound)[good].all(), (error - bound)[good].max()
    if poisoned:
        return
    for name, exact in theirs.state[q].items():
        if name not in ours.signed or exact is None:
            continue
        packed = ours.state[p][name]
        if not isinstance(packed, Quantized8bit):
            size = float(exact.abs().amax()) if exact.numel() else 0.0
            torch.testing.assert_close(
                packed.double(), exact, rtol=1e-5, atol=1e-6 * size
            )
        elif packed.scales.all():
            signed, dithered = ours.signed[name], name in ours.dithered
            check_bound(packed, exact.float().contiguous(), signed, dithered)


MALFORMED = [
    ("min_8bit_size", *NOT_COUNTS),
    ("lr", *(v for v in NOT_COUNTS if v not in (1.5, 2)), float("inf")),
    ("weight_decay", "1", None, -1, float("nan"), True),
    ("maximize", *NOT_SWITCHES),
]
OF_SGD = [
    ("momentum", "1", None, -1, float("nan"), True),
    ("dampening", "1", None, float("nan"), True),
    ("nesterov", *NOT_SWITCHES),
]
OF_ADAM = [
    ("eps", "1", None, -1, float("nan"), True),
    ("betas", 0.9, "ab", [0.9], [0.9, "x"], [0.9, float("nan")], (1.0, 0.9)),
    ("amsgrad", *NOT_SWITCHES),
]


@each_class
def test_malformed_settings_are_named(kind):
    weight = nn.Parameter(torch.zeros(4))
    more = OF_SGD if "momentum" in kind.options else OF_ADAM
    for name, *values in MALFORMED + more:
        for value in values:
            if name == "maximize" and value == 1:
                continue
            with pytest.raises((TypeError, ValueError)) as caught:
                kind.make([weight], **{name: value})
            if value not in (-1, (1.0, 0.9)):
                assert_ours(caught.value, name)
            group = {"params": [weight], name: value}
            if name in ("lr", "weight_decay", "min_8bit_size") and value != -1:
                with pytest.raises((TypeError, ValueError)) as caught:
                    kind.make([group])
                assert_ours(caught.value, name)


@each_class
def test_a_removed_parameter_is_freed(kind):
    params = [nn.Parameter(torch.zeros(5000)) for _ in range(2)]
    optimizer = kind.make([{"params": [p]} for p in params])
    for _ in range(2):
        for p in params:
            p.grad = torch.ones(5000)
        optimizer.step()
    optimizer.state.pop(params[1])
    optimizer.param_groups.pop()
    removed = weakref.ref(params.pop())
    del p
    optimizer.step()
    assert removed() is None
