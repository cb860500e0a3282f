"""The engine under DistributedDataParallel, two processes over gloo."""

import copy

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from tests.unittests.nnet.reversible.chains import chain, relative_error, stored
from tests.unittests.two_processes import run_in_two_processes

MODES = {
    "default": {},
    "find_unused": {"find_unused_parameters": True},
    "static_graph": {"static_graph": True},
}


def inputs(rank):
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(3, 8, 6, 5, generator=generator)


def loss(net, rank):
    return net(inputs(rank)).square().mean()


def gradients_under_ddp(rank):
    """Of each mode."""
    found = {}
    for mode, options in MODES.items():
        net = DistributedDataParallel(chain(3, dropout=0.0), **options)
        # static_graph learns in the first step and must hold in the second.
        for _ in range(2):
            net.zero_grad()
            loss(net, rank).backward()
        found[mode] = [p.grad for p in net.parameters()]
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    return run_in_two_processes(gradients_under_ddp, folder)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_equal_those_of_one_process(results, mode):
    net = stored(chain(3, dropout=0.0))
    reference = []
    for rank in range(2):
        # Each process normalises its own half of the batch.
        twin = copy.deepcopy(net)
        reference.append(
            torch.autograd.grad(loss(twin, rank) / 2, list(twin.parameters()))
        )
    reference = [a + b for a, b in zip(*reference, strict=True)]
    for rank in range(2):
        assert relative_error(results[rank][mode], reference) < 1e-5
    for ours, theirs in zip(results[0][mode], results[1][mode], strict=True):
        assert torch.equal(ours, theirs)
