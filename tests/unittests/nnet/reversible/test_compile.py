"""Compiled networks, and compiled f and g, are inverted exactly."""

import copy

import pytest
import speechbrain as sb
import torch
from torch import nn

from sb_memeff.lobes.models.RevECAPA_TDNN import RevECAPA_TDNN
from sb_memeff.lobes.models.RevResNet import RevResNet
from sb_memeff.nnet.reversible import (
    AdditiveCoupling,
    ReversibleSequence,
    inversion_errors,
)
from tests.unittests.nnet.reversible.chains import (
    body,
    chain,
    gradients,
    images,
    relative_error,
    stored,
)
from tests.unittests.weights import without_zeros

BACKENDS = [
    "aot_eager",
    pytest.param("inductor", marks=pytest.mark.slow),
]


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Body(nn.Module):
    """A class of its own: torch.nn's modules are not compiled in place."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.dropout = nn.Dropout(0.2)
        self.last = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return self.last(self.dropout(self.norm(self.conv(x)).relu().exp()))


def bodies():
    torch.manual_seed(0)
    return ReversibleSequence(
        [AdditiveCoupling(Body(), Body()) for _ in range(2)]
    )


def compiled(net, how, backend):
    for block in net.blocks:
        for name in ("f", "g"):
            part = getattr(block, name)
            if how == "torch.compile":
                setattr(block, name, torch.compile(part, backend=backend))
            else:
                part.compile(backend=backend)
    return net


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("how", ["torch.compile", "compile()"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_functions(backend, how, autocast):
    net = compiled(bodies(), how, backend)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    x = images()
    with inversion_errors(net) as errors:
        gradients(net, x, autocast=autocast)
    # They were compiled.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > graphs
    assert errors == {"blocks.0": 0.0, "blocks.1": 0.0}
    net.zero_grad()
    y, ours, state = gradients(net, x, autocast=autocast)
    ours = [g.clone() for g in ours]
    norms = {
        k: v.clone() for k, v in net.state_dict().items() if "running" in k
    }
    # The same code, with activations stored.
    reference_net = compiled(bodies(), how, backend)
    reference_net.save_memory = False
    for _ in range(2):
        reference_net.zero_grad()
        y_ref, reference, state_ref = gradients(
            reference_net, x, autocast=autocast
        )
    torch.testing.assert_close(y, y_ref, rtol=1e-5, atol=1e-5)
    assert torch.equal(state, state_ref)
    assert relative_error(ours, reference) < (1e-2 if autocast else 1e-5)
    for name, value in norms.items():
        torch.testing.assert_close(reference_net.state_dict()[name], value)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_network(backend, autocast):
    def build():
        inner = chain(3)
        return nn.Sequential(nn.Conv2d(8, 8, 1), inner, nn.Conv2d(8, 8, 1))

    net = build()
    twin = stored(net)
    whole = torch.compile(net, backend=backend)
    x = images()
    with inversion_errors(net) as errors:
        gradients(copy.deepcopy(whole), x, autocast=autocast)
    y, ours, state = gradients(whole, x, autocast=autocast)
    y_ref, reference, state_ref = gradients(twin, x, autocast=autocast)
    assert set(errors.values()) <= {0.0}
    torch.testing.assert_close(
        y, y_ref, rtol=1e-2 if autocast else 1e-5, atol=1e-3
    )
    assert torch.equal(state, state_ref)
    assert relative_error(ours, reference) < (1e-2 if autocast else 1e-4)
    counts = [v for k, v in net.state_dict().items() if "num_batches" in k]
    assert all(count == 1 for count in counts)


def test_fullgraph_is_refused_with_the_remedy():
    net = torch.compile(bodies(), backend="eager", fullgraph=True)
    with pytest.raises(
        torch._dynamo.exc.Unsupported, match="save_memory=False"
    ):
        net(images())
    # The remedies work: evaluation, and stored activations.
    with torch.no_grad():
        net(images())
    net.save_memory = False
    net(images()).sum().backward()


class Brain(sb.Brain):
    """A step of any network on features."""

    def compute_forward(self, batch, stage):
        return self.modules.model(batch)

    def compute_objectives(self, predictions, batch, stage):
        return predictions.square().mean()


def lobe(kind):
    torch.manual_seed(0)
    if kind == "RevECAPA_TDNN":
        return RevECAPA_TDNN(20, channels=[8, 8, 8, 8, 24], lin_neurons=6)
    return RevResNet.from_preset(
        "RevNet34", downsampling=kind, base_channels=4, input_size=20
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["strided", "invertible", "RevECAPA_TDNN"])
def test_the_compile_flag_of_speechbrain(kind):
    found = []
    torch.manual_seed(1)
    feats = torch.randn(3, 21, 20)
    for flags in ({"compile": True}, {}):
        net = without_zeros(lobe(kind))
        brain = Brain(
            modules={"model": net},
            opt_class=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
            run_opts={"device": "cpu", **flags},
        )
        brain.on_fit_start()
        before = [p.detach().clone() for p in net.parameters()]
        loss = brain.fit_batch(feats).item()
        steps = [p - b for p, b in zip(net.parameters(), before)]
        found.append((loss, steps))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
    # What is compiled outside of the chain rounds differently.
    assert relative_error(found[0][1], found[1][1]) < 5e-3


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("what", ["network", "functions", "in place"])
def test_compiled_networks_and_functions_are_exact(what, backend):
    torch._dynamo.reset()
    torch.manual_seed(0)
    net = ReversibleSequence(
        [
            nn.Conv2d(3, 16, 3, padding=1),
            *(
                AdditiveCoupling(body(8, dropout=0.0), body(8, dropout=0.0))
                for _ in range(3)
            ),
        ]
    )
    called = net
    if what == "network":
        called = torch.compile(net, backend=backend)
    for block in net.blocks[1:]:
        for name in "fg" if what != "network" else "":
            function = getattr(block, name)
            if what == "functions":
                setattr(block, name, torch.compile(function, backend=backend))
            else:
                function.compile(backend=backend)
    x = torch.randn(2, 3, 20, 14)
    with inversion_errors(net) as errors:
        ours = called(x)
        ours.square().sum().backward()
    assert set(errors.values()) == {0.0} and len(errors) == 3
    grads = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    net.save_memory = False
    called(x).square().sum().backward()
    # The compiler rounds as it likes; its two versions differ by that.
    assert relative_error(grads, [p.grad for p in net.parameters()]) < 1e-4
