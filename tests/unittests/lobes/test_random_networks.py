"""Random sizes of the reversible networks, against stored activations.

Authors
 * The sb_memeff authors 2026
"""

import pytest
import torch
from hypothesis import (
    given,
    strategies as st,
)

from sb_memeff.lobes.models.RecomputedECAPA_TDNN import ECAPA_TDNN
from sb_memeff.lobes.models.RevDFResNet import RevDFResNet
from sb_memeff.lobes.models.RevECAPA_TDNN import RevECAPA_TDNN
from sb_memeff.lobes.models.RevResNet import RevResNet
from tests.unittests.random_configurations import (
    NOT_COUNTS,
    assert_ours,
    examples,
    laid_out,
    layouts,
    tensor,
)
from tests.unittests.weights import without_zeros

FOUR = {"channels": [4, 4, 8, 8], "block_sizes": [1, 1, 2, 1]}


@st.composite
def networks(draw):
    """A class, its arguments and a batch."""
    kind = draw(
        st.sampled_from([RevResNet, RevDFResNet, ECAPA_TDNN, RevECAPA_TDNN])
    )
    mels = draw(st.integers(1, 9))
    options = {"input_size": mels, "lin_neurons": draw(st.integers(1, 5))}
    if "ECAPA" in kind.__name__:
        blocks = draw(st.integers(1, 3))
        options.update(
            channels=[8] * (blocks + 1) + [draw(st.sampled_from([6, 130]))],
            kernel_sizes=[5] + [3] * blocks + [1],
            dilations=list(range(1, blocks + 2)) + [1],
            groups=[1] * (blocks + 2),
            attention_channels=4,
            res2net_scale=2,
            se_channels=4,
            global_context=draw(st.booleans()),
        )
    else:
        pairs = st.sampled_from([1, 2, [1, 2], [3, 1]])
        options.update(FOUR, strides=[draw(pairs) for _ in range(4)])
        options["downsampling"] = draw(
            st.sampled_from(["strided", "invertible"])
        )
        options["pool_channels"] = draw(st.sampled_from([None, 3]))
        if options["downsampling"] == "invertible":
            options.update(
                channels=[2, 4, 8, 8], strides=[1, [1, 2], [2, 1], 1]
            )
            options["inner_channels"] = [3, 2, 4, 3]
    samples = draw(st.integers(2, 3))
    return {
        "kind": kind,
        "options": options,
        "frames": draw(st.integers(8 if "ECAPA" in kind.__name__ else 1, 20)),
        "lengths": draw(
            st.none()
            | st.lists(
                st.sampled_from([1.0, 0.5, 0.9, 0.01]),
                min_size=samples,
                max_size=samples,
            )
        ),
        "samples": samples,
        "layout": draw(layouts),
        "frozen": draw(st.sets(st.integers(-1, 12), max_size=4)),
        "training": draw(st.booleans()),
        "seed": draw(st.integers(0, 1000)),
    }


def step(net, x, lengths, config):
    torch.manual_seed(config["seed"])
    x = x.detach().requires_grad_(-1 not in config["frozen"])
    y = net(x, lengths)
    weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    leaves = [p for p in (x, *net.parameters()) if p.requires_grad]
    return y, torch.autograd.grad((y * weight).sum(), leaves, allow_unused=True)


@given(networks())
@examples(5)
def test_as_with_stored_activations(config):
    torch.manual_seed(0)
    net = without_zeros(config["kind"](**config["options"])).double()
    net.train(config["training"])
    for number, parameter in enumerate(net.parameters()):
        parameter.requires_grad_(number not in config["frozen"])
    state = {k: v.clone() for k, v in net.state_dict().items()}
    shape = config["samples"], config["frames"], config["options"]["input_size"]
    x = laid_out(tensor(shape, config["seed"]), config["layout"])
    if config["layout"] == "expanded":
        x = x + tensor(shape, 1)
    lengths = config["lengths"]
    if lengths is not None:
        lengths = torch.tensor(lengths, dtype=torch.float64)
    found = []
    for save_memory in (True, False):
        net.load_state_dict(state)
        net.save_memory = save_memory
        y, gradients = step(net, x, lengths, config)
        statistics = [v.clone() for v in net.state_dict().values()]
        found.append((y, *gradients, *statistics))
    for a, b in zip(*found):
        if a is None or b is None:
            assert a is None or not a.any()
            assert b is None or not b.any()
            continue
        size = float(b.detach().abs().amax()) if b.numel() else 0.0
        torch.testing.assert_close(a, b, rtol=0, atol=1e-8 * max(size, 1.0))


@pytest.mark.parametrize("kind", [RevResNet, RevDFResNet])
def test_malformed_sizes_are_named(kind):
    bad = [v for v in NOT_COUNTS if v is not None]
    good = {"input_size": 8, "lin_neurons": 2, **FOUR}
    for name in ("input_size", "lin_neurons", "pool_channels"):
        for value in [*bad, 0]:
            with pytest.raises((TypeError, ValueError)) as caught:
                kind(**{**good, name: value})
            assert_ours(caught.value, name)
    for name in ("channels", "block_sizes", "inner_channels", "strides"):
        for value in (
            3,
            "4444",
            [2, 4, 8],
            [2, 4, 8, True],
            [2, 4, 8, "8"],
            [2, 4, 8, 0],
        ):
            with pytest.raises((TypeError, ValueError)) as caught:
                kind(**{**good, name: value})
            assert_ours(caught.value, name)
