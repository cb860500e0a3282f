"""Recomputed networks under DistributedDataParallel, two processes over gloo."""

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from sb_memeff.nnet.recompute import recompute_blocks
from tests.unittests.nnet.speech_networks import (
    LAYERS,
    NETWORKS,
    batch,
    build,
    conformer,
)
from tests.unittests.two_processes import run_in_two_processes

MODES = {
    "default": {},
    "find_unused": {"find_unused_parameters": True},
    "static_graph": {"static_graph": True},
}


def dropping_conformer():
    """Layers are left out at random: their parameters really are unused."""
    torch.manual_seed(0)
    return conformer(layers=4, layerdrop_prob=0.5)


CASES = {
    f"{name}-{mode}": (
        lambda name=name: build(name),
        NETWORKS[name][1],
        MODES[mode],
    )
    for name in ("ecapa_dropout", "xvector")
    for mode in MODES
}
CASES["dropped_layers-find_unused"] = (
    dropping_conformer,
    {"blocks": LAYERS, "segment_length": 2},
    MODES["find_unused"],
)
# Each layer in two pieces, which changes the last bits.
SPLIT = {
    f"pieces-{mode}": (
        lambda: conformer(layers=2, dropout=0.0),
        {"blocks": LAYERS, "split": 2, "first_output_only": True},
        MODES[mode],
    )
    for mode in ("default", "static_graph")
}


def train(net, rank):
    """Two steps; returns state and gradients."""
    # The same in both processes: they drop the same layers.
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    x, lengths = batch()
    # static_graph learns in the first step and must hold in the second.
    for _ in range(2):
        optimizer.zero_grad()
        net(x + rank, lengths).square().mean().backward()
        optimizer.step()
    return list(net.state_dict().values()), [p.grad for p in net.parameters()]


def states_and_gradients(rank):
    """Of each case, recomputed and untouched."""
    found = {}
    for case, (network, blocks, options) in {**CASES, **SPLIT}.items():
        torch.manual_seed(0)
        net = network()
        torch.manual_seed(0)
        twin = network()
        recompute_blocks(net, **blocks)
        found[case] = [
            train(DistributedDataParallel(module, **options), rank)
            for module in (net, twin)
        ]
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    return run_in_two_processes(states_and_gradients, folder)


def assert_equal(ours, reference):
    for a, b in zip(ours, reference, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


@pytest.mark.parametrize("case", CASES)
def test_steps_are_bit_equal_to_the_untouched_network(results, case):
    for rank in range(2):
        (state, gradients), (state_ref, reference) = results[rank][case]
        assert_equal(state, state_ref)
        assert_equal(gradients, reference)
    # And the processes agree on the gradients.
    assert_equal(results[0][case][0][1], results[1][case][0][1])


@pytest.mark.parametrize("case", SPLIT)
def test_split_blocks(results, case):
    for rank in range(2):
        ours, reference = results[rank][case]
        for a, b in zip((*ours[0], *ours[1]), (*reference[0], *reference[1])):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert_equal(results[0][case][0][1], results[1][case][0][1])


def test_layers_were_dropped(results):
    gradients = results[0]["dropped_layers-find_unused"][0][1]
    assert any(g is None or not g.any() for g in gradients)
