"""Chains whose sums are kernels: the same bits, fewer launches and passes."""

import weakref
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
)

from sb_memeff.nnet.replay import mismatch
from sb_memeff.nnet.reversible import (
    AdditiveCoupling,
    Invertible,
    ReversibleSequence,
    SpaceToDepth,
    Tap,
    gradient_sums,
    guards,
)
from sb_memeff.nnet.reversible.grid import StreamFormat
from sb_memeff.ops.triton import (
    add_and_convert as sum_kernel,
    grid as grid_kernels,
    summary as summary_kernels,
)
from sb_memeff.ops.triton.launch import watch_launches
from tests.unittests.nnet.reversible.chains import (
    Nondeterministic,
    assert_same_state,
    chain,
    gradients,
    images,
    mixed_chain,
    other_order,
    relative_error,
    stored,
)
from tests.unittests.ops.kernel import DEVICE, force_stream_kernels


class ByValue(Invertible):
    """A coupling as a user may write it: sums of their own."""

    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward_streams(self, x1, x2, evaluator):
        return x2, x1 + evaluator.value("f", x2)

    def inverse_streams(self, y1, y2, evaluator, shape):
        return y2 - evaluator.value("f", y1), y1

    def backward_streams(self, y, dy, evaluator, shape):
        (x2, y2), (d2, d1) = y, dy
        increment, pullback = evaluator.vjp("f", x2)
        return (y2 - increment, x2), (d1, d2 + pullback(d1))


class OfChange(ByValue):
    """The same with the evaluator's sums, and a change of what they return."""

    def forward_streams(self, x1, x2, evaluator):
        return x2, -evaluator.add(x1, "f", x2)

    def inverse_streams(self, y1, y2, evaluator, shape):
        return evaluator.subtract(-y2, "f", y1), y1

    def backward_streams(self, y, dy, evaluator, shape):
        (x2, y2), (d2, d1) = y, dy
        x1, pullback = evaluator.subtract_vjp(-y2, "f", x2)
        return (x1, x2), (-d1, d2 + pullback(-d1))


def own_chain():
    torch.manual_seed(3)
    blocks = []
    for kind in (ByValue, OfChange, ByValue, OfChange):
        blocks.append(kind(nn.Conv2d(4, 4, 3, padding=1)))
    return ReversibleSequence([chain(1).blocks[0], *blocks])


def tapped_chain():
    torch.manual_seed(4)
    blocks = [AdditiveCoupling(nn.Conv2d(4, 4, 1), nn.Tanh()) for _ in range(3)]
    return ReversibleSequence(
        [blocks[0], Tap(nn.Conv2d(8, 8, 1)), *blocks[1:], Tap(nn.Identity())]
    )


CHAINS = {
    "couplings": (lambda: chain(2), 8),
    "all kinds of blocks": (mixed_chain, 3),
    "blocks of a user": (own_chain, 8),
}


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CHAINS)
def test_a_step_has_the_same_bits(monkeypatch, name, dtype, layout):
    build, channels = CHAINS[name]
    x = images(channels=channels).to(DEVICE)
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    results = []
    for forced in (False, True):
        force_stream_kernels(monkeypatch, forced)
        if dtype == torch.bfloat16 and DEVICE == "cpu":
            # Triton's interpreter cuts bfloat16 off.
            monkeypatch.setattr(gradient_sums, "runs_fused", lambda *x: False)
        net = build().to(DEVICE)
        launches = Counter()
        with watch_launches(lambda name, _, seen=launches: seen.update([name])):
            y, found, _ = gradients(net, x, autocast=dtype)
        results.append((y, found, net))
        assert bool(launches["_grid"]) == forced
    (y, found, net), (fused_y, fused_found, fused) = results
    assert torch.equal(fused_y, y)
    for a, b in zip(fused_found, found, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)
    assert_same_state(fused, net)


def test_taps_see_the_same(monkeypatch):
    results = []
    for forced in (False, True):
        force_stream_kernels(monkeypatch, forced)
        net = tapped_chain().to(DEVICE)
        x = images().to(DEVICE).requires_grad_()
        y, total = net(x)
        (y.sum() + total.square().sum()).backward()
        results.append([y, total, x.grad, *(p.grad for p in net.parameters())])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_the_inverse_and_inference_have_the_same_bits(monkeypatch):
    net = chain(3).to(DEVICE).eval()
    x = images().to(DEVICE)
    results = []
    for forced in (False, True):
        force_stream_kernels(monkeypatch, forced)
        with torch.no_grad():
            y = net(x)
            again = net.inverse(y)
        results.append((y, again))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("build", [lambda: chain(2), mixed_chain, own_chain])
def test_gradients_are_those_of_stored_activations(monkeypatch, build):
    force_stream_kernels(monkeypatch)
    net = build().to(DEVICE)
    channels = 3 if build is mixed_chain else 8
    x = images(channels=channels).to(DEVICE)
    _, expected, _ = gradients(stored(net), x)
    _, found, _ = gradients(net, x)
    assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("build", [lambda: chain(2), own_chain])
def test_saved_streams_are_not_overwritten(monkeypatch, build, forced):
    """Those of two streams are the output itself, and may be read twice."""
    force_stream_kernels(monkeypatch, forced)
    net = build().to(DEVICE)

    class Sum(nn.Module):
        """Takes the streams and keeps them, as a user's block may."""

        takes_streams = True

        def forward(self, streams):
            self.streams = streams
            return streams[0] * streams[1]

    net.blocks.append(Sum())
    x = images().to(DEVICE).requires_grad_()
    before = x.detach().clone()
    loss = net(x).square().sum()
    kept = [s.clone() for s in net.blocks[-1].streams]
    first, second = (
        torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2)
    )
    assert torch.equal(first, second)
    assert torch.equal(x, before)
    for now, then in zip(net.blocks[-1].streams, kept, strict=True):
        assert torch.equal(now, then)


@pytest.mark.parametrize("kept", ["", "f", "g"])
def test_a_stream_is_overwritten_unless_a_hook_keeps_it(monkeypatch, kept):
    """It saves backward a tensor; what hooks have seen must not change."""
    force_stream_kernels(monkeypatch)
    net = chain(2, dropout=0.0).to(DEVICE)
    seen = []

    def keep(module, inputs):
        seen.append((inputs[0].detach(), inputs[0].detach().clone()))

    for block in net.blocks:
        if kept:
            getattr(block, kept).register_forward_pre_hook(keep)
    in_place = []

    def watch(name, arguments):
        if arguments["SIGN"] == -1:
            stream, result = arguments["stream_ptr"], arguments["result_ptr"]
            in_place.append(stream is result)

    y = net(images().to(DEVICE).requires_grad_())
    with watch_launches(watch):
        y.sum().backward()
    # From the end: x2 = y2 - g(y1), x1 = y1 - f(x2), block by block.
    assert (
        in_place
        == {
            "": [True, True, True, True],
            "g": [True, False, True, False],
            "f": [True, True, False, True],
        }[kept]
    )
    for tensor, copy in seen:
        assert torch.equal(tensor, copy)


class KeepsGradient(torch.autograd.Function):
    """Identity that hands on its gradient, and keeps it with a copy."""

    kept = []

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        KeepsGradient.kept.append((gradient, gradient.clone()))
        return gradient


class KeepingSum(nn.Module):
    """The sum of both streams, which get one gradient."""

    takes_streams = True

    def forward(self, streams):
        return KeepsGradient.apply(streams[0] + streams[1])


class Keeping(nn.Module):
    """Computes in the dtype of its input, or in half precision."""

    def __init__(self, half):
        super().__init__()
        self.half_precision = half
        self.weight = nn.Parameter(torch.rand(4, 1, 1))

    def forward(self, x):
        x = KeepsGradient.apply(x)
        return (self.weight * x).half() if self.half_precision else x


@pytest.mark.parametrize("halves", ["hhhh", "hffh", "fhhf", "fhfh", "hhff"])
def test_gradients_in_several_precisions(monkeypatch, halves):
    """Sums are overwritten, but not those that anything else refers to."""
    torch.manual_seed(0)
    f, g, h, i = (Keeping(half == "h") for half in halves)
    blocks = [
        AdditiveCoupling(f, g),
        AdditiveCoupling(nn.ModuleList([h, nn.Identity()]), i),
        OfChange(nn.Conv2d(4, 4, 1)),
        AdditiveCoupling(Keeping(True), Keeping(True)),
        KeepingSum(),
    ]
    net = ReversibleSequence(blocks).to(DEVICE)
    x = images().to(DEVICE)
    upstream = torch.randn_like(x[:, :4])
    results = []
    for forced in (False, True):
        KeepsGradient.kept.clear()
        force_stream_kernels(monkeypatch, forced)
        net.zero_grad()
        leaf = x.clone().requires_grad_()
        net(leaf).backward(upstream)
        assert len(KeepsGradient.kept) == 7
        for gradient, copy in KeepsGradient.kept:
            assert torch.equal(gradient, copy)
        results.append([leaf.grad, *(p.grad for p in net.parameters())])
    for a, b in zip(*results, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_sum_of_gradients_is_overwritten(monkeypatch, layout):
    """Also after the output, and after a block that returns views."""
    force_stream_kernels(monkeypatch)
    torch.manual_seed(0)
    blocks = [AdditiveCoupling(Half(), Half()) for _ in range(3)]
    blocks.insert(1, SpaceToDepth(2))
    net = ReversibleSequence(blocks).to(DEVICE)
    in_place = []

    def watch(name, arguments):
        if name == "_add_and_convert":
            in_place.append(arguments["x_ptr"] is arguments["sum_ptr"])

    x = images().to(DEVICE)
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    with watch_launches(watch):
        net(x.requires_grad_()).square().sum().backward()
    assert in_place == 6 * [True]


class Split(nn.Module):
    """Two streams, of whose gradients it tells a function."""

    takes_streams = True

    def __init__(self, tell):
        super().__init__()
        self.tell = tell

    def forward(self, streams):
        streams = tuple(2 * s for s in streams)
        for s in streams:
            if s.requires_grad:
                s.register_hook(self.tell)
        return streams


def test_no_copy_of_a_gradient_outlives_the_chain(monkeypatch):
    """The block before gets the sums themselves."""
    force_stream_kernels(monkeypatch)
    copies, alive = [], []
    add = gradient_sums.add_and_convert

    def watch(*args):
        result = add(*args)
        copies.append(weakref.ref(result[1]))
        return result

    def tell(gradient):
        alive.append(sum(copy() is not None for copy in copies))

    monkeypatch.setattr(gradient_sums, "add_and_convert", watch)
    blocks = [AdditiveCoupling(Half(), Half()) for _ in range(2)]
    net = ReversibleSequence([Split(tell), *blocks]).to(DEVICE)
    y = net(images().to(DEVICE).requires_grad_())
    y.square().sum().backward()
    assert len(copies) == 4
    assert alive == [0, 0]


def test_a_stream_beyond_the_grid_is_reported(monkeypatch):
    force_stream_kernels(monkeypatch)
    net = chain(2, dropout=0.0).to(DEVICE)
    y = net((1e4 * images()).to(DEVICE))
    with pytest.raises(RuntimeError, match="blocks.0 the stream reached"):
        y.sum().backward()
    net = chain(2, dropout=0.0).to(DEVICE)
    nn.init.constant_(net.blocks[1].g[-1].bias, -5000.0)
    y = net(images().to(DEVICE))
    with pytest.raises(RuntimeError, match="blocks.1 the stream reached"):
        y.sum().backward()


def test_values_that_are_not_finite_pass(monkeypatch):
    force_stream_kernels(monkeypatch)
    net = chain(2, dropout=0.0).to(DEVICE)
    x = images().to(DEVICE)
    x[0, 0, 0, 0] = torch.inf
    net(x.requires_grad_()).sum().backward()
    assert not torch.isfinite(x.grad).all()


@pytest.mark.parametrize("action", ["error", "warn"])
def test_another_result_in_backward_is_reported(monkeypatch, caplog, action):
    force_stream_kernels(monkeypatch)
    monkeypatch.setattr(mismatch._pending, "action", action)
    monkeypatch.setattr(mismatch._pending, "_warned", set())
    for net, x, block in (
        (other_order(), 100 * torch.randn(50, 128), 1),
        (
            ReversibleSequence(
                [AdditiveCoupling(nn.Tanh(), Nondeterministic())]
            ),
            torch.randn(3, 4),
            0,
        ),
    ):
        y = net.to(DEVICE)(x.to(DEVICE).requires_grad_())
        text = rf"input of blocks\.{block} differs"
        if action == "error":
            with pytest.raises(RuntimeError, match=text):
                y.square().sum().backward()
        else:
            y.square().sum().backward()
            assert f"blocks.{block} differs by" in caplog.text


def test_rounding_passes_the_gradient(monkeypatch):
    force_stream_kernels(monkeypatch)
    x = torch.randn(7, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    stream = torch.ones(7, device=DEVICE)
    upstream = torch.arange(7.0, device=DEVICE)
    stream_format = StreamFormat(torch.float32, 12)
    for y in (stream_format.on_grid(x), stream_format.add(stream, x)):
        (dx,) = torch.autograd.grad(y @ upstream, x)
        assert torch.equal(dx, upstream.bfloat16())


class Half(nn.Module):
    """Returns its input in half precision."""

    def forward(self, x):
        return x.half()


class Operations(TorchDispatchMode):
    """Operations that a GPU would launch, and kernels; and bytes of kernels.

    What the interpreter does inside a kernel is not counted.
    """

    # They launch nothing, or look at states of generators.
    FREE = (
        "detach",
        "empty",
        "empty_like",
        "equal",
        "new_empty",
        "promote_types",
    )

    def __init__(self, monkeypatch):
        super().__init__()
        self.launches, self.bytes = Counter(), Counter()
        for module in (grid_kernels, summary_kernels, sum_kernel):
            monkeypatch.setattr(module, "launch", self._launch)

    def _launch(self, kernel, grid, *args, **constants):
        name = kernel.__name__
        self.launches[name] += 1
        tensors = [x for x in args if isinstance(x, torch.Tensor)]
        self.bytes[name] += sum(x.nbytes for x in tensors)
        with _disable_current_modes():
            kernel[grid](*args, **constants)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.partition("::")[2]
        if not func.is_view and name not in self.FREE:
            self.launches[name] += 1
        return func(*args, **(kwargs or {}))


def operations_of_a_step(monkeypatch, depth, function):
    net = ReversibleSequence(
        [AdditiveCoupling(function(), function()) for _ in range(depth)]
    )
    x = images().requires_grad_()
    with monkeypatch.context() as patch:
        force_stream_kernels(patch)
        # As on a device, which the host does not wait for.
        pending = mismatch._Pending(lambda tensor: (tensor, None))
        patch.setattr(mismatch, "_pending", pending)
        patch.setattr(guards, "is_read_at_once", lambda device: False)
        counted = Operations(patch)
        with counted:
            net(x).backward(torch.ones_like(x))
    return counted


def test_a_coupling_costs_four_launches_besides_its_functions(monkeypatch):
    """One for each half and direction, and to add up two gradients.

    Neither the range nor the comparisons cost any, nor does the conversion of
    a gradient.
    """
    less, more = (
        operations_of_a_step(monkeypatch, depth, Half) for depth in (2, 5)
    )
    # Functions cast in forward and in the replay, and cast their gradients back.
    assert more.launches - less.launches == {
        "_grid": 3 * 4,
        "_add_and_convert": 3 * 2,
        "_to_copy": 3 * 6,
    }
    # A half reads 2 bytes of the increment and 4 of the stream, and writes 4.
    values = images().numel() // 2
    summary = 16
    moved = more.bytes["_grid"] - less.bytes["_grid"]
    assert moved == 3 * 4 * (10 * values + summary)
    # Two gradients, the sum, and the copy.
    moved = more.bytes["_add_and_convert"] - less.bytes["_add_and_convert"]
    assert moved == 3 * 2 * 14 * values


def test_a_chain_costs_few_launches_for_its_guard(monkeypatch):
    """A table of summaries; two stacks to compare; one to see the range."""
    found = operations_of_a_step(monkeypatch, 3, Half).launches
    assert found["zeros"] == 1
    assert found["stack"] <= 3
    assert found["ne"] == found["any"] == 1
    assert not found.keys() & {"aminmax", "sum", "round_", "sub", "sub_"}
