"""Networks that recompute named blocks train as if they did not."""

import contextlib
import copy
import functools
import inspect
import pickle
import random
import weakref

import numpy as np
import pytest
import speechbrain as sb
import torch
import torch.nn.functional as F
from hyperpyyaml import load_hyperpyyaml
from speechbrain.lobes.models.beats import BEATsConfig, TransformerEncoder
from speechbrain.lobes.models.ECAPA_TDNN import ECAPA_TDNN
from speechbrain.nnet.containers import LengthsCapableSequential
from speechbrain.utils.checkpoints import Checkpointer
from speechbrain.utils.dynamic_chunk_training import DynChunkTrainConfig
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from sb_memeff.memory.step import training_step_memory
from sb_memeff.nnet.recompute import (
    fit_recompute,
    recompute_blocks,
    store_blocks,
)
from sb_memeff.nnet.replay import mismatch
from tests.unittests.nnet.reversible.chains import (
    assert_same_state,
    gradients,
    relative_error,
    saved_bytes,
)
from tests.unittests.nnet.speech_networks import (
    LAYERS,
    NETWORKS,
    batch,
    build,
    conformer,
    ecapa,
    xvector,
)
from tests.unittests.one_analysis import one_analysis  # noqa: F401


def pair(name, dtype=torch.float32):
    """A network that recomputes and its untouched twin."""
    net, twin = build(name, dtype), build(name, dtype)
    recompute_blocks(net, **NETWORKS[name][1])
    return net, twin


def body(width=4):
    """Saves three tensors of the size of its input."""
    return nn.Sequential(
        nn.Conv1d(width, width, 3, padding=1),
        nn.BatchNorm1d(width),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Conv1d(width, width, 3, padding=1),
        nn.Tanh(),
    )


def checkpointed(net, blocks=None, fake=False):
    """Every block called through torch's function, as its users do."""
    for block in net if blocks is None else blocks:
        block.forward = functools.partial(
            checkpoint,
            block.forward,
            use_reentrant=False,
            # Fake tensors cannot hold a random state.
            preserve_rng_state=not fake,
        )
    return net


once = pytest.mark.usefixtures("one_analysis")


def stack(depth=4):
    torch.manual_seed(0)
    return nn.Sequential(*(body() for _ in range(depth))).double()


def signal():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 4, 50, generator=generator, dtype=torch.float64)


def assert_same_step(net, twin, *args, **options):
    """One step on each: every bit is equal, the random stream too."""
    y, ours, state = gradients(net, *args, **options)
    y_ref, reference, state_ref = gradients(twin, *args, **options)
    assert torch.equal(y, y_ref)
    assert torch.equal(state, state_ref)
    for a, b in zip(ours, reference, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)
    assert_same_state(net, twin)


# --- SpeechBrain's networks --------------------------------------------------


def dtypes(name):
    # SpeechBrain's relative attention computes in float32.
    relative = name.startswith("conformer") and name != "conformer_absolute"
    return [torch.float32] if relative else [torch.float32, torch.float64]


@pytest.mark.parametrize(
    "name, dtype", [(n, d) for n in NETWORKS for d in dtypes(n)]
)
def test_a_step_is_bit_equal_to_the_untouched_network(name, dtype):
    net, twin = pair(name, dtype)
    assert_same_step(net, twin, *batch(dtype))


@pytest.mark.parametrize("name", NETWORKS)
def test_bf16_autocast_with_backward_outside(name):
    net, twin = pair(name)
    assert_same_step(net, twin, *batch(), autocast=torch.bfloat16)


@pytest.mark.parametrize("name", ["ecapa", "resnet", "xvector", "conformer"])
def test_state_dict_after_training_steps(name):
    trained = []
    for net in pair(name):
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
        for step in range(3):
            optimizer.zero_grad()
            gradients(net, *batch(), seed=step)
            optimizer.step()
        trained.append(net)
    assert_same_state(*trained)


@pytest.mark.parametrize("name", NETWORKS)
def test_eval_is_unchanged(name):
    net, twin = pair(name)
    net.eval()
    twin.eval()
    x, lengths = batch()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            torch.manual_seed(0)  # Xvector's pooling draws noise
            y = net(x, lengths)
            torch.manual_seed(0)
            assert torch.equal(y, twin(x, lengths))
            assert y.grad_fn is None
    # With gradients (frozen batch norms) it recomputes.
    assert_same_step(net, twin, x, lengths)


def test_dynamic_chunks_and_dropped_layers():
    """An argument that is no tensor; layers that are not called."""
    found = []
    for recompute in (True, False):
        torch.manual_seed(0)
        net = conformer(layers=6, layerdrop_prob=0.5)
        if recompute:
            recompute_blocks(net, LAYERS, segment_length=2)
        config = DynChunkTrainConfig(chunk_size=8, left_context_size=1)
        found.append(
            gradients(net, *batch(), dynchunktrain_config=config, seed=3)
        )
    (_, ours, state), (_, reference, state_ref) = found
    assert torch.equal(state, state_ref)
    assert any(a is None for a in ours)
    for a, b in zip(ours, reference, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


def beats(layerdrop=0.5):
    """Its encoder drops layers by numpy's random numbers."""
    torch.manual_seed(0)
    return TransformerEncoder(
        BEATsConfig(
            {
                "encoder_layers": 4,
                "encoder_embed_dim": 16,
                "encoder_ffn_embed_dim": 32,
                "encoder_attention_heads": 4,
                "encoder_layerdrop": layerdrop,
                "conv_pos": 8,
                "conv_pos_groups": 4,
                "relative_position_embedding": True,
                "num_buckets": 8,
                "max_distance": 16,
                "gru_rel_pos": True,
            }
        )
    )


@pytest.mark.parametrize("blocks", ["layers.*", "", ["", "layers.*"]])
def test_beats_drops_the_same_layers_in_the_replay(blocks):
    """With the drop inside and outside the recomputed block."""
    found = []
    dropped = False
    for recompute in (True, False):
        net = beats()
        if recompute:
            recompute_blocks(net, blocks)
        random.seed(0)
        np.random.seed(2)
        torch.manual_seed(0)
        x = torch.randn(2, 12, 16).requires_grad_()
        for _ in range(2):
            y, _ = net(x * 1)
            y.square().sum().backward()
        gradients = [x.grad, *(p.grad for p in net.parameters())]
        dropped |= any(g is None for g in gradients)
        found.append((y, gradients, np.random.rand(), torch.rand(1)))
    (y, ours, *streams), (y_ref, reference, *streams_ref) = found
    assert torch.equal(y, y_ref) and streams == streams_ref
    assert dropped
    for a, b in zip(ours, reference, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


# --- memory ------------------------------------------------------------------

# Activations at the peak of a step, as a part of the untouched network's, at
# small widths. Those at full width are in benchmarks/results.
AT_MOST = {
    "ecapa": 0.61,
    "ecapa_dropout": 0.66,
    "resnet": 0.53,
    "resnet_nested": 0.53,
    "xvector": 0.55,
    "conformer": 0.60,
    "conformer_every_2": 0.80,
    "conformer_absolute": 0.39,
}


def activations(build_network):
    return training_step_memory(build_network, (16, 200, 20)).activation_bytes


@functools.cache
def recomputing(name):
    return activations(lambda: pair(name)[0])


@functools.cache
def storing(network):
    """Several of NETWORKS recompute the same one."""
    return activations(network)


@pytest.mark.parametrize("name", NETWORKS)
@once
def test_peak_memory_falls(name):
    ratio = recomputing(name) / storing(NETWORKS[name][0])
    print(f"{name}: {ratio:.3f}")
    assert ratio < AT_MOST[name]


@pytest.mark.parametrize("name", ["ecapa", "resnet", "conformer"])
@once
def test_peak_memory_is_that_of_torch_on_the_same_blocks(name):
    def theirs():
        net = build(name)
        names = recompute_blocks(net, **NETWORKS[name][1])
        store_blocks(net)
        return checkpointed(
            net, [net.get_submodule(n) for n in names], fake=True
        )

    assert recomputing(name) <= 1.001 * activations(theirs)


def test_stored_bytes_do_not_depend_on_tensors_that_blocks_save():
    net = stack(depth=8)
    x = signal()
    plain, _ = saved_bytes(net, x)
    recompute_blocks(net, "*")
    kept, _ = saved_bytes(net, x)
    assert kept == 8 * x.untyped_storage().nbytes()
    assert plain > 2.9 * kept
    store_blocks(net)
    recompute_blocks(net, "*", segment_length=4)
    kept, _ = saved_bytes(net, x)
    assert kept == 2 * x.untyped_storage().nbytes()


@once
def test_peak_grows_by_one_input_a_block():
    def peak(depth):
        def network():
            net = nn.Sequential(*(body() for _ in range(depth)))
            recompute_blocks(net, "*")
            return net

        return training_step_memory(network, (16, 4, 1000)).activation_bytes

    state = 4 * 16 * 4 * 1000
    assert peak(12) - peak(4) == pytest.approx(8 * state, rel=0.02)


# --- better than torch.utils.checkpoint --------------------------------------


def test_batch_norm_counts_once_where_torch_counts_twice():
    nets = {"plain": stack(), "ours": stack(), "torch": checkpointed(stack())}
    recompute_blocks(nets["ours"], "*")
    for net in nets.values():
        gradients(net, signal())
    norms = {kind: net[0][1] for kind, net in nets.items()}
    assert norms["plain"].num_batches_tracked == 1
    assert norms["ours"].num_batches_tracked == 1
    assert norms["torch"].num_batches_tracked == 2
    mean = norms["plain"].running_mean
    assert torch.equal(norms["ours"].running_mean, mean)
    assert not torch.allclose(norms["torch"].running_mean, mean)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_batch_norm_of_any_kind(momentum):
    net, twin = stack(), stack()
    recompute_blocks(net, "*", segment_length=2)
    for module in (net, twin):
        for block in module:
            block[1].momentum = momentum
    # As SpeechBrain does after the yaml file is loaded.
    net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    twin = nn.SyncBatchNorm.convert_sync_batchnorm(twin)
    assert isinstance(net[0][1], nn.SyncBatchNorm)
    for _ in range(2):
        assert_same_step(net, twin, signal())
    assert net[0][1].num_batches_tracked == 2


def test_modules_with_other_state():
    """Spectral norm changes its buffers in forward, and uses them."""
    net = stack()
    for block in net:
        nn.utils.parametrizations.spectral_norm(block[0])
    twin = copy.deepcopy(net)
    recompute_blocks(net, "*")
    for _ in range(2):
        assert_same_step(net, twin, signal())


def test_changed_weights_are_detected_where_torch_does_not():
    """Plain autograd finds them too, by its version counters."""
    net, theirs = stack(), checkpointed(stack())
    recompute_blocks(net, "*")
    for module in (net, theirs):
        y = module(signal())
        with torch.no_grad():
            module[1][0].weight.add_(1)
        if module is theirs:
            y.sum().backward()  # silently wrong
            continue
        with pytest.raises(RuntimeError, match=r"1\.0\.weight was changed"):
            y.sum().backward()
    y = net(signal())
    net[2].eval()
    with pytest.raises(RuntimeError, match="mode of the forward pass"):
        y.sum().backward()
    net[2].train()
    # Of a part of a block; weights that are replaced.
    y = net(signal())
    net[2][3].eval()
    with pytest.raises(RuntimeError, match=r"eval\(\) of 2\.3 was called"):
        y.sum().backward()
    net[2][3].train()
    y = net(signal())
    net[3][0].weight.data = net[3][0].weight.data.clone()
    with pytest.raises(RuntimeError, match=r"3\.0\.weight was changed"):
        y.sum().backward()


def test_torch_cannot_do_xvector():
    """It calls layer(x, lengths=...), and layer(x) after a TypeError."""
    net = xvector()
    checkpointed(net, net.blocks)
    with pytest.raises(TypeError, match="lengths"):
        net(*batch()).sum().backward()


# --- how a block is called ---------------------------------------------------


def test_input_that_needs_no_gradient_and_frozen_blocks():
    net, twin = stack(), stack()
    recompute_blocks(net, "*")
    for module in (net, twin):
        module[0].requires_grad_(False)
        module[2][0].bias.requires_grad_(False)
        torch.manual_seed(0)
        module(signal()).square().sum().backward()
    for a, b in zip(net.parameters(), twin.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None) == (not b.requires_grad)
        assert a.grad is None or torch.equal(a.grad, b.grad)
    net.requires_grad_(False)
    assert not net(signal()).requires_grad


def test_frozen_first_blocks_store_no_tensor():
    net = stack(depth=3)
    net[:2].requires_grad_(False)
    recompute_blocks(net, "*")
    outputs = []
    for block in net:
        block.register_forward_hook(
            lambda m, args, y: outputs.append(weakref.ref(y.untyped_storage()))
        )
    y = net(signal())
    assert [output() is None for output in outputs] == [True, False, False]
    y.sum().backward()


def test_gradient_accumulation():
    net, twin = stack(), stack()
    recompute_blocks(net, "*")
    for seed in range(3):
        # The gradients are never reset.
        assert_same_step(net, twin, signal() * (1 + seed), seed=seed)


class Twice(nn.Module):
    """A block is called twice, and around a foreign operation."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a = body().double()
        self.b = body().double()

    def forward(self, x):
        y = self.b(self.a(self.a(x)))
        return self.b(y + self.a(y))


@pytest.mark.parametrize("segment_length", [1, 2])
def test_blocks_that_are_called_several_times(segment_length):
    net, twin = Twice(), Twice()
    recompute_blocks(net, "*", segment_length=segment_length)
    assert_same_step(net, twin, signal())
    assert net.a[1].num_batches_tracked == 3


def test_a_block_called_in_a_loop_stores_its_input_each_time():
    """Or backward would hold the activations of all calls at once."""

    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = body().double()

        def forward(self, x):
            for _ in range(5):
                x = self.block(x)
            return x

    x = signal()
    for segment_length in (1, 2):
        net = Loop()
        recompute_blocks(net, "*", segment_length=segment_length)
        kept, _ = saved_bytes(net, x)
        assert kept == 5 * x.untyped_storage().nbytes()


class Counting(nn.Module):
    """Counts its calls in a list outside, which is not restored."""

    def __init__(self, calls):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.count = lambda: calls.append(1)

    def forward(self, x):
        self.count()
        return self.linear(x).tanh()


def test_blocks_of_a_segment_that_do_not_feed_each_other_stay_apart():
    """Backward of one branch does not run the other."""
    calls = [], []
    net = nn.ModuleList(map(Counting, calls))
    recompute_blocks(net, "*", segment_length=2)
    x = torch.rand(3, 4)
    first, second = (block(x) for block in net)
    second.sum().backward()
    assert list(map(len, calls)) == [1, 2]
    first.sum().backward()
    assert list(map(len, calls)) == [2, 2]


def test_a_block_that_is_fed_by_name_stores_no_input():
    net = nn.Sequential(Counting([]), Counting([]))
    recompute_blocks(net, "*", segment_length=2)

    class Named(nn.Module):
        def forward(self, x):
            return net[1](x=net[0](x=x))

    kept, _ = saved_bytes(Named(), torch.rand(30, 4))
    assert kept == 30 * 4 * 4


@pytest.mark.parametrize("segment_length", [1, 3])
def test_two_forwards_before_one_backward(segment_length):
    found = []
    for recompute in (True, False):
        net = stack()
        if recompute:
            recompute_blocks(net, "*", segment_length=segment_length)
        torch.manual_seed(3)
        first, second = net(signal()), net(2 * signal())
        (first * second).sum().backward()
        found.append([p.grad for p in net.parameters()])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_hooks():
    """Of a block once; inside it once more; of a parameter once."""
    net = stack(depth=1)
    recompute_blocks(net, "0")
    calls = {"block": 0, "inside": 0, "backward": 0, "weight": 0}

    def count(name):
        def hook(*_):
            calls[name] += 1

        return hook

    net[0].register_forward_hook(count("block"))
    net[0][0].register_forward_hook(count("inside"))
    net[0][2].register_full_backward_hook(count("backward"))
    net[0][0].weight.register_hook(count("weight"))
    net(signal()).sum().backward()
    assert calls == {"block": 1, "inside": 2, "backward": 1, "weight": 1}


def test_a_hook_that_changes_the_input_of_a_block():
    net, twin = stack(), stack()
    recompute_blocks(net, "*")
    for module in (net, twin):
        module[1].register_forward_pre_hook(lambda m, args: (args[0] * 3,))
        module[2].register_forward_hook(lambda m, args, out: out.sin())
    assert_same_step(net, twin, signal())


def test_blocks_in_blocks_run_twice_more():
    """With the block around them, and then by themselves."""
    calls = []

    class Inner(nn.Module):
        def forward(self, x):
            calls.append(1)
            return x.tanh().exp()

    net = nn.Sequential(nn.Sequential(Inner(), Inner()), Inner())
    recompute_blocks(net, ["*", "0.*"])
    x = torch.ones(3, requires_grad=True)
    net(x).sum().backward()
    # In forward, with the block around it, by itself.
    assert len(calls) == 3 + 3 + 2


# --- what the module stays ---------------------------------------------------


def test_class_names_keys_and_references():
    net, twin = build("ecapa"), build("ecapa")
    block, forward = net.blocks[1], type(net.blocks[1]).forward
    recompute_blocks(net, ["blocks.*", "mfa"])
    assert net.blocks[1] is block
    assert isinstance(block, type(twin.blocks[1]))
    assert type(block).__name__ == type(twin.blocks[1]).__name__
    assert repr(net) == repr(twin)
    assert list(net.state_dict()) == list(twin.state_dict())
    assert [n for n, _ in net.named_modules()] == [
        n for n, _ in twin.named_modules()
    ]
    # Others of the same class are left alone.
    assert type(twin.blocks[1]).forward is forward
    twin.load_state_dict(net.state_dict())
    # SpeechBrain looks for an argument `lengths`, without unwrapping.
    assert inspect.getfullargspec(block.forward) == inspect.getfullargspec(
        twin.blocks[1].forward
    )


def test_speechbrain_containers_still_pass_lengths():
    seen = []

    class Block(nn.Module):
        def forward(self, x, lengths=None):
            seen.append(lengths)
            return x.tanh()

    net = LengthsCapableSequential(Block())
    recompute_blocks(net, "*")
    x = torch.randn(2, 3, requires_grad=True)
    lengths = torch.ones(2)
    net(x, lengths=lengths).sum().backward()
    assert seen[0] is lengths and torch.equal(seen[1], lengths)


def clones():
    return {
        "deepcopy": copy.deepcopy,
        "pickle": lambda net: pickle.loads(pickle.dumps(net)),
        "to": lambda net: net.to("cpu").float().double(),
        "a_block": lambda net: nn.Sequential(
            *(copy.deepcopy(block) for block in net)
        ),
        "shallow": lambda net: nn.Sequential(
            *(copy.copy(block) for block in net)
        ),
    }


@pytest.mark.parametrize("how", clones())
@pytest.mark.parametrize("segment_length", [1, 2])
def test_copies_recompute_too(how, segment_length):
    net, twin = stack(), stack()
    recompute_blocks(net, "*", segment_length=segment_length)
    x = signal()
    y = net(x)  # a segment is open while the copy is made
    copied = clones()[how](net.requires_grad_())
    kept, _ = saved_bytes(copied, x)
    assert kept <= 4 * x.untyped_storage().nbytes()
    twin.load_state_dict(copied.state_dict())
    assert_same_step(copied, twin, x)
    assert (
        copied is net
        or copied[0][0].weight is not net[0][0].weight
        or (how == "shallow")
    )
    del y


def test_torch_save_of_a_whole_module(tmp_path):
    net = build("ecapa")
    recompute_blocks(net, "blocks.*")
    torch.save(net, tmp_path / "net.pt")
    loaded = torch.load(tmp_path / "net.pt", weights_only=False)
    assert_same_step(loaded, build("ecapa"), *batch())
    assert store_blocks(loaded) == [f"blocks.{i}" for i in range(4)]


def test_store_blocks_undoes_it():
    net, twin = stack(), stack()
    recompute_blocks(net, "*")
    assert store_blocks(net) == ["0", "1", "2", "3"]
    assert store_blocks(net) == []
    assert type(net[0]) is nn.Sequential
    assert vars(net[0]).keys() == vars(twin[0]).keys()
    assert saved_bytes(net, signal())[0] == saved_bytes(twin, signal())[0]
    assert b"sb_memeff" not in pickle.dumps(net)


def test_tracing_and_scripting():
    net, twin = stack().eval(), stack().eval()
    recompute_blocks(net, "*")
    x = signal()
    for compiled in (torch.jit.trace(net, x), torch.jit.script(net)):
        assert torch.allclose(compiled(x), twin(x))
    with torch.no_grad():
        exported = torch.export.export(net, (x,)).module()
    assert torch.allclose(exported(x), twin(x))


def test_torch_compile():
    def small(depth=2):
        torch.manual_seed(0)
        blocks = (body()[:3].append(nn.Tanh()) for _ in range(depth))
        return nn.Sequential(*blocks).double()

    net, twin = small(), small()
    recompute_blocks(net, "*")
    x = signal()
    torch._dynamo.reset()
    try:
        compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
        y, ours, _ = gradients(compiled, x)
    finally:
        torch._dynamo.reset()
    y_ref, reference, _ = gradients(twin, x)
    assert relative_error([y], [y_ref]) < 1e-12
    assert relative_error(ours, reference) < 1e-12
    assert net[0][1].num_batches_tracked == 1


class Tied(nn.Module):
    """Uses what its file imports, and may hide from the compiler."""

    def __init__(self, breaks=False, norm=True):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.breaks = breaks

    def forward(self, x, scale: float = 1.0):
        y = F.gelu(self.norm(self.linear(x))) * scale
        if not torch.jit.is_scripting():
            y = halved(y, self.breaks)
        return x + torch.tanh(y)


def halved(y, breaks):
    if breaks:
        torch._dynamo.graph_break()
    return y * 1.0


def tied(**options):
    torch.manual_seed(0)
    return nn.Sequential(Tied(**options), Tied(**options)).double()


def test_scripting_of_blocks_with_code_of_their_own():
    net, twin = tied(), tied()
    recompute_blocks(net, "*")
    x = torch.rand(5, 4, dtype=torch.float64)
    y = torch.jit.script(net)(x)
    assert torch.equal(y, torch.jit.script(twin)(x))
    # It is still the network that recomputes.
    twin.load_state_dict(net.state_dict())
    assert saved_bytes(net, x)[0] < saved_bytes(twin, x)[0]
    net, twin = tied(), tied()
    recompute_blocks(net, "*")
    assert_same_step(net, twin, x)


@pytest.fixture
def compiler():
    """Begins and ends with nothing compiled."""
    torch._dynamo.reset()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


def assert_compiled_like(net, twin, backend, **options):
    x = torch.rand(5, 4, dtype=torch.float64)
    compiled = torch.compile(net, backend=backend, **options)
    for _ in range(2):
        y, ours, _ = gradients(compiled, x)
        y_ref, reference, _ = gradients(twin, x)
        assert relative_error([y], [y_ref]) < 1e-12
        assert relative_error(ours, reference) < 1e-12
    for module, reference in zip(net, twin, strict=True):
        assert module.norm.num_batches_tracked == 2
        assert (
            relative_error(
                [module.norm.running_var], [reference.norm.running_var]
            )
            < 1e-12
        )


@pytest.mark.parametrize("breaks", [False, True])
@pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
def test_compiled_networks_count_batches_once(compiler, backend, breaks):
    """Also where the compiler cannot trace a block as a whole."""
    net, twin = tied(breaks=breaks), tied(breaks=breaks)
    recompute_blocks(net, "*")
    assert_compiled_like(net, twin, backend)


class TiedBrain(sb.Brain):
    def compute_forward(self, batch, stage):
        return self.modules.net(batch[0])

    def compute_objectives(self, predictions, batch, stage):
        return predictions.square().mean()


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"compile": True}, {"jit": True}, {"compile_module_keys": {"net"}}],
)
def test_speechbrains_flags_that_compile(compiler, options):
    weights = []
    for recompute in (True, False):
        net = tied()
        if recompute:
            recompute_blocks(net, "*")
        brain = TiedBrain(
            {"net": net},
            opt_class=functools.partial(torch.optim.SGD, lr=0.1),
            run_opts={"device": "cpu", **(options if recompute else {})},
        )
        torch.manual_seed(0)
        data = TensorDataset(torch.rand(12, 4, dtype=torch.float64))
        brain.fit(range(2), DataLoader(data, batch_size=4), progressbar=False)
        weights.append(list(net.state_dict().values()))
    assert relative_error(*weights) < 1e-12
    assert net[0].norm.num_batches_tracked == 6


def test_a_compiled_block_in_a_network_that_is_not(compiler):
    """The module itself, and one inside it."""
    net, twin = tied(), tied()
    recompute_blocks(net, "*")
    net[0].compile(backend="aot_eager")
    net[1].linear.compile(backend="aot_eager")
    x = torch.rand(5, 4, dtype=torch.float64)
    for _ in range(2):
        y, ours, _ = gradients(net, x)
        y_ref, reference, _ = gradients(twin, x)
        assert relative_error([y], [y_ref]) < 1e-12
        assert relative_error(ours, reference) < 1e-12
        assert_same_state(net, twin)


class Randomly(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x):
        return torch.tanh(self.norm(self.linear(x)) * random.random())


def test_compiled_blocks_that_draw_from_pythons_generator(compiler):
    torch.manual_seed(0)
    net = nn.Sequential(Randomly(), Randomly()).double()
    twin = copy.deepcopy(net)
    recompute_blocks(net, "*")
    x = torch.rand(5, 4, dtype=torch.float64)
    compiled = torch.compile(net, backend="aot_eager")
    found = []
    for module in (compiled, twin):
        random.seed(0)
        found.append((gradients(module, x), random.random()))
    ((y, ours, _), end), ((y_ref, reference, _), end_ref) = found
    assert relative_error([y], [y_ref]) < 1e-12
    assert relative_error(ours, reference) < 1e-12
    assert end == end_ref


# --- parametrizations --------------------------------------------------------


def normed():
    """Two convolutions whose weights are computed, and one that is not."""
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Conv1d(4, 4, 3) for _ in range(3))).double()
    for conv in net[:2]:
        parametrizations.weight_norm(conv)
    return net


@pytest.mark.parametrize("first", ["recompute", "norm"])
def test_weight_norm_before_and_after(first):
    """Whatever comes first, each can be taken away without the other."""
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Conv1d(4, 4, 3) for _ in range(3))).double()
    twin = copy.deepcopy(net)
    if first == "recompute":
        recompute_blocks(net, "*")
    for conv in (*net[:2], *twin[:2]):
        parametrizations.weight_norm(conv)
    if first == "norm":
        recompute_blocks(net, "*")
    assert_same_step(net, twin, signal())
    assert kept_inputs(net) == 3
    # Off with one of the norms, the other block stays as it is.
    for module in (net, twin):
        parametrize.remove_parametrizations(module[0], "weight")
    assert not parametrize.is_parametrized(net[0])
    assert type(net[0]).__mro__[1] is nn.Conv1d
    assert_same_step(net, twin, signal())
    assert kept_inputs(net) == 3
    # Off with the recomputation, the norm of the second stays.
    assert store_blocks(net) == ["0", "1", "2"]
    assert type(net[0]) is type(net[2]) is nn.Conv1d
    assert parametrize.is_parametrized(net[1])
    assert type(net[1]).__bases__ == (nn.Conv1d,)
    assert_same_step(net, twin, signal())
    parametrize.remove_parametrizations(net[1], "weight")
    assert type(net[1]) is nn.Conv1d
    assert recompute_blocks(net, "*") == ["0", "1", "2"]


def kept_inputs(net):
    """How many tensors are stored between forward and backward."""
    count = 0

    def pack(tensor):
        nonlocal count
        count += tensor.dim() == 3 and not isinstance(tensor, nn.Parameter)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        net(signal())
    return count


def test_two_parametrizations_of_one_module():
    net = normed()
    recompute_blocks(net, "*")
    parametrizations.orthogonal(net[2])
    parametrize.register_parametrization(net[2], "bias", nn.Tanh())
    parametrize.remove_parametrizations(net[2], "weight")
    assert parametrize.is_parametrized(net[2], "bias")
    twin = copy.deepcopy(net)
    assert store_blocks(twin) == ["0", "1", "2"]
    assert kept_inputs(net) == 3
    assert_same_step(net, twin, signal())


@pytest.mark.parametrize("above", ["norm", "library"])
def test_a_block_that_recomputes_below_another_class_does_not_twice(above):
    """Blocks may be named again, even if their class has changed."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(4, 4, 3)).double()
    recompute_blocks(net, "*")
    if above == "norm":
        parametrizations.weight_norm(net[0])
    else:
        cls = type(net[0])
        net[0].__class__ = type(f"Sharded{cls.__name__}", (cls,), {})
    twin = copy.deepcopy(net)
    assert store_blocks(twin) == ["0"]
    assert recompute_blocks(net, "*") == ["0"]
    assert_same_step(net, twin, signal())
    # Once in forward, once in backward.
    calls = []
    net[0]._conv_forward = lambda *args: (
        calls.append(1) or nn.Conv1d._conv_forward(net[0], *args)
    )
    net(signal()).sum().backward()
    assert len(calls) == 2


def test_copies_of_a_network_with_weight_norm_recompute_by_themselves():
    """torch's parametrized copies share their class."""
    net = normed()
    twin = copy.deepcopy(net)
    recompute_blocks(net, "*")
    assert store_blocks(twin) == []
    copied = copy.deepcopy(net)
    assert store_blocks(net) == ["0", "1", "2"]
    assert store_blocks(copied) == ["0", "1", "2"]
    assert_same_step(net, twin, signal())


def test_recomputation_below_a_class_of_another_library():
    """As fully_shard does; without ours on top, blocks still can store."""
    net, twin = stack(), stack()
    recompute_blocks(net, "*")
    for block in net:
        cls = type(block)
        block.__class__ = type(f"Sharded{cls.__name__}", (cls,), {})
    assert store_blocks(net) == ["0", "1", "2", "3"]
    assert_same_step(net, twin, signal())
    stored = saved_bytes(twin, signal())[0]
    assert saved_bytes(net, signal())[0] == stored
    assert recompute_blocks(net, "*") == ["0", "1", "2", "3"]
    assert saved_bytes(net, signal())[0] < stored
    twin.load_state_dict(net.state_dict())
    assert_same_step(net, twin, signal())


@pytest.mark.parametrize("backward_inside", [True, False])
def test_cached_parametrizations(backward_inside):
    net = normed()
    twin = copy.deepcopy(net)
    recompute_blocks(net, "*")
    found = []
    for module in (net, twin):
        x = signal().requires_grad_()
        with parametrize.cached():
            # A weight that is in the cache before the block is called.
            loss = module[0].weight.sum() + module(x).square().sum()
            loss += module(2 * x).square().sum()
            if backward_inside:
                loss.backward()
        if not backward_inside:
            loss.backward()
        found.append([x.grad, *(p.grad for p in module.parameters())])
    assert all(g is not None for g in found[0])
    # Sums in another order.
    assert relative_error(*found) < 1e-14


# --- names and options -------------------------------------------------------


@pytest.mark.parametrize(
    "blocks, expected",
    [
        ("mfa", ["mfa"]),
        ("blocks.[12]", ["blocks.1", "blocks.2"]),
        (["mfa", "blocks.0"], ["blocks.0", "mfa"]),
        ("blocks.*.tdnn1", [f"blocks.{i}.tdnn1" for i in (1, 2, 3)]),
        ("**.tdnn1", [f"blocks.{i}.tdnn1" for i in (1, 2, 3)]),
        (["blocks.1", "blocks.1"], ["blocks.1"]),
        ("", [""]),
    ],
)
def test_names(blocks, expected):
    assert recompute_blocks(ecapa(), blocks) == expected


def test_networks_by_name():
    """As the modules of a yaml file."""
    modules = {"front": nn.Linear(2, 2), "net": ecapa()}
    names = recompute_blocks(modules, ["front", "net.mfa"])
    assert names == ["front", "net.mfa"]
    assert store_blocks(modules["net"]) == ["mfa"]
    assert store_blocks(modules["front"]) == [""]


def test_a_switch():
    net = ecapa()
    assert recompute_blocks(net, "no such block", enabled=False) == []
    assert store_blocks(net) == []


def test_a_module_with_two_names_is_one_block():
    net = nn.ModuleDict({"a": body()})
    net["b"] = net["a"]
    assert recompute_blocks(net, ["b"]) == ["b"]
    store_blocks(net)
    assert recompute_blocks(net, "*") == ["a"]


@pytest.mark.parametrize(
    "every, expected",
    [
        (1, "01234567"),
        (2, "0246"),
        (3, "036"),
        (8, "0"),
        (100, "0"),
        (1.5, "013467"),
        (8 / 7, "0123456"),
        (8 / 5, "01346"),
    ],
)
def test_every(every, expected):
    names = recompute_blocks(stack(depth=8), "*", every=every)
    assert "".join(names) == expected


@pytest.mark.parametrize("total, count", [(15, 13), (17, 7), (30, 22)])
def test_every_is_not_fooled_by_rounding(total, count):
    net = nn.Sequential(*(nn.Identity() for _ in range(total)))
    names = recompute_blocks(net, "*", every=total / count)
    assert names == [str(i * total // count) for i in range(count)]


@pytest.mark.parametrize("options", [{"every": 2}, {"segment_length": 2}])
def test_the_network_itself_holds_its_blocks(options):
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with pytest.raises(ValueError, match="0 is inside the network itself"):
        recompute_blocks(net, "**", **options)
    assert type(net) is nn.Sequential


def test_every_counts_segments():
    names = recompute_blocks(stack(depth=8), "*", every=2, segment_length=3)
    assert "".join(names) == "01267"


def test_another_call_adds_blocks():
    net, twin = stack(), stack()
    recompute_blocks(net, "0")
    recompute_blocks(net, "[13]")
    recompute_blocks(net, "0.*")  # and within block 0
    assert_same_step(net, twin, signal())
    assert store_blocks(net)[:2] == ["0", "0.0"]


def test_bad_names():
    with pytest.raises(
        ValueError, match=r"'block\.\*'.* mfa, asp,.* blocks\.\*,"
    ):
        recompute_blocks(ecapa(), ["mfa", "block.*"])
    with pytest.raises(
        ValueError, match=r"blocks is a ModuleList.*'blocks\.\*'"
    ):
        recompute_blocks(ecapa(), "blocks")
    with pytest.raises(ValueError, match="names no module"):
        recompute_blocks(ecapa(), [])
    with pytest.raises(ValueError, match=r"transformer\.encoder\.layers\.\*,"):
        recompute_blocks(conformer(), "layers.*")
    with pytest.raises(TypeError, match="got list"):
        recompute_blocks([ecapa()], "*")
    with pytest.raises(TypeError, match="got dict"):
        recompute_blocks({"a": ecapa(), "b": 3}, "*")
    scripted = nn.Sequential(torch.jit.script(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="0 is compiled by torch.jit"):
        recompute_blocks(scripted, "*")
    with pytest.raises(ValueError, match="forward of the instance 2"):
        net = stack()
        net[2].forward = net[2].forward
        recompute_blocks(net, "*")
    # Nothing was changed before the error.
    assert store_blocks(net) == []


@pytest.mark.parametrize(
    "options, message",
    [
        ({"every": 0}, "every=0"),
        ({"every": 0.5}, "every=0.5"),
        ({"every": "2"}, "every='2'"),
        ({"segment_length": 0}, "segment_length=0"),
        ({"segment_length": 1.5}, "segment_length=1.5"),
        ({"every": True}, "every=True"),
    ],
)
def test_bad_options(options, message):
    net = stack()
    with pytest.raises(ValueError, match=message):
        recompute_blocks(net, "*", **options)
    assert store_blocks(net) == []


def test_fewer_blocks_than_every():
    """The first of them recomputes, however large the number."""
    for every in (4, 5, 1e300):
        assert recompute_blocks(stack(), "*", every=every) == ["0"]


@pytest.mark.parametrize(
    "options",
    [{"first_output_only": True}, {"split": 2}, {"split": 2, "shared": []}],
)
def test_a_block_is_named_again_with_other_options(options):
    """Neither the old nor the new ones would be lost unnoticed."""
    net = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2))
    recompute_blocks(net, "1", **options)
    with pytest.raises(ValueError, match="1 already recomputes.*store_blocks"):
        recompute_blocks(net, ["0", "1"])
    assert store_blocks(net) == ["1"]
    recompute_blocks(net, "1", **options)
    # The same again, and others.
    assert recompute_blocks(net, "*", **options) == ["0", "1", "2"]


@pytest.mark.parametrize("options", [{"every": 2}, {"segment_length": 2}])
def test_blocks_in_blocks_need_every_one(options):
    with pytest.raises(ValueError, match=r"blocks\.0\.conv is inside"):
        recompute_blocks(ecapa(), ["blocks.*", "blocks.*.*"], **options)


# --- budget ------------------------------------------------------------------

SHAPE = [16, 4, 1000]


def peak(net, **options):
    return training_step_memory(
        lambda: copy.deepcopy(net), SHAPE, fake=False, **options
    ).peak_bytes


@once
def test_the_budget_picks_every():
    whole = peak(stack(4).float())
    peaks = []
    for budget in (whole, 0.85 * whole, 0.7 * whole):
        net = stack(4).float()
        options = fit_recompute(net, "*", budget, SHAPE)
        peaks.append(peak(net))
        assert peaks[-1] <= budget
        names = store_blocks(net)
        if options is None:
            assert names == []
        else:
            assert names == recompute_blocks(net, "*", **options)
            # One block fewer would not fit.
            store_blocks(net)
            if len(names) > 1:
                recompute_blocks(net, "*", 4 / (len(names) - 1))
            assert peak(net) > budget
    assert peaks[0] > peaks[1] > peaks[2]


@once
def test_a_budget_out_of_reach():
    net = stack(3).float()
    with pytest.raises(ValueError, match=r"100 kB.*still takes [\d.]+ MB"):
        fit_recompute(net, "*", "100 kB", SHAPE)
    assert store_blocks(net) == []
    with pytest.raises(ValueError, match="11 potatoes"):
        fit_recompute(net, "*", "11 potatoes", SHAPE)
    with pytest.raises(ValueError, match="is inside 0"):
        fit_recompute(net, ["*", "*.*"], "100 kB", SHAPE)


@once
def test_the_example_may_be_a_function():
    """For networks that need more than one tensor, or a loss."""
    net = conformer(layers=2)
    shapes = []

    def step(net):
        y = net(torch.zeros(4, 100, 20), None, pad_idx=0)
        shapes.append(y.shape)
        return y.square().mean()

    options = fit_recompute(net, LAYERS, "6MB", step)
    assert options["every"] == 2
    assert set(shapes) == {torch.Size([4, 100, 16])}
    # The network itself was neither called nor changed.
    assert all(p.grad is None for p in net.parameters())
    assert type(net.transformer.encoder.norm.norm.weight) is nn.Parameter


@once
def test_optimizer_and_precision_count():
    def chosen(**options):
        net = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Linear(100, 100),
                    nn.Tanh(),
                    nn.Linear(100, 100),
                    nn.Tanh(),
                )
                for _ in range(4)
            )
        )
        found = fit_recompute(net, "*", "4.9MB", [1000, 100], **options)
        return None if found is None else found["every"]

    plain = chosen()
    assert chosen(optimizer=torch.optim.Adam) < plain
    half = chosen(precision="bf16")
    assert half is None or half > plain


# --- yaml --------------------------------------------------------------------

YAML = """
n_mels: 20
batch_size: 16
embedding_model: !new:speechbrain.lobes.models.ECAPA_TDNN.ECAPA_TDNN
    input_size: !ref <n_mels>
    channels: [16, 16, 48]
    kernel_sizes: [5, 3, 1]
    dilations: [1, 2, 1]
    res2net_scale: 2
    lin_neurons: 8
modules:
    embedding_model: !ref <embedding_model>
opt_class: !name:torch.optim.Adam
    lr: 0.001
__recompute: !apply:sb_memeff.nnet.recompute.{call}
    module: !ref <embedding_model>
    blocks: [blocks.*, mfa, asp]
"""


def test_one_line_of_yaml():
    hparams = load_hyperpyyaml(YAML.format(call="recompute_blocks"))
    # SpeechBrain checks that a script uses every key but these.
    assert "__recompute" not in hparams
    net = hparams["modules"]["embedding_model"]
    assert net is hparams["embedding_model"]
    assert isinstance(net, ECAPA_TDNN)
    names = store_blocks(net)
    assert names == ["blocks.0", "blocks.1", "mfa", "asp"]


@once
def test_a_budget_in_yaml():
    text = YAML.format(call="fit_recompute") + (
        "    budget: 25.5 MB\n"
        "    example: [!ref <batch_size>, 300, !ref <n_mels>]\n"
        "    optimizer: !ref <opt_class>\n"
        "    precision: fp32\n"
    )
    hparams = load_hyperpyyaml(text)
    names = store_blocks(hparams["modules"]["embedding_model"])
    assert 0 < len(names) < 4


class SpeakerBrain(sb.Brain):
    def compute_forward(self, batch, stage):
        return self.modules.net(*batch)

    def compute_objectives(self, predictions, batch, stage):
        return predictions.square().mean()


def test_a_brain_trains_it_and_stock_code_loads_the_checkpoint(tmp_path):
    states = []
    for recompute in (True, False):
        net = build("ecapa_dropout")
        if recompute:
            recompute_blocks(net, ["blocks.*", "mfa", "asp"])
        folder = tmp_path / str(recompute)
        brain = SpeakerBrain(
            {"net": net},
            opt_class=functools.partial(torch.optim.Adam, lr=1e-3),
            run_opts={"device": "cpu", "precision": "bf16"},
            checkpointer=Checkpointer(folder, {"net": net}),
        )
        torch.manual_seed(0)
        data = DataLoader(TensorDataset(*batch()), batch_size=3)
        brain.fit(range(4), data, progressbar=False)
        brain.checkpointer.save_checkpoint()
        stock = build("ecapa_dropout")
        Checkpointer(folder, {"net": stock}).recover_if_possible()
        assert_same_state(stock, net)
        states.append(net)
    assert_same_state(*states)
    assert states[0].mfa.norm.norm.num_batches_tracked == 4


# --- GPU ---------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", NETWORKS)
def test_fp16_with_grad_scaler_on_cuda(name):
    found = []
    for net in pair(name):
        net = net.cuda()
        x, lengths = (t.cuda() for t in batch())
        torch.manual_seed(0)
        torch.cuda.manual_seed(0)
        # The default, 65536, overflows in the first steps of a training.
        scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
        with torch.autocast("cuda", torch.float16):
            loss = net(x, lengths).square().mean()
        scaler.scale(loss).backward()
        found.append([p.grad for p in net.parameters()])
    assert relative_error(*found) < 1e-3


# --- whatever the block does besides -----------------------------------------


def two_blocks(kind):
    torch.manual_seed(0)
    return nn.Sequential(kind(), kind()).double()


def step(net, x):
    """Output and gradients, and the next random numbers."""
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    y = net(x)
    names, parameters = zip(*net.named_parameters())
    found = torch.autograd.grad(y.square().sum(), parameters)
    after = random.random(), np.random.rand(), torch.rand(1).item()
    return y.detach(), dict(zip(names, found)), after


def assert_recomputed_like_stored(kind, x=None):
    net, twin = two_blocks(kind), two_blocks(kind)
    recompute_blocks(net, "*")
    x = torch.randn(3, 8, dtype=torch.float64) if x is None else x
    for _ in range(2):
        ours, theirs = step(net, x), step(twin, x)
        assert torch.equal(ours[0], theirs[0])
        for name, gradient in theirs[1].items():
            assert torch.equal(ours[1][name], gradient), name
        assert ours[2] == theirs[2]
    for key, value in twin.state_dict().items():
        assert torch.equal(net.state_dict()[key], value)


class Drawing(nn.Module):
    """Scales by a random number."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.setup()

    def setup(self):
        pass

    def forward(self, x):
        return torch.tanh(self.linear(x * self.draw()))


class Python(Drawing):
    def draw(self):
        return random.random() + random.gauss(0, 1)


class Numpy(Drawing):
    def draw(self):
        return np.random.rand() + np.random.randn()


class Own(Drawing):
    def setup(self):
        self.generator = torch.Generator().manual_seed(1)
        self.others = {"a": random.Random(1), "b": np.random.RandomState(1)}
        self.listed = [np.random.default_rng(1)]

    def draw(self):
        return (
            torch.rand((), generator=self.generator).item()
            + self.others["a"].random()
            + self.others["b"].rand()
            + self.listed[0].random()
        )


class LayerDrop(Drawing):
    """As BEATs and wav2vec: the layer is left out now and then."""

    def draw(self):
        return 1.0

    def forward(self, x):
        return x + 0 * x if np.random.rand() < 0.5 else super().forward(x)


class Reassigning(Drawing):
    def setup(self):
        self.register_buffer("mean", torch.ones(8))
        self.register_buffer("steps", torch.zeros(1))

    def draw(self):
        self.mean = 0.9 * self.mean + 0.1
        self.steps += 1
        self.mean = self.mean * self.steps
        return self.mean


class CountingCalls(Drawing):
    """An attribute that counts is put back for the replay."""

    def setup(self):
        self.calls = 0

    def draw(self):
        self.calls += 1
        return self.calls


@pytest.mark.parametrize(
    "kind", [Python, Numpy, Own, Reassigning, CountingCalls]
)
def test_random_numbers_and_buffers_of_any_kind(kind):
    assert_recomputed_like_stored(kind)


def test_layer_drop_with_numpy():
    net, twin = two_blocks(LayerDrop), two_blocks(LayerDrop)
    recompute_blocks(net, "*")
    x = torch.randn(3, 8, dtype=torch.float64)
    for seed in range(8):
        for module in (net, twin):
            np.random.seed(seed)
            module.zero_grad()
            module(x).square().sum().add(
                sum(p.sum() for p in module.parameters())
            ).backward()
        for p, q in zip(net.parameters(), twin.parameters()):
            assert torch.equal(p.grad, q.grad)


CALLS = []


class CountingElsewhere(Drawing):
    def draw(self):
        CALLS.append(1)
        return len(CALLS)


def test_a_block_that_counts_elsewhere_is_an_error_that_names_it():
    net = two_blocks(CountingElsewhere)
    recompute_blocks(net, "*")
    with pytest.raises(RuntimeError, match="1 cannot be computed again: its o"):
        net(torch.randn(3, 8, dtype=torch.float64)).sum().backward()
    assert all(p.grad is None for p in net.parameters())


def test_an_output_that_is_changed_afterwards_is_not_a_difference():
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    recompute_blocks(net, "*")
    x = torch.randn(3, 8)
    y = net[0](x)
    y += 1
    net[1](y).sum().backward()
    assert net[0].weight.grad is not None


def test_comparisons_never_wait_within_a_step(monkeypatch):
    waits, copies = [], []

    class Copied:
        def query(self):
            return False

        def synchronize(self):
            waits.append(1)

    def copy_to_host(tensor):
        copies.append(tensor)
        return tensor, Copied()

    pending = mismatch._Pending(copy_to_host)
    monkeypatch.setattr(mismatch, "_pending", pending)
    net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    recompute_blocks(net, "*")
    net(torch.randn(3, 8)).sum().backward()
    assert copies == waits == []
    net(torch.randn(3, 8)).sum().backward()
    # Those of the step before, of all blocks in one copy.
    assert [len(differs) for differs in copies] == [3]
    assert waits == [1]


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize(
    "norm",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        parametrizations.orthogonal,
    ],
)
def test_parametrizations(norm, order, cached):
    def build():
        torch.manual_seed(0)
        return nn.Sequential(
            *(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2))
        )

    net, twin = build(), build()
    norm(twin[0][0])
    if order == "before":
        norm(net[0][0])
    recompute_blocks(net, ["*", "*.0"])
    if order == "after":
        norm(net[0][0])
    net.load_state_dict(twin.state_dict())
    x = torch.randn(3, 8)

    def assert_same_gradients():
        for module in (net, twin):
            module.zero_grad()
            module(x).square().sum().backward()
        for p, q in zip(net.parameters(), twin.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)

    with parametrize.cached() if cached else contextlib.nullcontext():
        assert_same_gradients()
    other = copy.deepcopy(net)
    for module in (net, twin):
        parametrize.remove_parametrizations(module[0][0], "weight")
    assert_same_gradients()
    assert store_blocks(net) == ["0", "0.0", "1", "1.0"]
    assert type(net[0][0]) is nn.Linear
    # A copy is independent.
    assert store_blocks(other) == ["0", "0.0", "1", "1.0"]


def test_embeddings_that_limit_their_norm():
    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(3, 4, max_norm=0.5), nn.Linear(4, 4))

    net, twin = build(), build()
    recompute_blocks(net, "*")
    for module in (net, twin):
        module(torch.tensor([1, 2])).square().sum().backward()
    for p, q in zip(net.parameters(), twin.parameters()):
        assert torch.equal(p, q)
        assert torch.equal(p.grad, q.grad)


def test_changes_of_one_submodule_and_by_data_are_found():
    net = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)))
    recompute_blocks(net, "*")
    y = net(torch.ones(2, 4))
    net[0][1].eval()
    with pytest.raises(RuntimeError, match="mode of the forward pass"):
        y.sum().backward()
    net.train()
    y = net(torch.ones(2, 4))
    net[0][0].weight.data = net[0][0].weight.data + 1
    with pytest.raises(RuntimeError, match=r"0\.0\.weight was"):
        y.sum().backward()


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_networks(backend):
    torch._dynamo.reset()

    def build():
        torch.manual_seed(0)
        return nn.Sequential(
            *(
                nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh())
                for _ in range(2)
            )
        )

    net, twin = build(), build()
    recompute_blocks(net, "*")
    compiled = torch.compile(net, backend=backend)
    x = torch.randn(30, 8)
    for module in (compiled, twin):
        module(x).square().sum().backward()
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-4)
    for key, value in twin.state_dict().items():
        torch.testing.assert_close(net.state_dict()[key], value)
