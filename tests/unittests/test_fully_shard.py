"""What saves memory under FSDP2 (fully_shard), two processes over gloo.

Authors
 * The sb_memeff authors 2026
"""

import re

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from sb_memeff.nnet.recompute import recompute_blocks
from sb_memeff.nnet.reversible import AdditiveCoupling
from sb_memeff.nnet.transducer_loss.joint_loss import TransducerJointLoss
from tests.unittests.lobes.networks import MELS, small
from tests.unittests.nnet.speech_networks import LAYERS, conformer
from tests.unittests.nnet.transducer_loss.test_joint_loss import (
    COUNTS,
    FRAMES,
    inputs,
    modules,
)
from tests.unittests.optim.optimizers import CLASSES
from tests.unittests.two_processes import run_in_two_processes

STEPS = 5


def layers():
    """Recomputed layers of a conformer."""
    torch.manual_seed(0)
    net = conformer(layers=2)
    recompute_blocks(net, LAYERS)
    return net


def joint_loss(method="tiled"):
    return TransducerJointLoss(*modules(), method=method)


def functions(net):
    """f and g of each coupling."""
    return [
        function
        for module in net.modules()
        if isinstance(module, AdditiveCoupling)
        for function in module.functions()
    ]


def children(net):
    """Modules of the network that are called as a whole."""
    return [m for m in net.children() if any(True for _ in m.parameters())]


# How to build it, and the parts that are sharded before the whole.
SHARDED = {
    "RevNet34-II": (lambda: small("RevNet34-II"), children),
    "RevECAPA_TDNN": (lambda: small("RevECAPA_TDNN"), lambda net: []),
    "recompute_blocks": (
        layers,
        lambda net: list(net.transformer.encoder.layers),
    ),
    "joint loss": (joint_loss, lambda loss: []),
    "batched": (
        lambda: joint_loss("batched"),
        lambda loss: [loss.classifier],
    ),
}
# Parts whose values are needed when they are not called.
REFUSED = {
    "functions": (
        lambda: small("RevNet34-II"),
        functions,
        "fully_shard on the whole sequence, or",
    ),
    "couplings": (
        lambda: small("RevNet34-II"),
        lambda net: [
            m for m in net.modules() if isinstance(m, AdditiveCoupling)
        ],
        "fully_shard on the whole sequence, or",
    ),
    "attention": (
        lambda: small("RevECAPA_TDNN"),
        lambda net: [net.asp],
        "asp.tdnn.conv.conv.weight .* fully_shard on the network, or",
    ),
    "blocks": (
        lambda: small("ECAPA_TDNN"),
        lambda net: [net.blocks[1].tdnn1],
        "blocks.1.tdnn1.conv.conv.weight .* fully_shard on the network, or",
    ),
    "classifier": (
        joint_loss,
        lambda loss: [loss.classifier],
        "TransducerJointLoss: classifier.w.weight .* fully_shard on the loss",
    ),
}


def shard(net, parts):
    for part in parts(net):
        fully_shard(part)
    return fully_shard(net)


def loss_of(net, step, rank):
    """Of other data for each step and process."""
    seed = 2 * step + rank
    if any(isinstance(m, TransducerJointLoss) for m in net.modules()):
        enc, pred, targets = inputs(seed=seed)
        return net(enc, pred, targets, FRAMES, COUNTS)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 32, MELS, generator=generator)
    return net(x, torch.tensor([1.0, 0.8, 0.6])).square().mean()


def train(net, rank):
    """The parameters after some steps."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    torch.manual_seed(rank)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(net, step, rank).backward()
        optimizer.step()
    return [
        (p.full_tensor() if isinstance(p, DTensor) else p).detach()
        for p in net.parameters()
    ]


def error_of(function, *args):
    try:
        function(*args)
    except (RuntimeError, TypeError) as error:
        return str(error)
    return None


def sharded_and_not(rank):
    """Parameters of each case under FSDP2 and DDP; what is refused."""
    found = {}
    for name, (build, parts) in SHARDED.items():
        start = [p.detach() for p in build().parameters()]
        ours = train(shard(build(), parts), rank)
        theirs = train(DistributedDataParallel(build()), rank)
        found[name] = start, ours, theirs
    for name, (build, parts, _) in REFUSED.items():
        found[name] = error_of(loss_of, shard(build(), parts), 0, rank)
    for cls, kind in CLASSES.items():
        net = fully_shard(torch.nn.Linear(80, 80))
        found[cls.__name__] = error_of(kind.make, net.parameters())
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run_in_two_processes(
        sharded_and_not, tmp_path_factory.mktemp("fully_shard")
    )


@pytest.mark.parametrize("name", SHARDED)
def test_weights_equal_those_under_ddp(results, name):
    start, ours, theirs = results[0][name]
    assert any(not torch.equal(a, b) for a, b in zip(start, theirs))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", REFUSED)
def test_parts_that_are_refused(results, name):
    for found in results:
        assert re.search(REFUSED[name][2], found[name]), found[name]


@pytest.mark.parametrize("cls", CLASSES)
def test_8bit_optimizers_refuse_sharded_parameters(results, cls):
    for found in results:
        assert f"use {cls.__name__[:-4]} of torch.optim" in found[cls.__name__]
