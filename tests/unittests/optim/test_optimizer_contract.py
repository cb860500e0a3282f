"""The promises of every optimizer; a new one is a line in ``optimizers.py``.

Those about checkpoints and about layouts are in the files of that name.

Authors
 * The sb_memeff authors 2026
"""

import copy
import inspect
import pickle

import pytest
import torch
from speechbrain.nnet.schedulers import NoamScheduler
from speechbrain.utils.checkpoints import Checkpointer
from speechbrain.utils.optimizers import rm_vector_weight_decay
from torch import nn

from sb_memeff.ops.blocks_8bit import BLOCK, VALUES, Quantized8bit
from sb_memeff.ops.dispatch import SWITCH
from sb_memeff.optim import keep_32bit_states, state_bytes
from tests.unittests.optim.optimizers import (
    assert_same_weights,
    distance,
    each_class,
    each_setting,
    loss,
    moved_by_rounding,
    network,
    through_a_file,
    train,
    trained,
)

each_fused = pytest.mark.parametrize("fused", [None, True])


@each_setting
def test_trajectory_of_a_network(kind):
    start, net, other = network(), network(), network()
    optimizer = kind.make(net.parameters())
    theirs = kind.make_torchs(other.parameters())
    found, expected = train(net, optimizer, 40), train(other, theirs, 40)
    assert expected[-1] < 0.5 * expected[0]
    assert distance(net, other, start) < 0.02
    assert found[-1] == pytest.approx(expected[-1], rel=0.05, abs=2e-3)
    assert state_bytes(optimizer) < 0.3 * state_bytes(theirs)
    assert optimizer.state_bytes() == state_bytes(optimizer)


@each_setting
def test_rounding_errors_do_not_add_up(kind):
    """Without further gradients it ends where torch's does."""
    generator = torch.Generator().manual_seed(0)
    gradients = 0.1 + torch.randn(200, 4096, generator=generator)
    if "betas" in inspect.signature(kind.torchs).parameters:
        # All squares are equal: no second moment is rounded.
        gradients = gradients.sign()
    else:
        # Of other orders of magnitude than the largest of their block.
        gradients *= (2 * torch.randn(4096, generator=generator)).exp()
    ends = []
    for make in (kind.make, kind.make_torchs):
        weight = nn.Parameter(torch.zeros(4096))
        optimizer = make([weight], weight_decay=0)
        for gradient in (*gradients, *torch.zeros(100, 4096)):
            weight.grad = gradient.clone()
            optimizer.step()
        ends.append(weight.detach())
    ours, theirs = ends
    error = (ours - theirs).norm() / theirs.norm()
    # Adam's correction of the bias changes in further steps.
    assert error < (2e-6 if "momentum" in kind.options else 1.2e-3)


@each_class
def test_trajectory_of_a_convex_task(kind):
    """Least squares: the same way down, the same end."""
    torch.manual_seed(0)
    data = torch.randn(256, 64)
    # As near as the learning rate can go in some hundreds of steps.
    target = data @ (0.06 * torch.randn(64, 64))

    def descend(make):
        weight = nn.Parameter(torch.zeros(64, 64))
        optimizer = make([weight], weight_decay=0)
        losses = []
        for _ in range(300):
            optimizer.zero_grad()
            value = (data @ weight - target).square().sum(1).mean()
            value.backward()
            optimizer.step()
            losses.append(value.item())
        return torch.tensor(losses)

    ours, theirs = descend(kind.make), descend(kind.make_torchs)
    assert theirs[-1] < 1e-3 * theirs[0]
    assert ours[-1] < 2e-3 * ours[0]
    assert ((ours - theirs).abs() < 0.02 * theirs[0]).all()


@each_setting
def test_one_step_is_torchs(kind):
    """From the same states: the same weights; states rounded, no more.

    What rounding takes from the first moment moves the weights at once.
    """
    net = network()
    optimizer = kind.make(net.parameters())
    train(net, optimizer, 5)
    other = copy.deepcopy(net)
    theirs = kind.make_torchs(other.parameters())
    theirs.load_state_dict(through_a_file(optimizer.state_dict()))
    train(net, optimizer, 1)
    train(other, theirs, 1)
    for p, q in zip(net.parameters(), other.parameters()):
        if p.numel() < 4096:
            assert torch.equal(p, q)
        expected = moved_by_rounding(optimizer, p, theirs, q)
        torch.testing.assert_close(p.double(), expected, rtol=1e-5, atol=1e-6)
        packed = optimizer.state[p]
        for name, exact in theirs.state[q].items():
            if name not in optimizer.signed:
                continue
            if p.numel() < 4096:
                assert torch.equal(packed[name], exact)
                continue
            assert isinstance(packed[name], Quantized8bit)
            check_bound(
                packed[name],
                exact,
                optimizer.signed[name],
                name in optimizer.dithered,
            )


def check_bound(packed, exact, signed, dithered):
    """Each value within half a gap of the codes (a whole one next to 0).

    Those that are dithered are within a gap.
    """
    values = torch.tensor(VALUES[signed])
    scale = packed.scales.repeat_interleave(BLOCK)[: exact.numel()]
    scaled = exact.flatten() / scale
    stored = values[packed.codes.flatten().long()]
    above = torch.searchsorted(values, scaled).clamp(1, 255)
    bound = (values[above] - values[above - 1]) / 2
    if dithered:
        bound *= 2
    elif not signed:
        bound[above == 1] *= 2
    assert ((stored - scaled).abs() <= 1.0001 * bound + 1e-7).all()


@each_setting
def test_with_32bit_states_it_is_torchs_class(kind):
    net, other = network(), network()
    train(net, kind.make(net.parameters(), min_8bit_size=1 << 30), 5)
    train(other, kind.make_torchs(other.parameters()), 5)
    assert_same_weights(net, other)


@each_setting
def test_state_dict_resumes_exactly(kind):
    net = network()
    optimizer = kind.make(net.parameters())
    train(net, optimizer, 5)
    other = copy.deepcopy(net)
    resumed = kind.make(other.parameters())
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    assert state_bytes(resumed) == state_bytes(optimizer)
    for p, q in zip(net.parameters(), other.parameters()):
        for name in optimizer.signed:
            a, b = optimizer.state[p].get(name), resumed.state[q].get(name)
            assert type(a) is type(b)
            if isinstance(a, Quantized8bit):
                assert torch.equal(a.codes, b.codes)
                assert torch.equal(a.scales, b.scales)
    train(net, optimizer, 5, first=5)
    train(other, resumed, 5, first=5)
    assert_same_weights(net, other)


@each_setting
def test_from_and_to_the_32bit_class(kind):
    """torch's checkpoints load, and ours in torch's class."""
    net = network()
    theirs = kind.make_torchs(net.parameters())
    train(net, theirs, 5)
    packed = kind.make(copy.deepcopy(net).parameters())
    packed.load_state_dict(through_a_file(theirs.state_dict()))
    assert state_bytes(packed) < 0.3 * state_bytes(theirs)
    back = kind.make_torchs(copy.deepcopy(net).parameters())
    back.load_state_dict(through_a_file(packed.state_dict()))
    for p, q in zip(net.parameters(), back.param_groups[0]["params"]):
        names = set(packed.signed) & set(theirs.state[p])
        assert names
        for name in names:
            exact = theirs.state[p][name]
            error = (back.state[q][name] - exact).abs().max()
            assert error <= 0.008 * exact.abs().max()


@each_class
def test_checkpointer_and_scheduler(kind, tmp_path):
    """SpeechBrain's Checkpointer and a schedule, as Brain uses them."""

    def build():
        net = network()
        optimizer = kind.make(net.parameters())
        schedule = NoamScheduler(0.01, 10)
        checkpointer = Checkpointer(
            tmp_path, {"net": net, "optimizer": optimizer, "lr": schedule}
        )
        return net, optimizer, schedule, checkpointer

    def go(net, optimizer, schedule, steps, first):
        for step in range(first, first + steps):
            schedule(optimizer)
            train(net, optimizer, 1, step)

    net, optimizer, schedule, checkpointer = build()
    go(net, optimizer, schedule, 7, 0)
    checkpointer.save_checkpoint()
    go(net, optimizer, schedule, 7, 7)
    other, *rest, checkpointer = build()
    checkpointer.recover_if_possible()
    go(other, *rest, 7, 7)
    assert_same_weights(net, other)


@each_class
def test_copies_and_pickles_go_on(kind):
    net, optimizer = trained(kind.ours)
    pair = copy.deepcopy((net, optimizer))
    loaded = pickle.loads(pickle.dumps((net, optimizer)))
    for other, copied in (pair, loaded):
        train(other, copied, 3)
    train(net, optimizer, 3)
    for others in (pair[0], loaded[0]):
        assert_same_weights(net, others)


@each_class
def test_closure_and_hooks(kind):
    net = network()
    optimizer = kind.make(net.parameters())
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))

    def closure():
        optimizer.zero_grad()
        value = loss(net)
        value.backward()
        return value

    assert optimizer.step(closure).item() > optimizer.step(closure).item()
    assert calls == [1, 1]


@each_class
def test_step_hooks(kind):
    """They may change the arguments and see the updated parameters."""
    net, optimizer = trained(kind.ours)
    closures, seen = [lambda: 1.0, lambda: 2.0], []
    optimizer.register_step_pre_hook(lambda o, *_: ((o, closures[1]), {}))
    optimizer.register_step_post_hook(
        lambda o, args, kwargs: seen.append((o, args[1], net[0].weight.clone()))
    )
    before = net[0].weight.clone()
    assert optimizer.step(closures[0]) == 2.0
    ((o, closure, weight),) = seen
    assert o is optimizer and closure is closures[1]
    assert torch.equal(weight, net[0].weight)
    assert not torch.equal(weight, before)


@each_class
def test_parameters_without_gradient_are_left_alone(kind):
    net, optimizer = trained(kind.ours)
    saved = optimizer.state_dict()
    optimizer.zero_grad()
    net[5].weight.grad = torch.ones_like(net[5].weight)
    before = [p.clone() for p in net.parameters()]
    optimizer.step()
    changed = [not torch.equal(a, b) for a, b in zip(before, net.parameters())]
    assert changed == [p is net[5].weight for p in net.parameters()]
    now = optimizer.state_dict()["state"]
    moved = [
        number
        for number, state in saved["state"].items()
        if any(
            not torch.equal(now[number][name], x) for name, x in state.items()
        )
    ]
    assert moved == [changed.index(True)]


@each_fused
@each_class
def test_in_a_gradscaler_steps_are_skipped(kind, fused):
    """torch.GradScaler on the CPU, with a gradient that is not finite."""
    weight, counted = (nn.Parameter(torch.zeros(64, 64)) for _ in range(2))
    optimizer, expected = (
        kind.make([p], fused=fused) for p in (weight, counted)
    )
    scaler = torch.GradScaler("cpu", init_scale=4.0)
    for bad in (False, True, False):
        optimizer.zero_grad()
        value = weight.sum() * (torch.inf if bad else 1)
        scaler.scale(value).backward()
        before = weight.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(before, weight) == bad
    # Nor do states count the step that was skipped.
    for _ in range(2):
        counted.grad = torch.ones_like(counted)
        expected.step()
    assert torch.equal(weight, counted)


@each_class
def test_groups_without_weight_decay(kind):
    """SpeechBrain's remove_vector_weight_decay."""
    options = {"weight_decay": 0.1}
    start, net, other = network(), network(), network()
    optimizer = kind.make(rm_vector_weight_decay(net), **options)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.0, 0.1]
    assert all(g["min_8bit_size"] == 4096 for g in optimizer.param_groups)
    train(net, optimizer, 20)
    theirs = kind.make_torchs(rm_vector_weight_decay(other), **options)
    train(other, theirs, 20)
    assert distance(net, other, start) < 0.05


@each_class
def test_min_8bit_size_of_a_group(kind):
    weights = [nn.Parameter(torch.ones(40)) for _ in range(3)]
    sizes = ({"min_8bit_size": 41}, {"min_8bit_size": 40}, {})
    optimizer = kind.make(
        ({"params": [w], **size} for w, size in zip(weights, sizes)),
        min_8bit_size=10,
    )
    for w in weights:
        w.grad = torch.ones(40)
    optimizer.step()
    assert [is_packed(optimizer, w) for w in weights] == [False, True, True]


def is_packed(optimizer, p):
    """Whether the states of a parameter, other than its step, are in 8 bits."""
    (packed,) = {
        isinstance(optimizer.state[p][name], Quantized8bit)
        for name in set(optimizer.signed) & set(optimizer.state[p])
    }
    return packed


@each_class
def test_small_tensors_and_embeddings_keep_32_bits(kind):
    net = nn.ModuleDict(
        {
            "embedding": nn.Embedding(100, 64),
            "bag": nn.EmbeddingBag(100, 64),
            "large": nn.Linear(64, 64, bias=False),
            "small": nn.Linear(63, 65, bias=False),
        }
    )
    keep_32bit_states(dict(net))
    optimizer = kind.make(net.parameters())
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    packed = {
        name: is_packed(optimizer, module.weight)
        for name, module in net.items()
    }
    assert packed == {
        "embedding": False,
        "bag": False,
        "large": True,
        "small": False,
    }
    # What a checkpoint says about it does not count.
    resumed = kind.make(net.parameters())
    del net["embedding"].weight.optim_bits
    resumed.load_state_dict(optimizer.state_dict())
    assert is_packed(resumed, net["embedding"].weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@each_class
def test_other_precisions(kind, dtype):
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(64, 64, dtype=dtype))
    exact = nn.Parameter(weight.detach().double())
    optimizer, theirs = kind.make([weight]), kind.make_torchs([exact])
    for _ in range(10):
        weight.grad = torch.randn(64, 64, dtype=dtype)
        exact.grad = weight.grad.double()
        optimizer.step()
        theirs.step()
    assert weight.dtype == dtype
    # Theirs are float64.
    assert optimizer.state_bytes() < 0.26 * state_bytes(theirs) / 2 + 8
    tolerance = 0.02 if dtype == torch.bfloat16 else 0.005
    expected = moved_by_rounding(optimizer, weight, theirs, exact)
    torch.testing.assert_close(
        weight.double(), expected, atol=tolerance, rtol=0.02
    )
    kind.make([weight]).load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@each_class
def test_small_updates_of_a_state_in_half_precision_are_not_lost(kind, dtype):
    """States of 32 bits are float32 whatever the parameter is."""
    weight = nn.Parameter(torch.zeros(8, dtype=dtype))
    exact = nn.Parameter(torch.zeros(8, dtype=torch.float64))
    # A rounded weight would come back by its decay.
    options = {"lr": 1e-4, "weight_decay": 0}
    optimizer = kind.make([weight], **options)
    theirs = kind.make_torchs([exact], **options)
    for step in range(50):
        for p in (weight, exact):
            p.grad = torch.full_like(p, 1.0 if step == 0 else 2**-10)
        optimizer.step()
        theirs.step()
    names = set(optimizer.signed) & set(theirs.state[exact])
    assert names
    for name in names:
        value = optimizer.state[weight][name]
        assert value.dtype == torch.float32
        expected = theirs.state[exact][name].float()
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(8, 16), (64, 80)], ids=["32bit", "8bit"])
@each_fused
@each_class
def test_precision_that_changes_between_two_steps(kind, fused, shape):
    """module.double() and back, with states of float32."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(shape))
    optimizer = kind.make([weight], fused=fused)
    for dtype in (torch.float32, torch.float64, torch.float32):
        weight.data, weight.grad = weight.data.to(dtype), None
        exact = nn.Parameter(weight.detach().double())
        theirs = kind.make_torchs([exact])
        theirs.load_state_dict(optimizer.state_dict())
        weight.grad = torch.randn(shape, dtype=dtype)
        exact.grad = weight.grad.double()
        optimizer.step()
        theirs.step()
        assert weight.dtype == dtype
        expected = moved_by_rounding(optimizer, weight, theirs, exact)
        # The residual is float32.
        eps = 8 * torch.finfo(torch.float32 if shape == (64, 80) else dtype).eps
        torch.testing.assert_close(
            weight.double(), expected, rtol=eps, atol=eps
        )


@each_class
def test_parameter_without_values(kind):
    weight = nn.Parameter(torch.zeros(0, 4))
    weight.grad = torch.zeros(0, 4)
    optimizer = kind.make([weight], min_8bit_size=0)
    for _ in range(2):
        optimizer.step()
    kind.make([weight], min_8bit_size=0).load_state_dict(optimizer.state_dict())


@each_class
def test_settings_that_are_refused(kind):
    weight = nn.Parameter(torch.zeros(2, 2))
    for name in ("capturable", "differentiable"):
        if name in inspect.signature(kind.torchs).parameters:
            with pytest.raises(ValueError, match=f"{name}=True"):
                kind.make([weight], **{name: True})
    for make in (kind.make, kind.make_torchs):
        for name in ("lr", "weight_decay"):
            with pytest.raises(ValueError, match="-1.0"):
                make([weight], **{name: -1.0})
    # The settings that bitsandbytes' classes take and drop.
    with pytest.raises(TypeError, match="percentile_clipping"):
        kind.make([weight], percentile_clipping=5)


@pytest.mark.parametrize("size", [4096.0, "4096", -1, True, None])
@each_class
def test_sizes_that_are_refused(kind, size):
    """Of all groups and of one."""
    weight, other = (nn.Parameter(torch.zeros(2, 2)) for _ in range(2))
    optimizer = kind.make([weight])
    group = {"params": [other], "min_8bit_size": size}
    for make in (
        lambda: kind.make([weight], min_8bit_size=size),
        lambda: kind.make([group]),
        lambda: optimizer.add_param_group(group),
    ):
        with pytest.raises(ValueError, match=f"min_8bit_size.*{size!r}"):
            make()
    assert len(optimizer.param_groups) == 1


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group")
@pytest.mark.parametrize("size", [10, 1 << 30], ids=["8bit", "32bit"])
@pytest.mark.parametrize("kernels", ["0", "1"])
@each_class
def test_a_parameter_that_is_listed_twice_is_updated_twice(
    monkeypatch, kind, kernels, size
):
    monkeypatch.setenv(SWITCH, kernels)
    weight = nn.Parameter(torch.zeros(3, 100))
    optimizer = kind.make([weight, weight], min_8bit_size=size)
    # Moments are equal, so that rounding takes nothing from them.
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    other = copy.deepcopy(weight)
    theirs = kind.make_torchs([other, other])
    theirs.load_state_dict(optimizer.state_dict())
    other.grad = weight.grad
    for _ in range(3):
        optimizer.step()
        theirs.step()
    torch.testing.assert_close(weight, other, rtol=1e-5, atol=1e-6)
    (state,) = optimizer.state_dict()["state"].values()
    for name in optimizer._names(optimizer.param_groups[0]):
        expected = theirs.state[other][name]
        torch.testing.assert_close(state[name], expected, rtol=1e-5, atol=0)


@each_class
def test_gradients_that_are_refused(kind):
    embedding = nn.Embedding(10, 4, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse=False"):
        kind.make(embedding.parameters()).step()
    # Nothing has changed then, what comes before it neither.
    weight = nn.Parameter(torch.zeros(2, 2))
    weight.grad = torch.ones(2, 2)
    groups = [{"params": [weight]}, {"params": embedding.parameters()}]
    with pytest.raises(RuntimeError, match="sparse=False"):
        kind.make(groups).step()
    assert not weight.any()


@each_class
def test_parameters_that_are_refused(kind):
    with pytest.raises(TypeError, match="complex64"):
        kind.make([nn.Parameter(torch.zeros(2, dtype=torch.complex64))])
    weight = nn.Parameter(torch.zeros(80, 1).expand(80, 80))
    with pytest.raises(ValueError, match=r"\(80, 80\).*\(1, 0\).*clone"):
        kind.make([weight])
    kind.make([nn.Parameter(torch.zeros(1).expand(1, 1))])


@each_class
def test_a_group_that_is_refused_is_not_there(kind):
    """The good part of it can be added afterwards."""
    optimizer = kind.make([nn.Parameter(torch.zeros(2))])
    good = nn.Parameter(torch.zeros(2))
    refused = {
        TypeError: nn.Parameter(torch.zeros(2, dtype=torch.complex64)),
        ValueError: nn.Parameter(torch.zeros(8, 1).expand(8, 8)),
    }
    for error, bad in refused.items():
        with pytest.raises(error):
            optimizer.add_param_group({"params": [good, bad]})
        assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [good]})
    alone = nn.Parameter(torch.zeros(2))
    good.grad, alone.grad = torch.ones(2, 2)
    optimizer.step()
    kind.make_torchs([alone]).step()
    assert torch.equal(good, alone) and good.any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@each_class
def test_cuda_is_like_the_cpu(kind):
    """With weight decay too, where bitsandbytes' classes differ."""
    nets = [network().to(device) for device in ("cpu", "cuda")]
    optimizers = [kind.make(n.parameters(), weight_decay=0.01) for n in nets]
    for step in range(20):
        optimizers[0].zero_grad()
        loss(nets[0], step).backward()
        # The same gradients for both, so that nothing else can differ.
        for p, q in zip(*(n.parameters() for n in nets)):
            q.grad = p.grad.cuda()
        for optimizer in optimizers:
            optimizer.step()
    assert distance(nets[1].cpu(), nets[0], network()) < 1e-2
