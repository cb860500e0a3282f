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


def sent_while_walking(rank):
    """Names of blocks that backward evaluates, and "sent" for each bucket."""
    net = chain(3, dropout=0.0)
    events = []
    # Each parameter has a bucket.
    wrapped = DistributedDataParallel(net, bucket_cap_mb=1e-6)

    def send(state, bucket):
        events.append("sent")
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    wrapped.register_comm_hook(None, send)
    # DDP orders its buckets after the first step.
    for _ in range(2):
        value = loss(wrapped, rank)
        handles = [
            block.g.register_forward_hook(
                lambda *_, name=name: events.append(name)
            )
            for name, block in net.blocks.named_children()
        ]
        events.clear()
        value.backward()
        for handle in handles:
            handle.remove()
    return events


def test_buckets_are_sent_while_the_chain_is_walked_back(tmp_path):
    for events in run_in_two_processes(sent_while_walking, tmp_path):
        evaluated = [name for name in events if name != "sent"]
        assert evaluated == ["2", "1", "0"]
        # Before a block is evaluated, the gradients of the one before are out.
        sent = [events[: events.index(n)].count("sent") for n in ("1", "0")]
        each = events.count("sent") // 3
        assert each > 1 and sent == [each, 2 * each]


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
