"""Random reversible chains and networks, against those that store everything.

Authors
 * The sb_memeff authors 2026
"""

import pytest
import torch
from hypothesis import (
    given,
    strategies as st,
)
from torch import nn

from sb_memeff.nnet.reversible import (
    AdditiveCoupling,
    ReversibleSequence,
    SpaceToDepth,
    Tap,
)
from tests.unittests.nnet.reversible.chains import (
    Head,
    Strided,
    stored,
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

# Of one stream, before any SpaceToDepth.
WIDTH = 2


class Scaled(nn.Module):
    """Takes an extra argument, which needs a gradient."""

    takes_arguments = ("scale",)

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1)

    def forward(self, x, scale=None):
        x = self.conv(x)
        return x if scale is None else x * scale


def norm(channels):
    layer = nn.BatchNorm2d(channels)
    # Equal samples would be 0, where ReLU's gradient jumps. In float64, without
    # a grid, backward finds them a rounding error away.
    nn.init.normal_(layer.bias)
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1), layer, nn.ReLU()
    )


FUNCTIONS = {
    "conv": lambda c: nn.Conv2d(c, c, 3, padding=1),
    "norm": norm,
    "tanh": lambda c: nn.Tanh(),
    "dropout": lambda c: nn.Sequential(nn.Conv2d(c, c, 1), nn.Dropout(0.4)),
    "scaled": Scaled,
    "sum": lambda c: nn.ModuleList([nn.Conv2d(c, c, 1), norm(c)]),
    # With channels last and a frozen weight, torch's backward crashes.
    "group norm": lambda c: nn.GroupNorm(1, c, affine=False),
}
functions = st.sampled_from(list(FUNCTIONS))
KINDS = ("coupling", "coupling", "coupling", "down", "strided", "tap", "conv")


@st.composite
def chains(draw):
    """Blocks with their functions, and how the chain is called."""
    kinds = draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=5))
    blocks = [(kind, draw(functions), draw(functions)) for kind in kinds]
    autocast = draw(st.sampled_from([False, False, True]))
    size = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    if autocast:
        # Statistics of few values multiply the rounding errors of bfloat16.
        size = 6, 7
    return {
        "blocks": blocks,
        "head": draw(st.booleans()),
        "shape": (draw(st.integers(2, 3)), 2 * WIDTH, *size),
        "dtype": draw(st.sampled_from([torch.float32, torch.float64])),
        "autocast": autocast,
        "exact": draw(st.sampled_from([True, True, False])),
        "grid_bits": draw(st.sampled_from([12, 12, 16, 8])),
        "layout": draw(layouts),
        "channels_last": draw(st.booleans()),
        # Of parameters, in their order; -1 is the input, -2 the argument.
        "frozen": draw(st.sets(st.integers(-2, 8), max_size=4)),
        # f and g, or two blocks, are one module.
        "shared": draw(st.sampled_from([None, None, "f and g", "blocks"])),
        "scale": draw(st.booleans()),
        "training": draw(st.sampled_from([True, True, False])),
        "special": draw(
            st.sampled_from([None, None, None, None, "nan", "inf"])
        ),
        "seed": draw(st.integers(0, 1000)),
    }


def build(config):
    torch.manual_seed(0)
    blocks, width, made = [], WIDTH, {}

    def function(kind):
        key = kind, width
        if config["shared"] != "blocks" or key not in made:
            made[key] = FUNCTIONS[kind](width)
        return made[key]

    for kind, f, g in config["blocks"]:
        if kind == "coupling":
            f = function(f)
            g = f if config["shared"] == "f and g" else function(g)
            blocks.append(AdditiveCoupling(f, g))
        elif kind == "down" and width == WIDTH:
            blocks.append(SpaceToDepth(2))
            width *= 4
        elif kind == "strided":
            blocks.append(Strided(width))
        elif kind == "tap":
            conv = nn.Conv2d(2 * width, 3, 1)
            blocks.append(Tap(nn.Sequential(conv, nn.AdaptiveAvgPool2d(1))))
        elif kind == "conv":
            blocks.append(nn.Conv2d(2 * width, 2 * width, 3, padding=1))
    if config["head"] or not blocks:
        blocks.append(Head(2 * width))
    net = ReversibleSequence(
        blocks, exact=config["exact"], grid_bits=config["grid_bits"]
    )
    for module in net._functions():
        if not isinstance(module, Scaled):
            module.takes_arguments = ()
    net.train(config["training"])
    for number, parameter in enumerate(net.parameters()):
        parameter.requires_grad_(number not in config["frozen"])
    return net.to(config["dtype"])


def step(net, x, config):
    """Outputs, gradients (None where there is none), and random state."""
    torch.manual_seed(config["seed"])
    x = x.detach().requires_grad_(-1 not in config["frozen"])
    leaves, options = [x, *net.parameters()], {}
    if config["scale"] and any(f.takes_arguments for f in net._functions()):
        scale = torch.full((1,), 1.5, dtype=x.dtype)
        scale.requires_grad_(-2 not in config["frozen"])
        options["scale"] = scale
        leaves.append(scale)
    with torch.autocast("cpu", torch.bfloat16, enabled=config["autocast"]):
        outputs = net(x, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    loss = sum(
        (y * torch.linspace(-1, 1, y.numel()).view(y.shape).to(y)).sum()
        for y in outputs
    )
    gradients = []
    if loss.requires_grad:
        gradients = torch.autograd.grad(
            loss, [p for p in leaves if p.requires_grad], allow_unused=True
        )
    outputs = [y.detach() for y in outputs]
    return outputs, list(gradients), torch.get_rng_state()


def assert_close(found, expected, tolerance):
    assert len(found) == len(expected)
    for a, b in zip(found, expected):
        if a is None or b is None:
            # A zero that autograd does not compute.
            assert a is None or not a.any()
            assert b is None or not b.any()
            continue
        bound = tolerance * max(1.0, float(b.abs().amax()))
        torch.testing.assert_close(
            a.to(b.dtype), b, rtol=0, atol=bound, equal_nan=True
        )


@given(chains())
@examples(40)
def test_as_the_stored_chain(config):
    net = build(config)
    twin = stored(net)
    x = tensor(config["shape"], config["seed"], config["dtype"])
    if config["special"]:
        x[0, 0, 0, 0] = float(config["special"])
    if config["channels_last"]:
        x = x.contiguous(memory_format=torch.channels_last)
    else:
        x = laid_out(x, config["layout"])
    outputs, found, state = step(net, x, config)
    expected_outputs, expected, expected_state = step(twin, x, config)
    assert torch.equal(state, expected_state)
    for a, b in zip(outputs, expected_outputs):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    if config["special"]:
        finite = [[g for g in gs if g is not None] for gs in (found, expected)]
        ours, theirs = (
            all(bool(g.isfinite().all()) for g in gs) for gs in finite
        )
        # More of them than in plain autograd: the inverse of NaN is NaN.
        assert theirs or not ours
        return
    tolerance = 1e-9 if config["dtype"] == torch.float64 else 1e-4
    if config["autocast"] and config["dtype"] == torch.float32:
        # Plain autograd sums the gradients of a shared module in bfloat16.
        tolerance = 2e-2 if config["shared"] is None else 0.1
    assert_close(found, expected, tolerance)
    ours, theirs = (n.state_dict().values() for n in (net, twin))
    for a, b in zip(ours, theirs):
        # Streams of one pixel have other strides, and sums another order.
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    if config["autocast"]:
        return
    # The same function in float64, which has no grid.
    exact = build(config).double()
    exact.save_memory = False
    wide_outputs, wide, _ = step(exact, x.double(), config)
    tolerance = 1e-9
    if config["dtype"] == torch.float32:
        tolerance = 1e-3 + 20 * 2.0 ** -config["grid_bits"]
    assert_close([y.double() for y in outputs], wide_outputs, tolerance)


def coupling():
    return AdditiveCoupling(nn.Linear(2, 2), nn.Linear(2, 2))


MALFORMED = [
    ("save_memory", *NOT_SWITCHES),
    ("exact", *NOT_SWITCHES),
    ("grid_bits", *NOT_COUNTS, 0, 24),
    ("axis", *(v for v in NOT_COUNTS if v != -1), 0),
    ("blocks", [], None, 3, [3], ["blocks"], nn.Linear(2, 2)),
]


@pytest.mark.parametrize(
    "name, value", [(name, value) for name, *all in MALFORMED for value in all]
)
def test_malformed_options_are_named(name, value):
    with pytest.raises((TypeError, ValueError)) as caught:
        ReversibleSequence(**{"blocks": [coupling()], name: value})
    assert_ours(caught.value, name)


@pytest.mark.parametrize("value", [*NOT_COUNTS, 0, (2, 0), (2, True)])
def test_malformed_factors_are_named(value):
    if value == [2]:
        return  # of a stream with one axis
    with pytest.raises(ValueError) as caught:
        SpaceToDepth(value)
    assert_ours(caught.value, "factor")


class Returns(nn.Module):
    """A function that returns something else than its increment."""

    def __init__(self, result):
        super().__init__()
        self.result = result

    def forward(self, x):
        return self.result(x)


@pytest.mark.parametrize("save_memory", [True, False])
@pytest.mark.parametrize(
    "x, f, part",
    [
        (torch.ones(2, 3), nn.Tanh(), "(2, 3)"),
        (torch.ones(4), nn.Tanh(), "(4,)"),
        (torch.tensor(1.0), nn.Tanh(), "()"),
        (torch.ones(2, 4).long(), nn.Tanh(), "int64"),
        (torch.ones(2, 4).to(torch.complex64), nn.Tanh(), "complex64"),
        (torch.ones(2, 4).to_sparse(), nn.Tanh(), "sparse"),
        ([[1.0, 2.0]], nn.Tanh(), "list"),
        (None, nn.Tanh(), "NoneType"),
        (torch.ones(2, 4), Returns(lambda x: None), "f"),
        (torch.ones(2, 4), Returns(lambda x: (x, x)), "f"),
        (torch.ones(2, 4), Returns(lambda x: x[:, :1]), "(2, 1)"),
        (torch.ones(2, 4), Returns(lambda x: x[:1]), "(1, 2)"),
        (torch.ones(2, 4), Returns(lambda x: x > 0), "bool"),
        (torch.ones(2, 4), Returns(lambda x: x.long()), "int64"),
        (torch.ones(2, 4), Returns(lambda x: x + 1j), "complex64"),
        (torch.ones(2, 4), Returns(lambda x: x.double()), None),
    ],
)
def test_malformed_inputs_are_named(save_memory, x, f, part):
    chain = [AdditiveCoupling(f, nn.Linear(2, 2)), coupling()]
    net = ReversibleSequence(chain, save_memory=save_memory)
    if part is None:
        assert net(x).dtype == x.dtype
        return
    with pytest.raises((TypeError, ValueError)) as caught:
        net(x)
    assert_ours(caught.value, part)


class TakesStreams(Returns):
    takes_streams = True


@pytest.mark.parametrize("save_memory", [True, False])
@pytest.mark.parametrize(
    "module, part",
    [
        (Returns(lambda x: None), "NoneType"),
        (Returns(lambda x: x > 0), "bool"),
        (Returns(lambda x: x + 1j), "complex64"),
        (TakesStreams(lambda xs: (*xs, xs[0])), "tuple"),
        (TakesStreams(lambda xs: (xs[0], None)), "NoneType"),
        (TakesStreams(lambda xs: (xs[0], xs[1][:1])), "(1, 2)"),
    ],
)
def test_malformed_results_are_named(save_memory, module, part):
    net = ReversibleSequence(
        [coupling(), module, coupling()], save_memory=save_memory
    )
    with pytest.raises((TypeError, ValueError)) as caught:
        net(torch.ones(2, 4))
    assert_ours(caught.value, type(module).__name__, part)


def test_malformed_functions_are_named():
    for bad in (None, torch.tanh, "f", 3, nn.ModuleList()):
        for kind, names in ((AdditiveCoupling, "fg"), (Tap, ["read"])):
            for name in names:
                if kind is Tap and isinstance(bad, nn.ModuleList):
                    continue
                arguments = {n: nn.Tanh() for n in names}
                with pytest.raises((TypeError, ValueError)) as caught:
                    kind(**{**arguments, name: bad})
                assert_ours(caught.value, f"{name} ")
