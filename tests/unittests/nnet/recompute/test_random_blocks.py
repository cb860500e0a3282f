"""Random networks that recompute random blocks, against plain autograd.

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
from torch import nn

from sb_memeff.nnet.recompute import recompute_blocks
from tests.unittests.nnet.reversible.chains import assert_same_state
from tests.unittests.random_configurations import (
    NOT_COUNTS,
    NOT_SWITCHES,
    assert_ours,
    examples,
    laid_out,
    layouts,
    tensor,
)

WIDTH = 4


class Attending(nn.Module):
    """Returns more than one tensor, as SpeechBrain's layers do."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x)


class InPlace(nn.Module):
    """Changes a tensor of its own in place."""

    def forward(self, x):
        return (2 * x).mul_(3).add_(1).sigmoid_()


# Of sequences [N, T, WIDTH]; the first of a result is the next one's input.
LAYERS = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "norm": lambda: nn.LayerNorm(WIDTH),
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "in place": InPlace,
    "dropout": lambda: nn.Dropout(0.3),
    "lstm": lambda: nn.LSTM(WIDTH, WIDTH, batch_first=True),
    "attention": Attending,
    "batch norm": lambda: nn.Sequential(
        nn.Linear(WIDTH, 5),
        nn.Flatten(0, 1),
        nn.BatchNorm1d(5, affine=False),
        nn.Tanh(),
        nn.Linear(5, WIDTH),
    ),
}
# Whose samples depend on each other, that draw other numbers in pieces, or that
# return a state with the batch in the middle.
NOT_SPLIT = {"batch norm", "dropout", "lstm"}


class Net(nn.Module):
    """Layers in a row; a layer may be called more than once."""

    def __init__(self, layers, order):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.order = order

    def forward(self, x):
        for number in self.order:
            shape = x.shape
            x = self.layers[number](x.clone())
            x = (x[0] if isinstance(x, tuple) else x).reshape(shape)
        return x


@st.composite
def networks(draw):
    """Kinds of layers, their order and the options of recompute_blocks."""
    split = draw(st.sampled_from([1, 1, 1, 2, 3]))
    kinds = [k for k in LAYERS if split == 1 or k not in NOT_SPLIT]
    kinds = draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=4))
    numbers = st.integers(0, len(kinds) - 1)
    options = {"split": split}
    if split == 1:
        options["segment_length"] = draw(st.integers(1, 3))
    options["every"] = draw(st.sampled_from([1, 1, 1.5, 2, 9]))
    options["first_output_only"] = draw(st.booleans())
    return {
        "kinds": kinds,
        "order": draw(st.lists(numbers, min_size=1, max_size=5)),
        "blocks": [f"layers.{n}" for n in draw(st.sets(numbers, min_size=1))],
        "options": options,
        "dtype": draw(st.sampled_from([torch.float32, torch.float64])),
        "layout": draw(layouts),
        # Batch norm needs two.
        "samples": draw(st.integers(1 if "batch norm" not in kinds else 2, 4)),
        "frames": draw(st.integers(1, 3)),
        # Of parameters, in their order; -1 is the input.
        "frozen": draw(st.sets(st.integers(-1, 6), max_size=3)),
        "tied": draw(st.booleans()),
        "training": draw(st.booleans()),
        "special": draw(st.sampled_from([None, None, None, "nan", "inf"])),
        "seed": draw(st.integers(0, 1000)),
    }


def build(config):
    torch.manual_seed(0)
    net = Net([LAYERS[kind]() for kind in config["kinds"]], config["order"])
    linear = [x for x in net.layers if isinstance(x, nn.Linear)]
    if config["tied"] and len(linear) > 1:
        linear[1].weight = linear[0].weight
    net.train(config["training"])
    for number, parameter in enumerate(net.parameters()):
        parameter.requires_grad_(number not in config["frozen"])
    return net.to(config["dtype"])


def step(net, x, config):
    """Output, gradients (None where there is none), and random state."""
    torch.manual_seed(config["seed"])
    x = x.detach().requires_grad_(-1 not in config["frozen"])
    y = net(x)
    leaves = [x, *net.parameters()]
    leaves = [leaf for leaf in leaves if leaf.requires_grad]
    gradients = []
    if y.requires_grad:
        weights = torch.linspace(-1, 1, y.numel()).view(y.shape).to(y)
        gradients = torch.autograd.grad(
            (y * weights).sum(), leaves, allow_unused=True
        )
    return y.detach(), gradients, torch.get_rng_state()


@given(networks())
@examples(50)
def test_as_the_plain_network(config):
    """Bit for bit; in pieces of the batch up to rounding."""
    net = build(config)
    twin = copy.deepcopy(net)
    names = recompute_blocks(net, config["blocks"], **config["options"])
    assert names and set(names) <= set(config["blocks"])
    x = tensor(
        (config["samples"], config["frames"], WIDTH),
        config["seed"],
        config["dtype"],
    )
    if config["special"]:
        x[0, 0, 0] = float(config["special"])
    x = laid_out(x, config["layout"])
    for _ in range(2):
        y, found, state = step(net, x, config)
        y_plain, expected, state_plain = step(twin, x, config)
        assert torch.equal(state, state_plain)
        assert len(found) == len(expected)
        for a, b in zip((y, *found), (y_plain, *expected)):
            if a is None or b is None:
                assert a is b
                continue
            error = (0, 0)
            if config["options"]["split"] > 1:
                error = (1e-12, 1e-12)
                if config["dtype"] == torch.float32:
                    error = (1e-4, 1e-5)
            torch.testing.assert_close(
                a, b, rtol=error[0], atol=error[1], equal_nan=True
            )
    if config["options"]["split"] == 1 and config["special"] is None:
        assert_same_state(net, twin)


MALFORMED = [
    ("every", *(v for v in NOT_COUNTS if v != 1.5), 0, 0.99, float("inf")),
    ("segment_length", *NOT_COUNTS, 0),
    ("split", *NOT_COUNTS, 0),
    ("first_output_only", *NOT_SWITCHES),
    ("enabled", *NOT_SWITCHES),
    ("shared", "x", 3, [3], ["nobody"], True),
    ("blocks", 3, [3], [], None, "nobody", ["0", "nobody.*"]),
    ("module", None, 3, {"a": 3}, [nn.Tanh()], "net"),
]


@pytest.mark.parametrize(
    "name, value", [(name, value) for name, *all in MALFORMED for value in all]
)
def test_malformed_options_are_named(name, value):
    net = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    options = {"module": net, "blocks": "*", name: value}
    with pytest.raises((TypeError, ValueError)) as caught:
        recompute_blocks(**options)
    assert_ours(caught.value, "nobody" if "nobody" in str(value) else name)
    assert [type(part) for part in net] == [nn.Linear, nn.Tanh]
