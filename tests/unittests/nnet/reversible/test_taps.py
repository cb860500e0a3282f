"""Taps: values from the inside of a chain, and their sum."""

import gc
import weakref

import pytest
import torch
from torch import nn

from sb_memeff.memory.step import training_step_memory
from sb_memeff.nnet.reversible import (
    ReversibleSequence,
    SpaceToDepth,
    Tap,
)
from sb_memeff.nnet.reversible.tap_sum import DetachedTapSum
from tests.unittests.nnet.reversible.chains import (
    Strided,
    alive,
    assert_same_state,
    coupling,
    gradients,
    images,
    read,
    relative_error,
    saved_bytes,
    stored,
)

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


@pytest.mark.parametrize("kind", ["couplings", "tensors"])
def test_the_value_of_a_tap_is_freed_before_the_next_one(kind):
    net = ReversibleSequence(TAPPED[kind]())
    values, alive_before = [], []
    for block in net.blocks:
        if isinstance(block, Tap):
            block.read.register_forward_hook(
                lambda module, args, value: values.append(
                    weakref.ref(value.untyped_storage())
                )
            )
            block.read.register_forward_pre_hook(
                lambda module, args: alive_before.append(
                    [value for value in values if value() is not None]
                )
            )
    net(images().requires_grad_())
    assert alive_before == [[], []] and len(values) == 2


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


def test_taps_save_nothing_between_couplings():
    x = images()
    bare, y = saved_bytes(ReversibleSequence([coupling(), coupling()]), x)
    tapped, _ = saved_bytes(ReversibleSequence(TAPPED["couplings"]()), x)
    assert tapped == bare == y.untyped_storage().nbytes()


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


def test_the_gradient_of_the_sum_of_taps_is_not_kept():
    """Though the graph is."""
    net = ReversibleSequence([coupling(), Tap(nn.Tanh()), coupling()])
    before = alive(DetachedTapSum)
    y, total = net(images().requires_grad_())
    (y.sum() + total.sum()).backward(retain_graph=True)
    sums = [o for o in alive(DetachedTapSum) if o not in before]
    assert sums and all(s.gradient is None for s in sums)
