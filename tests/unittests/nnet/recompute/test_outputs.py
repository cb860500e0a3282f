"""Outputs that recomputed blocks do not keep.

Authors
 * The sb_memeff authors 2026
"""

import copy
import pickle
import weakref
from typing import NamedTuple

import pytest
import torch
from speechbrain.lobes.models.transformer.Branchformer import (
    BranchformerEncoder,
)
from speechbrain.lobes.models.transformer.Conformer import (
    ConformerDecoder,
    ConformerEncoder,
)
from speechbrain.lobes.models.transformer.Transformer import (
    TransformerDecoder,
    TransformerEncoder,
)
from torch import nn
from torch.nn.parallel.distributed import _find_tensors
from torch.utils._pytree import tree_map

from sb_memeff.nnet.recompute import recompute_blocks
from sb_memeff.nnet.recompute.outputs import DroppedOutput
from tests.unittests.nnet.reversible.chains import gradients
from tests.unittests.nnet.speech_networks import LAYERS, batch, conformer

SIZES = {"num_layers": 2, "nhead": 2, "d_model": 8}
POSITIONS = {"pos_embs": torch.ones(1, 19, 8)}
ENCODERS = {
    "transformer": (lambda: TransformerEncoder(d_ffn=16, **SIZES), {}),
    "conformer": (lambda: ConformerEncoder(d_ffn=16, **SIZES), POSITIONS),
    "branchformer": (
        lambda: BranchformerEncoder(
            kernel_size=3, csgu_linear_units=16, **SIZES
        ),
        POSITIONS,
    ),
}


def trained(net, *args, **kwargs):
    torch.manual_seed(1)
    y, *others = net(*args, **kwargs)
    y.square().sum().backward()
    return y, others, [p.grad for p in net.parameters()]


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_train_alike_without_attention_weights(name):
    build, positions = ENCODERS[name]
    torch.manual_seed(0)
    net = build()
    twin = copy.deepcopy(net)
    recompute_blocks(net, "layers.*", first_output_only=True)
    x = torch.rand(3, 10, 8)
    y, (attention,), ours = trained(net, x, **positions)
    assert [type(a) for a in attention] == 2 * [DroppedOutput]
    y_ref, (attention,), reference = trained(twin, x, **positions)
    assert all(isinstance(a, torch.Tensor) for a in attention)
    assert torch.equal(y, y_ref)
    for a, b in zip(ours, reference, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", [TransformerDecoder, ConformerDecoder])
def test_decoders_too(kind):
    torch.manual_seed(0)
    net = kind(d_ffn=16, attention_type="regularMHA", **SIZES)
    twin = copy.deepcopy(net)
    recompute_blocks(net, "layers.*", first_output_only=True)
    x, memory = torch.rand(3, 4, 8), torch.rand(3, 10, 8)
    y, attention, ours = trained(net, x, memory)
    assert [[type(a) for a in of] for of in attention] == [
        2 * [DroppedOutput],
        2 * [DroppedOutput],
    ]
    y_ref, _, reference = trained(twin, x, memory)
    assert torch.equal(y, y_ref)
    assert all(map(torch.equal, ours, reference))


@pytest.mark.parametrize("drop", [False, True])
def test_attention_weights_are_freed_in_forward(drop):
    net = ConformerEncoder(d_ffn=16, **SIZES)
    alive = []
    for layer in net.layers:
        layer.mha_layer.register_forward_hook(
            lambda module, args, result: alive.append(weakref.ref(result[1]))
        )
    recompute_blocks(net, "layers.*", first_output_only=drop)
    outputs = net(torch.rand(3, 10, 8), **POSITIONS)
    assert [a() is None for a in alive] == 2 * [drop]
    outputs[0].sum().backward()


@pytest.mark.parametrize("without", ["training", "gradients"])
def test_only_training_drops_them(without):
    net = ConformerEncoder(d_ffn=16, **SIZES)
    recompute_blocks(net, "layers.*", first_output_only=True)
    net.train(without != "training")
    with torch.set_grad_enabled(without != "gradients"):
        _, attention = net(torch.rand(3, 10, 8), **POSITIONS)
    assert [a.shape for a in attention] == 2 * [(3, 2, 10, 10)]


class Pair(NamedTuple):
    sequence: torch.Tensor
    rest: object


class Returning(nn.Module):
    """Returns its input doubled, within something."""

    def __init__(self, pack):
        super().__init__()
        self.pack = pack

    def forward(self, x):
        return self.pack(2 * x)


@pytest.mark.parametrize(
    "pack, kept",
    [
        (lambda x: x, lambda y: y),
        (lambda x: (x,), lambda y: y[0]),
        (lambda x: {"a": x, "b": x}, lambda y: y["b"]),
        (lambda x: ((x, x), x), lambda y: y[0][1]),
        (lambda x: [x, 3], lambda y: y[0]),
        (lambda x: Pair(x, {"more": x}), lambda y: y.sequence),
    ],
)
def test_the_first_output_of_anything(pack, kept):
    net = nn.Sequential(Returning(pack))
    recompute_blocks(net, "*", first_output_only=True)
    x = torch.rand(3, requires_grad=True)
    y = net(x)
    assert type(y) is type(pack(x))
    kept(y).sum().backward()
    assert x.grad.tolist() == [2, 2, 2]


def test_numbers_and_nested_tensors():
    net = nn.Sequential(Returning(lambda x: Pair(x, {"more": x, "n": 3})))
    recompute_blocks(net, "*", first_output_only=True)
    rest = net(torch.rand(3, requires_grad=True)).rest
    assert rest["n"] == 3 and type(rest["more"]) is DroppedOutput


@pytest.mark.parametrize(
    "use",
    [
        lambda a: a.mean(),
        lambda a: a.shape,
        lambda a: hasattr(a, "shape"),
        lambda a: a[0],
        lambda a: list(a),
        lambda a: len(a),
        lambda a: bool(a),
        lambda a: 2 * a,
        lambda a: a + 1,
        lambda a: a // 2,
        lambda a: a % 2,
        lambda a: 2**a,
        lambda a: a == 0,
        lambda a: a != torch.ones(2),
        lambda a: a ^ True,
        lambda a: a.__setitem__(0, 1),
        lambda a: torch.ones(2) * a,
        lambda a: torch.stack([torch.ones(2), a]),
        lambda a: nn.functional.softmax(a, -1),
        lambda a: a.numpy(),
        lambda a: torch.as_tensor(a),
    ],
)
def test_any_use_is_an_error_that_names_the_block(use):
    with pytest.raises(
        RuntimeError, match=r"layers\.1 keeps only.*first_output_only=False"
    ):
        use(DroppedOutput("layers.1"))


def test_what_frameworks_do_with_outputs_is_no_use():
    dropped = DroppedOutput("layers.1")
    outputs = [torch.ones(1), dropped]
    assert tree_map(lambda x: x, outputs)[1] is dropped
    assert len(list(_find_tensors(outputs))) == 1
    assert dropped.detach() is dropped
    assert repr(copy.deepcopy(outputs)[1]) == "DroppedOutput('layers.1')"
    loaded = pickle.loads(pickle.dumps(dropped))
    assert repr(loaded) == f"{dropped}"
    assert dropped is not None and dropped in outputs[1:]


def test_segments_and_nested_blocks():
    """The bits of the plain network."""
    nested = {"blocks": [LAYERS, f"{LAYERS}.mha_layer"]}
    found = []
    for options in (None, {"segment_length": 2}, nested):
        torch.manual_seed(0)
        net = conformer()
        if options is not None:
            options = {"blocks": LAYERS, **options}
            recompute_blocks(net, first_output_only=True, **options)
        found.append(gradients(net, *batch(), seed=3))
    for y, ours, _ in found[1:]:
        assert torch.equal(y, found[0][0])
        assert all(map(torch.equal, ours, found[0][1]))


class Halves(nn.Module):
    """Calls a block that returns two tensors."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.block = Returning(lambda x: (x.tanh(), x))

    def forward(self, x):
        y, more = self.block(self.linear(x))
        return y, [more]


def test_a_compiled_network():
    """Its graph returns None in place of dropped outputs."""
    torch._dynamo.reset()
    net = Halves()
    twin = copy.deepcopy(net)
    recompute_blocks(net, "block", first_output_only=True)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    x = torch.rand(3, 4)
    y, (rest,), ours = trained(compiled, x)
    assert rest == [None]
    y_ref, _, reference = trained(twin, x)
    torch.testing.assert_close(y, y_ref)
    for a, b in zip(ours, reference, strict=True):
        torch.testing.assert_close(a, b)
    torch._dynamo.reset()
