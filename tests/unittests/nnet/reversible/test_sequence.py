"""The contract of the reversible engine, point by point."""

import copy
import gc
import math
import random
import re
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from sb_memeff.memory.step import training_step_memory
from sb_memeff.nnet.replay import mismatch
from sb_memeff.nnet.reversible import (
    AdditiveCoupling,
    ReversibleSequence,
    SpaceToDepth,
    Tap,
    check_invertible,
    guards,
    inversion_errors,
)
from sb_memeff.nnet.reversible.nodes import ChainState
from sb_memeff.nnet.reversible.observer import Observer
from sb_memeff.nnet.reversible.tap_sum import DetachedTapSum
from tests.unittests.nnet.reversible.chains import (
    assert_same_state,
    body,
    chain,
    gradients,
    relative_error,
    saved_bytes,
    stored,
)


def images(dims=2, channels=8, batch=3, dtype=torch.float32):
    torch.manual_seed(0)
    return torch.randn(batch, channels, *(7, 6)[:dims], dtype=dtype)


class Strided(nn.Module):
    """A block that cannot be inverted, on two streams."""

    takes_streams = True

    def __init__(self, channels):
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(channels, channels, 3, stride=2, padding=1)
            for _ in range(2)
        )
        self.norm = nn.BatchNorm2d(channels)
        self.dropout = nn.Dropout(0.2)

    def forward(self, streams):
        x1, x2 = streams
        y1 = self.convs[0](x1)
        return y1, self.dropout(self.norm(self.convs[1](x2))) + y1


class Head(nn.Module):
    """A block that cannot be inverted, from a tensor to a tensor."""

    def __init__(self, channels):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.linear = nn.Linear(channels, 5)

    def forward(self, x):
        return self.linear(self.norm(x).relu().mean(dim=(2, 3)))


def mixed_chain(**options):
    """Stem, couplings, space-to-depth, strided transition, head."""
    torch.manual_seed(5)

    def coupling(channels):
        return AdditiveCoupling(body(channels), body(channels))

    def sums(channels):
        f, g = (nn.ModuleList(body(channels) for _ in range(3)) for _ in "fg")
        return AdditiveCoupling(f, g)

    return ReversibleSequence(
        [
            nn.Conv2d(3, 8, 3, padding=1),
            coupling(4),
            coupling(4),
            SpaceToDepth(2),
            sums(16),
            Strided(16),
            coupling(16),
            Head(32),
        ],
        **options,
    )


# --- gradients ---------------------------------------------------------------


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("depth", [1, 4, 16, 50])
def test_float64_gradients_equal_autograd(depth, dims):
    net = chain(depth, dims=dims).double()
    x = images(dims, dtype=torch.float64)
    y, ours, state = gradients(net, x)
    y_ref, reference, state_ref = gradients(stored(net), x)
    assert torch.equal(y, y_ref)
    assert relative_error(ours, reference) < 1e-9
    assert torch.equal(state, state_ref)


def test_float64_gradients_with_other_blocks_in_the_chain():
    net = mixed_chain().double()
    x = images(channels=3, dtype=torch.float64)
    twin = stored(net)
    _, ours, _ = gradients(net, x)
    _, reference, _ = gradients(twin, x)
    assert relative_error(ours, reference) < 1e-9
    assert_same_state(net, twin)


def test_input_and_output_of_the_caller_stay_untouched():
    for batch in (1, 3):  # one utterance: its halves are contiguous views
        net = chain(3)
        x = images(batch=batch).requires_grad_()
        before = x.detach().clone()
        y = net(x)
        after = y.detach().clone()
        y.square().sum().backward()
        assert torch.equal(x, before)
        assert torch.equal(y, after)


def test_input_that_needs_no_gradient_still_gives_the_weights_theirs():
    net = chain(3, dropout=0.0)
    x = images()
    net(x).square().sum().backward()
    twin = stored(net)
    twin.zero_grad()
    twin(x).square().sum().backward()
    ours = [p.grad for p in net.parameters()]
    assert relative_error(ours, [p.grad for p in twin.parameters()]) < 1e-5


def test_frozen_weights_get_no_gradient_and_the_others_theirs():
    net = chain(4).double()
    for parameter in net.blocks[1].parameters():
        parameter.requires_grad_(False)
    net.blocks[2].g[0].bias.requires_grad_(False)
    x = images(dtype=torch.float64)
    _, ours, _ = gradients(net, x)
    _, reference, _ = gradients(stored(net), x)
    assert [g is None for g in ours] == [g is None for g in reference]
    assert relative_error(ours, reference) < 1e-9


def test_nothing_needs_a_gradient():
    net = chain(2).requires_grad_(False)
    assert not net(images()).requires_grad


def test_autograd_grad_on_chosen_inputs():
    net = chain(2, dropout=0.0).double()
    x = images(dtype=torch.float64)
    weight = net.blocks[0].f[0].weight
    (ours,) = torch.autograd.grad(net(x).square().sum(), [weight])
    twin = stored(net)
    (reference,) = torch.autograd.grad(
        twin(x).square().sum(), [twin.blocks[0].f[0].weight]
    )
    assert relative_error([ours], [reference]) < 1e-9
    assert all(p.grad is None for p in net.parameters())


def test_weights_shared_between_blocks_add_up():
    f, g = body(4), body(4)
    net = ReversibleSequence(
        [AdditiveCoupling(f, g), AdditiveCoupling(g, f)]
    ).double()
    x = images(dtype=torch.float64)
    _, ours, _ = gradients(net, x)
    _, reference, _ = gradients(stored(net), x)
    assert relative_error(ours, reference) < 1e-9


class Inside(nn.Module):
    """A module that holds a reversible sequence."""

    def __init__(self):
        super().__init__()
        self.net = chain(2)

    def forward(self, x):
        return self.net(x).relu()


@pytest.mark.parametrize("coupled", [True, False])
def test_a_sequence_inside_a_sequence(coupled):
    block = Inside()
    if coupled:
        block = AdditiveCoupling(Inside(), Inside())
    net = ReversibleSequence([block, block]).double()
    x = images(channels=16 if coupled else 8, dtype=torch.float64)
    twin = stored(net)
    _, ours, _ = gradients(net, x)
    _, reference, _ = gradients(twin, x)
    assert [g is None for g in ours] == [g is None for g in reference]
    assert relative_error(ours, reference) < 1e-9
    assert_same_state(net, twin)


def test_hooks_on_weights_run_once():
    net = chain(2)
    calls = []
    weight = net.blocks[0].g[0].weight
    weight.register_hook(lambda grad: calls.append(1) or 2 * grad)
    _, ours, _ = gradients(net, images())
    assert calls == [1]
    net = chain(2)
    _, plain, _ = gradients(net, images())
    index = [n for n, _ in net.named_parameters()].index("blocks.0.g.0.weight")
    assert torch.equal(ours[1 + index], 2 * plain[1 + index])


def test_gradient_accumulation():
    net = chain(3).double()
    twin = stored(net)
    for seed in (1, 2, 3):
        x = images(dtype=torch.float64) * seed
        _, ours, _ = gradients(net, x, seed=seed)
        _, reference, _ = gradients(twin, x, seed=seed)
    assert relative_error(ours, reference) < 1e-9


def test_two_forwards_before_one_backward():
    net = chain(3, dropout=0.5).double()
    twin = stored(net)
    found = []
    for module in (net, twin):
        torch.manual_seed(3)
        x = images(dtype=torch.float64).requires_grad_()
        first, second = module(x), module(2 * x)
        (first * second).sum().backward()
        found.append([x.grad, *(p.grad for p in module.parameters())])
    assert relative_error(*found) < 1e-9
    assert_same_state(net, twin)


@pytest.mark.parametrize("build", [lambda: chain(3), mixed_chain])
def test_backward_twice_with_retain_graph(build):
    net = build().double()
    channels = 3 if build is mixed_chain else 8
    x = images(channels=channels, dtype=torch.float64)
    loss = net(x).square().sum()
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in net.parameters()]
    loss.backward()
    twice = [p.grad for p in net.parameters()]
    assert relative_error(twice, [2 * g for g in once]) < 1e-12
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


class Scale(nn.Module):
    """Uses what the sequence is called with."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, 4, 1, 1))

    def forward(self, x, lengths, *, gain=None):
        y = torch.tanh(x * self.weight) * lengths.view(-1, 1, 1, 1)
        return y if gain is None else y * gain["tensor"]


def test_extra_arguments_reach_f_and_g_and_get_gradients():
    net = ReversibleSequence(
        [AdditiveCoupling(Scale(), Scale()) for _ in range(3)]
    ).double()
    x = images(dtype=torch.float64)
    found = []
    for module in (net, stored(net)):
        lengths = torch.tensor([1.0, 0.5, 0.2], dtype=torch.float64)
        gain = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
        _, grads, _ = gradients(module, x, lengths, gain={"tensor": gain})
        found.append([*grads, gain.grad])
    assert relative_error(*found) < 1e-9
    # ... and they matter.
    _, others, _ = gradients(stored(net), x, torch.ones(3, dtype=torch.float64))
    assert relative_error(others, found[0][:-1]) > 1e-2


class Mixed(nn.Module):
    """Uses the tensors among arguments of all kinds."""

    def forward(self, x, *arguments):
        for argument in arguments:
            if isinstance(argument, torch.Tensor):
                x = x * argument
        return x.sin()


@pytest.mark.parametrize("wanted", [(True, True), (False, True), (True, False)])
@pytest.mark.parametrize(
    "between", [(None,), (2, "text"), (None, 0.5, None)], ids=str
)
def test_tensors_among_other_arguments_get_their_gradients(between, wanted):
    net = ReversibleSequence(
        [AdditiveCoupling(Mixed(), Mixed()) for _ in range(2)]
    ).double()
    x = images(dtype=torch.float64)
    found = []
    for module in (net, stored(net)):
        gains = [
            torch.tensor(value, dtype=torch.float64, requires_grad=needed)
            for value, needed in zip((0.7, 1.3), wanted)
        ]
        arguments = (*between, gains[0], *between, gains[1])
        _, grads, _ = gradients(module, x, *arguments)
        found.append([*grads, *(g.grad for g in gains if g.requires_grad)])
    assert relative_error(*found) < 1e-9


class Sum(nn.Module):
    """Both streams get the same tensor for a gradient."""

    takes_streams = True

    def forward(self, streams):
        return streams[0] + streams[1]


@pytest.mark.parametrize("head", [Sum(), nn.Identity(), nn.Flatten()])
def test_gradients_that_share_memory(head):
    net = ReversibleSequence([*chain(2).blocks, head]).double()
    x = images(dtype=torch.float64)
    _, reference, _ = gradients(stored(net), x)
    _, ours, _ = gradients(net, x)
    assert relative_error(ours, reference) < 1e-9
    # ... and that of the caller is not overwritten.
    y = net(x)
    dy = torch.ones_like(y)
    y.backward(dy)
    assert torch.equal(dy, torch.ones_like(y))


# --- taps --------------------------------------------------------------------


def read(channels):
    """A tap that draws random numbers and counts batches."""
    conv = nn.Conv2d(channels, 5, 3, padding=1)
    return Tap(nn.Sequential(conv, nn.BatchNorm2d(5), nn.Dropout(0.2)))


def coupling():
    return AdditiveCoupling(body(4), body(4))


TAPPED = {
    "couplings": lambda: [coupling(), read(8), coupling(), read(8)],
    "first": lambda: [read(8), coupling(), coupling()],
    "tensors": lambda: [
        nn.Conv2d(8, 6, 1),
        read(6),
        nn.BatchNorm2d(6),
        read(6),
    ],
    "both": lambda: [
        nn.Conv2d(8, 8, 1),
        read(8),
        coupling(),
        read(8),
        Strided(4),
        SpaceToDepth(1),
        nn.Upsample(size=(7, 6)),
        read(8),
        nn.BatchNorm2d(8),
    ],
}


class Tapped(nn.Module):
    """A sequence with taps, of which some outputs are used."""

    def __init__(self, kind, used):
        super().__init__()
        torch.manual_seed(3)
        self.net = ReversibleSequence(TAPPED[kind]())
        self.used = used

    def forward(self, x):
        y, total = self.net(x)
        kept = {"output": y, "total": total}
        return torch.cat([kept[u].sigmoid().flatten(1) for u in self.used], 1)


@pytest.mark.parametrize("used", [["output"], ["total"], ["output", "total"]])
@pytest.mark.parametrize("kind", TAPPED)
def test_float64_gradients_with_taps(kind, used):
    net = Tapped(kind, used).double()
    twin = stored(net)
    x = images(dtype=torch.float64)
    y, ours, state = gradients(net, x)
    y_ref, reference, state_ref = gradients(twin, x)
    assert torch.equal(y, y_ref)
    assert torch.equal(state, state_ref)
    assert_same_state(net, twin)
    # What the loss does not see may have a gradient of zero or none.
    inputs = [x, *net.parameters()]
    ours, reference = (
        [torch.zeros_like(p) if g is None else g for g, p in zip(found, inputs)]
        for found in (ours, reference)
    )
    assert relative_error(ours, reference) < 1e-9


def test_total_is_the_convolution_over_the_concatenation():
    torch.manual_seed(0)
    convs = [nn.Conv2d(8, 5, 1, bias=False) for _ in range(3)]
    blocks = [coupling() for _ in range(3)]
    net = ReversibleSequence(
        [m for b, c in zip(blocks, convs) for m in (b, Tap(c))]
    )
    net.double().eval()
    x = images(dtype=torch.float64)
    states = [
        ReversibleSequence(blocks[: n + 1]).eval()(x).detach() for n in range(3)
    ]
    weight = torch.cat([c.weight for c in convs], dim=1)
    expected = nn.functional.conv2d(torch.cat(states, dim=1), weight)
    torch.testing.assert_close(net(x)[1], expected)


def test_taps_under_bf16_autocast():
    net = Tapped("both", ["output", "total"])
    y, ours, _ = gradients(net, images(), autocast=torch.bfloat16)
    y_ref, reference, _ = gradients(
        stored(net), images(), autocast=torch.bfloat16
    )
    assert torch.equal(y, y_ref)
    assert relative_error(ours, reference) < 1e-6
    # As a convolution over the concatenation: summed in float32, then rounded.
    ones = ReversibleSequence(
        [Tap(nn.Conv2d(8, 1, 1, bias=False)) for _ in range(300)]
    )
    for parameter in ones.parameters():
        nn.init.ones_(parameter)
    with torch.autocast("cpu", torch.bfloat16):
        total = ones(torch.ones(1, 8, 1, 1))[1]
    assert total.dtype == torch.bfloat16 and total.item() == 2400


def test_taps_in_pure_bfloat16():
    net = Tapped("couplings", ["output", "total"]).bfloat16()
    y, total = net.net(images().bfloat16())
    assert y.dtype == total.dtype == torch.bfloat16


@pytest.mark.parametrize("save_memory", [True, False])
@pytest.mark.parametrize("place", [0, 1])
def test_taps_that_take_streams_get_them_in_the_dtype_of_the_network(
    place, save_memory
):
    """At the head of a chain, where they are cut, and behind a coupling."""

    class Both(nn.Module):
        takes_streams = True

        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 5, 1)

        def forward(self, streams):
            first, second = streams
            return self.conv(first) - self.conv(second)

    blocks = [coupling(), coupling()]
    blocks.insert(place, Tap(Both()))
    net = ReversibleSequence(blocks, save_memory=save_memory).bfloat16()
    _, total = net(images().bfloat16())
    total.square().sum().backward()
    assert total.dtype == torch.bfloat16
    assert blocks[place].read.conv.weight.grad.any()


def test_taps_backward_twice_with_retain_graph():
    net = Tapped("both", ["output", "total"]).double()
    loss = net(images(dtype=torch.float64)).sum()
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in net.parameters()]
    loss.backward()
    twice = [p.grad for p in net.parameters()]
    assert relative_error(twice, [2 * g for g in once]) < 1e-12


@pytest.mark.parametrize("kind", ["couplings", "first", "both"])
def test_outputs_of_a_tapped_chain_may_be_differentiated_one_by_one(kind):
    """The total's gradient of one backward pass is not left to the next."""
    net = Tapped(kind, []).double().eval()
    x = images(dtype=torch.float64).requires_grad_()
    found = []
    for module in (net, stored(net)):
        y, total = module.net(x)
        wanted = [x, *module.parameters()]
        gradients_of = {}
        for name, loss in (
            ("total", total.square().sum()),
            ("output", y.square().sum()),
            ("again", total.square().sum()),
        ):
            gradients_of[name] = torch.autograd.grad(
                loss, wanted, retain_graph=True, allow_unused=True
            )
        found.append(gradients_of)
    for name, reference in found[1].items():
        ours = found[0][name]
        ours, reference = (
            [
                torch.zeros_like(p) if g is None else g
                for g, p in zip(gs, wanted)
            ]
            for gs in (ours, reference)
        )
        assert relative_error(ours, reference) < 1e-9, name


@pytest.mark.parametrize("kind", ["couplings", "first", "both"])
def test_after_gradients_of_the_last_tap_alone(kind):
    """Such a backward pass ends before it comes to the first tap."""
    net = Tapped(kind, []).double().eval()
    x = images(dtype=torch.float64).requires_grad_()
    found = []
    for module in (net, stored(net)):
        y, total = module.net(x)
        parameters = list(module.parameters())
        taps = [b for b in module.net.blocks if isinstance(b, Tap)]
        last = list(taps[-1].parameters())
        torch.autograd.grad(total.square().sum(), last, retain_graph=True)
        found.append(
            torch.autograd.grad(
                y.square().sum(), [x, *parameters], allow_unused=True
            )
        )
    for ours, reference in zip(*found, strict=True):
        assert (ours is None) == (reference is None)
        assert ours is None or relative_error([ours], [reference]) < 1e-9


def test_a_tap_that_reads_the_state_itself_changes_nothing():
    x = images()
    before = x.clone()
    net = ReversibleSequence([Tap(nn.Identity()), coupling(), Tap(nn.Tanh())])
    y, total = net(x)
    assert torch.equal(x, before)
    torch.testing.assert_close(total, x + y.tanh())
    torch.testing.assert_close(
        net.eval().inverse(net(x)[0]), x, atol=3e-4, rtol=0
    )


def test_memory_of_taps_does_not_grow_with_their_number():
    class Total(nn.Module):
        def __init__(self, taps):
            super().__init__()
            blocks = []
            for _ in range(taps):
                blocks += [coupling(), Tap(nn.Conv2d(8, 24, 1))]
            self.net = ReversibleSequence(blocks)

        def forward(self, x):
            return self.net(x)[1]

    def activations(taps):
        return training_step_memory(
            lambda: Total(taps), (16, 8, 64, 64)
        ).activation_bytes

    few = activations(2)
    assert activations(16) < 1.02 * few
    # The total, its gradient, a tap's value, the state, its gradient, both
    # streams joined, the input, and 3 states of slack. The concatenation of
    # 16 taps alone would be 16 states.
    state = 4 * 16 * 8 * 64 * 64
    assert few < (3 * 3 + 4 + 3) * state


@pytest.mark.parametrize("save_memory", [True, False])
def test_taps_that_do_not_fit(save_memory):
    def sequence(*taps):
        return ReversibleSequence(
            [Tap(tap) for tap in taps], save_memory=save_memory
        )

    with pytest.raises(ValueError, match=r"blocks\.1\.read .*\(3, 1, 7, 6\)"):
        sequence(nn.Conv2d(8, 5, 1), nn.Conv2d(8, 1, 1))(images())

    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    with pytest.raises(TypeError, match=r"blocks\.0\.read returned tuple"):
        sequence(Pair())(images().requires_grad_())


# --- state -------------------------------------------------------------------


def train(module, steps=3, **options):
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    for step in range(steps):
        optimizer.zero_grad()
        gradients(module, images(dtype=torch.float64), seed=step, **options)
        optimizer.step()


@pytest.mark.parametrize("momentum", [0.1, None])
def test_state_dict_after_training_steps(momentum):
    net = chain(3, momentum=momentum).double()
    twin = stored(net)
    train(net)
    train(twin)
    counts = [v for k, v in net.state_dict().items() if "num_batches" in k]
    assert all(count == 3 for count in counts)
    for (key, ours), reference in zip(
        net.state_dict().items(), twin.state_dict().values()
    ):
        torch.testing.assert_close(
            ours, reference, rtol=1e-12, atol=1e-14, msg=key
        )


def test_running_statistics_of_one_step_are_bit_equal():
    net = chain(4)
    twin = stored(net)
    gradients(net, images())
    gradients(twin, images())
    assert_same_state(net, twin)


def test_frozen_batch_norm():
    net = chain(3).double()
    for part in net.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.eval()
    before = {k: v for k, v in net.state_dict().items() if "running" in k}
    before = copy.deepcopy(before)
    twin = stored(net)
    x = images(dtype=torch.float64)
    _, ours, _ = gradients(net, x)
    _, reference, _ = gradients(twin, x)
    assert relative_error(ours, reference) < 1e-9
    for key, value in before.items():
        assert torch.equal(net.state_dict()[key], value), key


class CountingNorm(nn.BatchNorm2d):
    """A batch norm that another part of the program puts in later."""

    calls = 0

    def forward(self, x):
        type(self).calls += 1
        return super().forward(x)


def test_modules_converted_after_construction_are_the_ones_used():
    net = chain(2)
    for block in net.blocks:
        for half in (block.f, block.g):
            half[1] = CountingNorm(4)
    CountingNorm.calls = 0
    net(images()).sum().backward()
    assert CountingNorm.calls == 8  # 4 norms, forward and replay
    assert all(
        m.num_batches_tracked == 1
        for m in net.modules()
        if isinstance(m, CountingNorm)
    )


def test_sync_batch_norm_converted_after_construction():
    # Without a process group it computes like a batch norm, on the CPU too.
    net = nn.SyncBatchNorm.convert_sync_batchnorm(chain(2))
    assert isinstance(net.blocks[0].f[1], nn.SyncBatchNorm)
    twin = stored(net)
    _, ours, _ = gradients(net, images())
    _, reference, _ = gradients(twin, images())
    assert relative_error(ours, reference) < 1e-5
    assert_same_state(net, twin)
    assert net.blocks[0].f[1].num_batches_tracked == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_sync_batch_norm_on_cuda(tmp_path):
    torch.distributed.init_process_group(
        "nccl", init_method=f"file://{tmp_path}/s", rank=0, world_size=1
    )
    try:
        net = nn.SyncBatchNorm.convert_sync_batchnorm(chain(3)).cuda()
        twin = stored(net)
        gradients(net, images().cuda())
        gradients(twin, images().cuda())
        assert_same_state(net, twin)
    finally:
        torch.distributed.destroy_process_group()


def test_modules_with_other_state():
    """Spectral norm changes its buffers in forward and uses them."""

    def half():
        conv = nn.Conv2d(4, 4, 3, padding=1)
        return nn.utils.parametrizations.spectral_norm(conv)

    torch.manual_seed(2)
    net = ReversibleSequence(
        [AdditiveCoupling(half(), half()) for _ in range(3)]
    ).double()
    twin = stored(net)
    x = images(dtype=torch.float64)
    _, ours, _ = gradients(net, x)
    _, reference, _ = gradients(twin, x)
    assert relative_error(ours, reference) < 1e-9
    assert_same_state(net, twin)


def test_eval_and_no_grad_are_a_plain_forward():
    net = chain(3)
    twin = stored(net)
    x = images()
    with torch.no_grad():
        torch.manual_seed(0)
        y = net(x)
        torch.manual_seed(0)
        assert torch.equal(y, twin(x))
    assert y.grad_fn is None
    assert torch.equal(net.eval()(x), twin.eval()(x))


def test_save_memory_can_be_switched_at_any_time():
    net = chain(2, save_memory=False)
    assert "OutputNode" not in type(net(images()).grad_fn).__name__
    net.save_memory = True
    assert "OutputNode" in type(net(images()).grad_fn).__name__


# --- precision ---------------------------------------------------------------


def test_bf16_autocast_with_backward_outside():
    net = chain(4)
    y, ours, _ = gradients(net, images(), autocast=torch.bfloat16)
    twin = stored(net)
    y_ref, reference, _ = gradients(twin, images(), autocast=torch.bfloat16)
    assert y.dtype == torch.float32
    assert torch.equal(y, y_ref)
    assert relative_error(ours, reference) < 1e-6
    # The precision inside f was really bf16.
    full, _, _ = gradients(stored(net), images())
    assert relative_error([full], [y]) > 1e-4


def test_autocast_hands_no_weight_without_history_to_others():
    net = chain(1, dropout=0.0)
    x = images()
    with torch.autocast("cpu", torch.bfloat16):
        net(x)
        net.save_memory = False
        net(x).sum().backward()
    assert net.blocks[0].f[0].weight.grad is not None


def test_pure_bfloat16():
    net = chain(3).bfloat16()
    y, ours, _ = gradients(net, images().bfloat16())
    twin = stored(net)
    y_ref, reference, _ = gradients(twin, images().bfloat16())
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, y_ref)
    assert relative_error(ours, reference) < 1e-2


def test_exact_stream_at_50_blocks_with_bf16():
    net = chain(50, channels=16, dropout=0.0)
    x = torch.randn(4, 32, 12, 12)
    with torch.autocast("cpu", torch.bfloat16):
        exact = check_invertible(net, x)
        net.exact = False
        loose = check_invertible(net, x)
    print(exact, loose, sep="\n")
    assert exact.inversion_error == 0.0
    assert exact.gradient_error < 1e-6
    # Without the grid the same check fails: the test can fail.
    assert loose.inversion_error > 0
    assert loose.gradient_error > 1e-2


def test_exact_stream_in_float32():
    net = chain(50)
    assert check_invertible(net, images()).inversion_error == 0.0
    _, ours, _ = gradients(net, images())
    _, reference, _ = gradients(stored(net), images())
    assert relative_error(ours, reference) < 1e-5


def test_rounding_moves_the_output_by_no_more_than_half_a_grid_step():
    net = chain(1, dropout=0.0).eval()
    x = images()
    rounded = net(x)
    net.exact = False
    plain = net(x)
    # x1, x2 and f(x2) are each rounded once before y1.
    limit = 2 * 2.0**-13 * 1.01
    assert (rounded[:, :4] - plain[:, :4]).abs().max() < limit + 1e-4
    assert not torch.equal(rounded, plain)
    assert torch.equal(rounded * 4096, (rounded * 4096).round())


@pytest.mark.parametrize("scale, block", [(5000.0, 0), (3000.0, 1)])
def test_leaving_the_grid_is_reported_before_any_gradient(scale, block):
    net = ReversibleSequence(
        [AdditiveCoupling(nn.Identity(), nn.Identity()) for _ in range(3)]
    )
    net.blocks[0].f = nn.Conv2d(4, 4, 1)
    nn.init.zeros_(net.blocks[0].f.weight)
    nn.init.zeros_(net.blocks[0].f.bias)
    x = torch.zeros(2, 8, 3, 3)
    x[:, :4] = scale / 2 if block else scale
    x.requires_grad_()
    y = net(x)
    with pytest.raises(RuntimeError, match=f"blocks.{block} .*grid_bits=9"):
        y.sum().backward()
    assert x.grad is None
    assert net.blocks[0].f.weight.grad is None
    net.grid_bits = 7
    net(x).sum().backward()
    assert x.grad is not None


def test_non_finite_values_pass_on_as_in_autograd():
    net = chain(2, dropout=0.0)
    x = images()
    x[0, 0, 0, 0] = float("inf")
    x.requires_grad_()
    net(x).sum().backward()
    assert not torch.isfinite(x.grad).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_fp16_with_grad_scaler_on_cuda():
    net = chain(8, channels=16).cuda()
    twin = stored(net)
    x = images(channels=32).cuda()
    for module in (net, twin):
        torch.manual_seed(0)
        torch.cuda.manual_seed(0)
        scaler = torch.amp.GradScaler("cuda")
        optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
        with torch.autocast("cuda", torch.float16):
            loss = module(x).square().mean()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
    ours = [p.grad for p in net.parameters()]
    assert relative_error(ours, [p.grad for p in twin.parameters()]) < 1e-3


# --- random numbers ----------------------------------------------------------


def test_global_random_stream_is_that_of_plain_autograd():
    draws = []
    for module in (chain(3), stored(chain(3))):
        torch.manual_seed(9)
        y = module(images())
        between = torch.rand(3)
        y.sum().backward()
        draws.append((between, torch.rand(3)))
    assert torch.equal(draws[0][0], draws[1][0])
    assert torch.equal(draws[0][1], draws[1][1])


# --- memory and work ---------------------------------------------------------


def test_saved_bytes_do_not_grow_with_depth():
    x = images()
    shallow, y = saved_bytes(chain(2), x)
    deep, _ = saved_bytes(chain(32), x)
    assert deep == shallow == y.untyped_storage().nbytes()
    plain, _ = saved_bytes(stored(chain(32)), x)
    assert plain > 50 * deep


def test_taps_save_nothing_between_couplings():
    x = images()
    bare, y = saved_bytes(ReversibleSequence([coupling(), coupling()]), x)
    tapped, _ = saved_bytes(ReversibleSequence(TAPPED["couplings"]()), x)
    assert tapped == bare == y.untyped_storage().nbytes()


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_peak_of_forward_and_backward_does_not_grow_with_depth(autocast):
    def activations(depth, save_memory):
        memory = training_step_memory(
            lambda: chain(depth, save_memory=save_memory),
            (16, 8, 64, 64),
            autocast=autocast,
        )
        return memory.activation_bytes

    shallow, deep = activations(2, True), activations(32, True)
    # Of a coupling only two scalars (how far its streams reach) remain.
    assert deep < 1.02 * shallow
    assert activations(32, False) > 5 * deep


def test_peak_is_two_states_and_the_working_set_of_one_function():
    """State and its gradient, and what f itself stores: nothing else."""
    shape = (16, 8, 64, 64)
    state = 4 * 16 * 8 * 64 * 64
    memory = training_step_memory(lambda: chain(8, dropout=0.0), shape)
    # Input, output and its gradient belong to the caller: 3 states. Ours: 2.
    # f stores conv, norm and ReLU outputs of half a state each (4 tensors),
    # and needs gradients of two of them at once; 1 state of slack.
    assert memory.activation_bytes < (3 + 2 + 3 + 1) * state


def widening(channels, inside):
    """conv - tanh - conv, without biases and norms."""
    return nn.Sequential(
        nn.Conv2d(channels, inside, 1, bias=False),
        nn.Tanh(),
        nn.Conv2d(inside, channels, 1, bias=False),
    )


@pytest.mark.parametrize("slices", [1, 2, 8])
def test_a_sum_needs_the_memory_of_one_of_its_members(slices):
    def build():
        f, g = (
            nn.ModuleList(widening(4, 64 // slices) for _ in range(slices))
            for _ in "fg"
        )
        return ReversibleSequence([AdditiveCoupling(f, g)])

    memory = training_step_memory(build, (16, 8, 64, 64))
    state = 4 * 16 * 8 * 64 * 64
    # 5 states, and of 64 channels (8 states) what the tanh saved and the
    # gradients of its output and input.
    assert memory.activation_bytes <= (5 + 3 * 8 / slices) * state


def test_streams_that_down_sampling_has_copied_are_freed():
    """Also those that the module after it had for its input."""

    def build():
        coupling = AdditiveCoupling(widening(4, 64), widening(4, 64))
        return ReversibleSequence([coupling, SpaceToDepth(2), Head(32)])

    memory = training_step_memory(build, (16, 8, 64, 64))
    state = 4 * 16 * 8 * 64 * 64
    # The input, the state, its gradient, and what tanh needs (see above).
    assert memory.activation_bytes <= (3 + 3 * 8 + 0.5) * state


def test_exactly_one_extra_forward_of_each_f_and_g():
    # Counted outside: an attribute would be put back after the replay.
    calls = []

    class Counted(nn.Conv2d):
        def forward(self, x):
            calls.append(self)
            return super().forward(x)

    net = ReversibleSequence(
        [AdditiveCoupling(Counted(4, 4, 1), Counted(4, 4, 1)) for _ in range(3)]
    )
    y = net(images())
    halves = [half for block in net.blocks for half in (block.f, block.g)]
    assert [calls.count(half) for half in halves] == [1] * 6
    y.sum().backward()
    assert [calls.count(half) for half in halves] == [2] * 6


def test_attributes_count_once():
    class Counting(nn.Conv2d):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x) * self.calls

    net = ReversibleSequence(
        [AdditiveCoupling(Counting(4, 4, 1), Counting(4, 4, 1))]
    ).double()
    twin = stored(net)
    x = images(dtype=torch.float64)
    for _ in range(2):
        assert relative_error(gradients(net, x)[1], gradients(twin, x)[1]) < (
            1e-12
        )
    assert net.blocks[0].f.calls == twin.blocks[0].f.calls == 2


def test_graph_is_freed_after_backward():
    net = chain(2)
    y = net(images())
    node = weakref.ref(y)
    y.sum().backward()
    del y
    assert node() is None


@pytest.mark.parametrize("backward", [True, False])
def test_graph_of_taps_is_freed(backward):
    """With and without a backward pass."""
    net = Tapped("couplings", ["output", "total"])
    y, total = net.net(images())
    parts = [weakref.ref(x.grad_fn) for x in (y, total)]
    if backward:
        (y.sum() + total.sum()).backward()
    del y, total
    gc.collect()
    assert all(part() is None for part in parts)


@pytest.mark.parametrize("first", ["coupling", "tap"])
def test_streams_are_freed_after_backward_whatever_needs_a_gradient_first(
    first,
):
    """The loss may live on, in a list of losses for example."""
    net = chain(3, dropout=0.0)
    if first == "tap":
        net.blocks[0].requires_grad_(False)
        net.blocks.insert(1, read(8))
    rebuilt = []

    class Watch(Observer):
        def input_reconstructed(self, name, streams):
            rebuilt.extend(map(weakref.ref, streams))

    net._observer_factories.append(Watch)
    y = net(images())
    total = sum(part.sum() for part in (y if first == "tap" else (y,)))
    total.backward()
    gc.collect()
    assert rebuilt and all(stream() is None for stream in rebuilt)


def test_graph_of_taps_is_freed_after_an_error(monkeypatch):
    """As where memory ran out, and a smaller batch is tried."""
    net = Tapped("couplings", ["output", "total"])
    parts, apply_blocks = [], ReversibleSequence._apply_blocks

    def fail(sequence, state, stream_format, total, *others):
        apply_blocks(sequence, state, stream_format, total, *others)
        assert total.value is not None
        parts.append(weakref.ref(total))
        raise MemoryError

    monkeypatch.setattr(ReversibleSequence, "_apply_blocks", fail)
    with pytest.raises(MemoryError):
        net.net(images())
    gc.collect()
    assert parts and all(part() is None for part in parts)


def test_channels_last_is_kept_inside():
    layouts = []

    class Look(nn.Module):
        def forward(self, x):
            layouts.append(x.is_contiguous(memory_format=torch.channels_last))
            return torch.tanh(x)

    net = ReversibleSequence([AdditiveCoupling(Look(), Look())])
    x = images().to(memory_format=torch.channels_last).requires_grad_()
    net(x).sum().backward()
    assert layouts == [True] * 4


# --- inverse -----------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 8, 8, 8), (2, 8, 7, 5), (1, 8, 1, 9)])
def test_inverse_with_down_sampling(shape):
    torch.manual_seed(0)
    net = ReversibleSequence(
        [
            AdditiveCoupling(body(4), body(4)),
            SpaceToDepth(2),
            AdditiveCoupling(body(16), body(16)),
            SpaceToDepth((2, 1)),
            AdditiveCoupling(body(32), body(32)),
        ]
    ).eval()
    x = torch.randn(shape)
    back = net.inverse(net(x), input_shape=shape)
    # x itself lies beside the grid.
    assert (back - x).abs().max() <= 2.0**-13
    again = net.inverse(net(back), input_shape=shape)
    assert torch.equal(again, back)


def test_inverse_counts_nothing_in_training_mode():
    net = chain(2, dropout=0.0)
    x = images()
    y = net(x)
    before = copy.deepcopy(net.state_dict())
    net.inverse(y)
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_inverse_errors():
    net = chain(2, dropout=0.5)
    y = net(images())
    with pytest.raises(RuntimeError, match=r"blocks\.1 drew random numbers"):
        net.inverse(y)
    with pytest.raises(ValueError, match=r"blocks\.0 \(Conv2d\)"):
        mixed_chain().inverse(y)
    down = ReversibleSequence([SpaceToDepth(2)])
    with pytest.raises(ValueError, match=r"\(1, 2, 9, 9\)"):
        down.inverse(torch.zeros(1, 8, 2, 2), input_shape=(1, 2, 9, 9))
    # No input has this output: a multiple of 8 channels would.
    with pytest.raises(ValueError, match="holds streams of"):
        down.inverse(torch.zeros(1, 6, 2, 2))


# --- errors ------------------------------------------------------------------


def test_bad_input():
    net = chain(1)
    with pytest.raises(ValueError, match=r"\(2, 7, 4, 4\).*even"):
        net(torch.zeros(2, 7, 4, 4))
    with pytest.raises(TypeError, match="int64"):
        net(torch.zeros(2, 8, 4, 4, dtype=torch.int64))
    with pytest.raises(TypeError, match="list"):
        net([1, 2])
    with pytest.raises(ValueError, match="no blocks"):
        ReversibleSequence([])
    with pytest.raises(ValueError, match="grid_bits"):
        chain(1, grid_bits=24)


@pytest.mark.parametrize("save_memory", [True, False])
def test_functions_that_do_not_fit(save_memory):
    def sequence(f):
        return ReversibleSequence(
            [AdditiveCoupling(f, nn.Identity())], save_memory=save_memory
        )

    with pytest.raises(ValueError, match=r"blocks\.0\.f changed the shape"):
        sequence(nn.Conv2d(4, 4, 3))(images())
    with pytest.raises(ValueError, match=r"blocks\.0\.f changed the shape"):
        sequence(nn.Conv2d(4, 1, 1))(images())  # would broadcast

    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    with pytest.raises(TypeError, match=r"blocks\.0\.f returned tuple"):
        sequence(Pair())(images())


def test_double_backward_names_the_cause():
    net = chain(1)
    x = images().requires_grad_()
    with pytest.raises(RuntimeError, match="double backward.*save_memory"):
        torch.autograd.grad(net(x).sum(), x, create_graph=True)
    # The remedy works.
    net.save_memory = False
    torch.autograd.grad(net(x).sum(), x, create_graph=True)


@pytest.mark.parametrize("output", [0, 1])
@pytest.mark.parametrize("kind", ["first", "between", "last", "alone"])
def test_double_backward_is_refused_with_taps(kind, output):
    """From either output; a first derivative is no way around it."""
    couplings = [coupling() for _ in range(2)]
    tap = Tap(nn.Tanh())
    net = ReversibleSequence(
        {
            "first": [tap, *couplings],
            "between": [couplings[0], tap, couplings[1]],
            "last": [*couplings, tap],
            "alone": [nn.Conv2d(8, 8, 1), tap],
        }[kind]
    )
    x = images().requires_grad_()
    if kind == "alone" and output == 0:
        pytest.skip("a chain without invertible blocks or taps allows it")
    with pytest.raises(RuntimeError, match="double backward|differentiate twi"):
        loss = net(x)[output].square().sum()
        (first,) = torch.autograd.grad(loss, x, create_graph=True)
        first.square().sum().backward()


def alive(kind):
    """Objects that nobody has freed, those of other tests among them."""
    gc.collect()
    return [o for o in gc.get_objects() if type(o) is kind]


def test_the_gradient_of_the_sum_of_taps_is_not_kept():
    """Though the graph is."""
    net = ReversibleSequence([coupling(), Tap(nn.Tanh()), coupling()])
    before = alive(DetachedTapSum)
    y, total = net(images().requires_grad_())
    (y.sum() + total.sum()).backward(retain_graph=True)
    sums = [o for o in alive(DetachedTapSum) if o not in before]
    assert sums and all(s.gradient is None for s in sums)


def test_leaving_the_grid_is_reported_while_others_observe():
    net = chain(2, dropout=0.0)
    with inversion_errors(net), pytest.raises(RuntimeError, match="reached"):
        net(1e4 * images()).sum().backward()


def test_streams_are_not_kept_after_an_error_in_backward():
    net = chain(2, dropout=0.0)
    before = alive(ChainState)
    y = net(1e4 * images())
    with pytest.raises(RuntimeError, match="reached"):
        y.sum().backward()
    states = [o for o in alive(ChainState) if o not in before]
    assert states and all(not s.streams and not s.extra_tensors for s in states)


@pytest.mark.parametrize("kind", ["module", "coupling", "tap", "first tap"])
@pytest.mark.parametrize("save_memory", [True, False])
def test_extra_arguments_by_name_reach_every_kind_of_block(kind, save_memory):
    class Scaled(nn.Module):
        def forward(self, x, *, scale):
            return x * scale

    blocks = {
        "module": [Scaled()],
        "coupling": [AdditiveCoupling(Scaled(), Scaled())],
        "tap": [AdditiveCoupling(Scaled(), Scaled()), Tap(Scaled())],
        "first tap": [Tap(Scaled())],
    }[kind]
    net = ReversibleSequence(blocks, save_memory)
    x = images().requires_grad_()
    result = net(x, scale=0.5)
    y = result[-1] if isinstance(result, tuple) else result
    y.sum().backward()
    # x1 + x2 / 2 and x2 + (x1 + x2 / 2) / 2, halved by the tap.
    first, second = {
        "module": (0.5, 0.5),
        "coupling": (1.5, 1.75),
        "tap": (0.75, 0.875),
        "first tap": (0.5, 0.5),
    }[kind]
    assert x.grad[:, :4].unique().tolist() == [first]
    assert x.grad[:, 4:].unique().tolist() == [second]


def test_changes_between_forward_and_backward_are_found():
    net = chain(2)
    y = net(images())
    with torch.no_grad():
        net.blocks[1].g[0].bias.add_(1)
    with pytest.raises(RuntimeError, match=r"blocks\.1\.g\.0\.bias was"):
        y.sum().backward()
    y = net(images())
    net.blocks[0].f[0].weight.requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"blocks\.0\.f\.0\.weight was"):
        y.sum().backward()
    y = net(images())
    net.eval()
    with pytest.raises(RuntimeError, match="mode of the forward pass"):
        y.sum().backward()
    assert all(p.grad is None for p in net.parameters())


# --- check_invertible --------------------------------------------------------


class Nondeterministic(nn.Module):
    """Not a random number that a generator could repeat."""

    calls = 0

    def forward(self, x):
        type(self).calls += 1
        return x * (1 + 0.1 * type(self).calls)


def test_check_invertible_names_the_block_that_does_not_repeat():
    net = chain(3, dropout=0.0)
    net.blocks[1].g = Nondeterministic()
    report = check_invertible(net, images())
    assert report.blocks["blocks.2"] == 0.0
    assert report.blocks["blocks.1"] > 1e-3
    assert report.gradient_error > 1e-3
    assert "gradient error" in str(report)


def test_check_invertible_leaves_everything_as_it_was():
    outer = nn.Sequential(nn.Conv2d(8, 8, 1), chain(2))
    before = copy.deepcopy(outer.state_dict())
    x = images()
    state = torch.get_rng_state()
    report = check_invertible(outer, x)
    assert report.inversion_error == 0.0
    assert set(report.blocks) == {"1.blocks.0", "1.blocks.1"}
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in outer.parameters())
    for key, value in outer.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_check_invertible_begins_both_steps_with_the_same_state():
    """Else a module that uses what it counts would look wrong."""

    class Warming(nn.Conv2d):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x) * self.calls

    net = ReversibleSequence(
        [AdditiveCoupling(Warming(4, 4, 1), Warming(4, 4, 1))]
    ).double()
    report = check_invertible(net, images(dtype=torch.float64))
    assert report.gradient_error < 1e-12
    assert net.blocks[0].f.calls == 0


def test_check_invertible_repeats_numbers_of_python_and_numpy():
    """And leaves their generators as they were."""

    class Drawing(nn.Module):
        def forward(self, x):
            return x * (random.random() + np.random.rand())

    net = ReversibleSequence([AdditiveCoupling(Drawing(), Drawing())]).double()
    states = random.getstate(), np.random.get_state()[1].tolist()
    report = check_invertible(net, images(dtype=torch.float64))
    assert report.gradient_error < 1e-12
    assert states == (random.getstate(), np.random.get_state()[1].tolist())


@pytest.mark.parametrize("lost", [True, False])
def test_check_invertible_reports_gradients_of_one_kind_alone(lost):
    """Without saving memory, or with it, a weight gets none at all."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.chain = ReversibleSequence(
                [AdditiveCoupling(nn.Tanh(), nn.Tanh())]
            )
            self.scale = nn.Parameter(torch.ones(1, dtype=torch.float64))

        def forward(self, x):
            cut = self.chain.save_memory is lost
            scale = self.scale.detach() if cut else self.scale
            return self.chain(x * scale)

    report = check_invertible(Scaled(), images(dtype=torch.float64))
    assert report.parameters["scale"] > 1e-3
    assert report.gradient_error > 1e-3


def test_check_invertible_needs_a_reversible_sequence():
    with pytest.raises(ValueError, match="Conv2d holds no Reversible"):
        check_invertible(nn.Conv2d(1, 1, 1), images(channels=1))


class WrongOnce(AdditiveCoupling):
    """The first call of backward rebuilds something else."""

    def __init__(self, f, g, wrong):
        super().__init__(f, g)
        self.wrong = wrong

    def backward_streams(self, *args):
        (x1, x2), dx = super().backward_streams(*args)
        x2 = x2 + self.wrong
        self.wrong = 0.0
        return (x1, x2), dx


@pytest.mark.parametrize(
    "wrong, error",
    [(1.0, 1 / 6), (math.nan, math.inf), (math.inf, math.inf)],
)
def test_inversion_errors_are_the_worst_of_all_calls(wrong, error):
    block = WrongOnce(nn.Identity(), nn.Identity(), wrong)
    inner = ReversibleSequence([block, Tap(nn.Identity())])
    net = nn.ModuleDict({"inner": inner})
    x = torch.full((1, 2, 3), 2.0, requires_grad=True)
    with inversion_errors(net) as errors:
        y, _ = inner(inner(x)[0])
        y.sum().backward()
    assert errors == {"inner.blocks.0": pytest.approx(error)}
    assert not {"forward_streams", "backward_streams"} & set(vars(block))


def test_inversion_errors_are_none_where_all_is_stored():
    net = stored(chain(2))
    with inversion_errors(net) as errors:
        net(images()).sum().backward()
    assert errors == {}


def test_check_invertible_of_a_chain_without_invertible_blocks():
    report = check_invertible(
        ReversibleSequence([nn.Conv2d(8, 8, 1)]), images()
    )
    assert (report.inversion_error, report.blocks) == (0.0, {})
    assert "no block" in str(report)


# --- whose memory is written -------------------------------------------------


class Positional(nn.Module):
    """Adds parameters of the stream's full shape last.

    autograd then hands out one tensor for the gradients of both, and that of
    the stream itself.
    """

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 3, padding=1)
        self.position = nn.Parameter(torch.randn(1, 4, 9))
        self.offset = nn.Parameter(torch.randn(1, 4, 9))

    def forward(self, x, condition=0):
        return self.conv(x).tanh() + self.position + self.offset + condition


def positional_chain(shared):
    torch.manual_seed(0)
    couplings = []
    for _ in range(3):
        f, g = Positional(), Positional()
        if shared:
            g.position = f.position
        couplings.append(AdditiveCoupling(f, g))
    return ReversibleSequence(couplings).double()


@pytest.mark.parametrize("shared", [False, True])
def test_gradients_that_are_the_stream_s_own(shared):
    net = positional_chain(shared)
    x = torch.randn(1, 8, 9, dtype=torch.float64)
    found = []
    for module in (net, stored(net)):
        condition = torch.ones(1, 4, 9, dtype=torch.float64)
        condition.requires_grad_()
        _, grads, _ = gradients(module, x, condition=condition)
        found.append([*grads, condition.grad])
    for ours, reference in zip(*found, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-12)


class Identity(nn.Module):
    """Hands its input on: whoever adds to the result changes the input."""

    def forward(self, x):
        return x


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("function", [nn.Tanh, Identity])
def test_what_hooks_have_kept_does_not_change(function, exact):
    net = ReversibleSequence(
        [AdditiveCoupling(function(), function()) for _ in range(3)],
        exact=exact,
    )
    kept = []

    def keep(module, inputs, output):
        for x in (*inputs, output):
            kept.append((x, x.detach().clone()))

    def keep_gradients(module, inputs, outputs):
        for x in (*inputs, *outputs):
            kept.append((x, x.clone()))

    for part in net.modules():
        if isinstance(part, function):
            part.register_forward_hook(keep)
            part.register_full_backward_hook(keep_gradients)
    net(images().requires_grad_()).square().sum().backward()
    assert len(kept) == 6 * 2 * 2 + 6 * 2  # f, g: twice, then backward
    for now, before in kept:
        assert torch.equal(now, before)


# --- layouts -----------------------------------------------------------------

LAYOUTS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(1, -1).contiguous().transpose(1, -1),
    "batch last": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "sliced": lambda x: torch.cat([x, x], 2)[:, :, : x.shape[2]],
    "step 2": lambda x: torch.stack([x, x], -1).flatten(-2)[..., ::2],
    "expanded": lambda x: x[:1].expand(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_strides_of_input_extras_and_output_gradient(layout, dtype):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = body(4)

        def forward(self, x, gain):
            return self.body(x) * gain

    torch.manual_seed(2)
    net = ReversibleSequence(
        [
            AdditiveCoupling(Scaled(), Scaled()),
            SpaceToDepth(1),
            AdditiveCoupling(Scaled(), Scaled()),
        ]
    ).to(dtype)
    lay = LAYOUTS[layout]
    x, gain, weight = (images(dtype=dtype) for _ in range(3))
    found = []
    for module, change in ((net, lay), (stored(net), lambda x: lay(x).clone())):
        torch.manual_seed(1)
        xs = change(x).detach().requires_grad_()
        gains = change(gain)[:, :4].detach().requires_grad_()
        y = module(xs, gain=gains)
        y.backward(change(weight))
        found.append([xs.grad, gains.grad, *(p.grad for p in net.parameters())])
        net = module
    found[1][2:] = [p.grad for p in module.parameters()]
    bound = 1e-5 if dtype == torch.float32 else 1e-12
    assert relative_error(*found) < bound


@pytest.mark.parametrize("amp", [None, torch.bfloat16])
@pytest.mark.parametrize("dims", [2, 3])
def test_channels_last_is_as_exact_as_contiguous(dims, amp):
    conv = {2: nn.Conv2d, 3: nn.Conv3d}[dims]
    norm = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[dims]
    form = {2: torch.channels_last, 3: torch.channels_last_3d}[dims]
    seen = []

    class Body(nn.Sequential):
        def __init__(self, channels):
            super().__init__(
                norm(channels),
                nn.ReLU(),
                conv(channels, channels, 3, padding=1),
            )

        def forward(self, x):
            seen.append(x.stride())
            return super().forward(x)

    torch.manual_seed(0)
    blocks = [conv(1, 8, 3, padding=1)]
    for channels in (4, 4 * 2**dims):
        blocks += [
            AdditiveCoupling(Body(channels), Body(channels)) for _ in range(4)
        ]
        blocks.append(SpaceToDepth(2))
    net = ReversibleSequence(blocks[:-1]).to(memory_format=form)
    x = torch.randn(2, 1, *(12, 7, 5)[:dims]).to(memory_format=form)
    with inversion_errors(net) as errors:
        with torch.autocast("cpu", amp, enabled=amp is not None):
            y = net(x)
        y.float().square().sum().backward()
    assert set(errors.values()) == {0.0} and len(errors) == 9
    # Every function sees in backward the strides that it saw in forward.
    assert sorted(seen[: len(seen) // 2]) == sorted(seen[len(seen) // 2 :])
    assert all(s[1] == 1 for s in seen)


def test_an_empty_batch():
    net = chain(2, dropout=0.0).eval()
    x = torch.randn(0, 8, 7, 6, requires_grad=True)
    net(x).sum().backward()
    assert x.grad.shape == x.shape
    assert all(not p.grad.any() for p in net.parameters())


# --- backward that computes something else -----------------------------------


def in_backward():
    return torch._C._current_graph_task_id() != -1


class OtherOrder(nn.Module):
    """Sums in another order when called again, as another algorithm would."""

    def __init__(self, size):
        super().__init__()
        self.linear = nn.Linear(size, size, bias=False)

    def forward(self, x):
        weight = self.linear.weight
        if in_backward():
            return x.flip(-1) @ weight.flip(1).t()
        return x @ weight.t()


def other_order(depth=4, size=64):
    torch.manual_seed(0)
    return ReversibleSequence(
        [
            AdditiveCoupling(
                OtherOrder(size) if i == 1 else nn.Linear(size, size),
                nn.Linear(size, size),
            )
            for i in range(depth)
        ]
    )


def test_another_order_of_summation_is_an_error_that_names_the_block():
    net = other_order()
    x = 100 * torch.randn(50, 128)
    with pytest.raises(RuntimeError, match=r"input of blocks\.1 differs"):
        net(x).square().sum().backward()
    # Neither that block nor those before it have gradients.
    assert net.blocks[1].f.linear.weight.grad is None
    assert net.blocks[0].g.weight.grad is None


def test_another_order_of_summation_may_be_a_warning(monkeypatch, caplog):
    monkeypatch.setattr(mismatch._pending, "action", "warn")
    monkeypatch.setattr(mismatch._pending, "_warned", set())
    net = other_order()
    x = 100 * torch.randn(50, 128)
    for _ in range(2):
        net(x).square().sum().backward()
    (text,) = [
        r.message for r in caplog.records if "blocks.1 differs" in r.message
    ]
    size = float(re.search(r"differs by (\S+) of the largest", text)[1])
    assert 1e-7 < size < 1e-3
    assert all(p.grad is not None for p in net.parameters())


def test_a_float64_stream_is_compared_with_a_tolerance():
    net = other_order().double()
    x = 100 * torch.randn(50, 128, dtype=torch.float64)
    net(x).square().sum().backward()
    net.blocks[1].f = Nondeterministic()
    with pytest.raises(RuntimeError, match=r"blocks\.1 differs by 0"):
        net(x).square().sum().backward()


def test_a_stream_without_a_grid_is_not_compared():
    net = other_order()
    net.exact = False
    net(100 * torch.randn(50, 128)).square().sum().backward()


def test_comparisons_wait_for_the_device_no_more_than_the_range_does(
    monkeypatch,
):
    """The host reads once in backward: how far the streams reach."""
    waits = []

    class Copied:
        def query(self):
            return False

        def synchronize(self):
            waits.append(1)

    copies = []

    def copy_to_host(tensor):
        copies.append(len(tensor))
        return tensor, Copied()

    monkeypatch.setattr(mismatch, "_pending", mismatch._Pending(copy_to_host))
    monkeypatch.setattr(guards, "is_read_at_once", lambda device: False)
    net = chain(3, dropout=0.0)
    net(images()).sum().backward()
    assert copies == waits == []
    net(images()).sum().backward()
    # Those of the step before, of all blocks in one copy.
    assert copies == [3]
    assert waits == [1]


def test_random_numbers_of_python_numpy_and_own_generators():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.own = [torch.Generator().manual_seed(3)]
            self.rng = np.random.default_rng(3)

        def forward(self, x):
            noise = torch.rand(4, generator=self.own[0])
            scale = random.random() + np.random.rand() + self.rng.random()
            return self.linear(x) * noise * scale

    torch.manual_seed(0)
    net = ReversibleSequence(
        [AdditiveCoupling(Noisy(), Noisy()) for _ in range(2)]
    ).double()
    twin = stored(net)
    x = torch.randn(3, 8, dtype=torch.float64)
    found, after = [], []
    for module in (net, twin):
        random.seed(1)
        np.random.seed(1)
        found.append(gradients(module, x)[1])
        after.append(
            (
                random.random(),
                np.random.rand(),
                module.blocks[0].f.rng.random(),
                torch.rand(1, generator=module.blocks[0].f.own[0]).item(),
            )
        )
    assert relative_error(*found) < 1e-12
    assert after[0] == after[1]


# --- torch.compile -----------------------------------------------------------


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


# --- further orders of calls -------------------------------------------------


def test_parameter_gradients_are_ready_while_the_chain_is_walked_back():
    net = chain(4, dropout=0.0)
    order = []
    for index, block in enumerate(net.blocks):
        weight = block.f[0].weight
        weight.register_hook(lambda _, i=index: order.append(("ready", i)))
        block.f[0].register_forward_pre_hook(
            lambda m, a, i=index: (
                order.append(("replay", i)) if in_backward() else None
            )
        )
    net(images()).sum().backward()
    assert order == [
        (what, i) for i in (3, 2, 1, 0) for what in ("replay", "ready")
    ]


def test_a_negative_stream_beyond_the_grid_is_reported():
    net = ReversibleSequence([AdditiveCoupling(nn.Identity(), nn.Identity())])
    x = torch.zeros(2, 8, 3)
    x[0, 1, 2] = -5000.0
    with pytest.raises(RuntimeError, match="reached 5000, beyond 4096"):
        net(x.requires_grad_()).sum().backward()


def test_changes_of_one_submodule_and_by_data_are_found():
    net = chain(2)
    y = net(images())
    net.blocks[0].g[1].eval()
    with pytest.raises(RuntimeError, match="mode of the forward pass"):
        y.sum().backward()
    net.train()
    y = net(images())
    weight = net.blocks[1].f[0].weight
    weight.data = weight.data + 1
    with pytest.raises(RuntimeError, match=r"blocks\.1\.f\.0\.weight was"):
        y.sum().backward()
    assert all(p.grad is None for p in net.parameters())


def test_cached_parametrizations_get_gradients():
    def conv():
        return parametrizations.weight_norm(nn.Conv1d(4, 4, 3, padding=1))

    torch.manual_seed(0)
    net = ReversibleSequence([AdditiveCoupling(conv(), conv())]).double()
    x = torch.randn(2, 8, 6, dtype=torch.float64)
    with parametrize.cached():
        _, ours, _ = gradients(net, x)
    _, reference, _ = gradients(stored(net), x)
    assert relative_error(ours, reference) < 1e-12


def test_check_invertible_wakes_functions_that_begin_as_zero():
    net = ReversibleSequence([AdditiveCoupling(OtherOrder(64), nn.Tanh())])
    nn.init.zeros_(net.blocks[0].f.linear.weight)
    report = check_invertible(net, 100 * torch.randn(50, 128))
    assert report.inversion_error > 0
    assert not net.blocks[0].f.linear.weight.any()
