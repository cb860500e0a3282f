"""Forward and replay see the same memory layout."""

import pytest
import torch
from torch import nn

from sb_memeff.lobes.models.RevResNet import RevResNet
from sb_memeff.nnet.reversible import (
    AdditiveCoupling,
    ReversibleSequence,
    SpaceToDepth,
    Tap,
    inversion_errors,
)
from sb_memeff.nnet.reversible.layout import split_streams
from tests.unittests.nnet.reversible.chains import (
    body,
    gradients,
    images,
    relative_error,
    stored,
)
from tests.unittests.weights import without_zeros


class RecordsStrides(nn.Module):
    """Notes the strides of what a function is given.

    Not in an attribute: a replay restores those.
    """

    strides = []

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        self.strides.append(x.stride())
        return self.inner(x)


class Contiguous(nn.Module):
    """A function that returns another layout than it was given."""

    def __init__(self, channels, dims):
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        self.conv = conv(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(x).tanh().contiguous()


def channels_last(x):
    """Channels innermost, for any number of axes."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def functions(channels, dims, other):
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1]
    for turn in range(2):
        if other and turn:
            yield Contiguous(channels, dims)
        else:
            yield nn.Sequential(
                norm(channels),
                nn.ReLU(),
                conv(channels, channels, 3, padding=1),
            )


def network(dims, other=False, exact=True):
    torch.manual_seed(0)

    def coupling(channels):
        f, g = functions(channels, dims, other)
        return AdditiveCoupling(RecordsStrides(f), RecordsStrides(g))

    wide = 4 * 2**dims
    return ReversibleSequence(
        [
            coupling(4),
            coupling(4),
            SpaceToDepth(2),
            coupling(wide),
            Tap(nn.Identity()),
            coupling(wide),
        ],
        exact=exact,
    )


class Outputs(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        y, total = self.net(x)
        return y + total


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("sizes", ["even", "odd"])
@pytest.mark.parametrize("other", [False, True])
@pytest.mark.parametrize("input_layout", ["channels last", "contiguous"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_replay_sees_the_strides_of_forward(
    dims, input_layout, other, sizes, autocast
):
    strides = RecordsStrides.strides
    strides.clear()
    net = Outputs(network(dims, other))
    if dims > 1:
        net.to(
            memory_format=(torch.channels_last, torch.channels_last_3d)[
                dims - 2
            ]
        )
    shape = {"even": (8, 6, 4), "odd": (7, 6, 5)}[sizes][:dims]
    x = torch.randn(2, 8, *shape)
    if input_layout == "channels last":
        x = channels_last(x)
        assert not x.is_contiguous()
    with inversion_errors(net) as errors:
        gradients(net, x, autocast=autocast)
    assert set(errors.values()) == {0.0} and len(errors) == 5
    assert len(strides) == 16
    forward, replay = strides[:8], strides[8:]
    strides.clear()
    # The last coupling first, in each of them g before f.
    assert replay == forward[::-1]
    # As with stored activations.
    gradients(stored(net), x, autocast=autocast)
    assert [dense(s) for s in strides] == [dense(s) for s in forward]


def dense(strides):
    """The order of the axes in memory."""
    return sorted(range(1, len(strides)), key=lambda axis: -strides[axis])


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_without_a_grid_too(dims):
    strides = RecordsStrides.strides
    strides.clear()
    net = Outputs(network(dims, other=True, exact=False))
    gradients(net, channels_last(torch.randn(2, 8, *(7, 6, 5)[:dims])))
    assert strides[8:] == strides[:8][::-1]


@pytest.mark.parametrize(
    "shape", [(2, 4, 9), (2, 4, 8, 6), (2, 4, 5, 7), (1, 2, 3, 4, 5)]
)
def test_space_to_depth_keeps_channels_last(shape):
    down = SpaceToDepth(2)
    x = torch.randn(shape)
    y = down.downsample(x)
    last = channels_last(x).requires_grad_()
    y_last = down.downsample(last)
    assert torch.equal(y, y_last)
    assert y.is_contiguous()
    assert y_last.movedim(1, -1).is_contiguous()
    up, up_last = down.upsample(y, x.shape), down.upsample(y_last, x.shape)
    assert torch.equal(up, x) and torch.equal(up_last, x)
    assert up.is_contiguous()
    assert up_last.movedim(1, -1).is_contiguous()
    # Differentiable in both layouts.
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y_last, last, dy)
    assert torch.equal(dx, down.upsample(dy, x.shape))


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("downsampling", ["strided", "invertible"])
def test_a_reversible_resnet_in_channels_last(downsampling, autocast):
    torch.manual_seed(0)
    net = RevResNet(
        input_size=20,
        channels=[8, 32, 128, 512],
        block_sizes=[2, 2, 2, 2],
        inner_channels=[4, 4, 8, 8],
        lin_neurons=8,
        downsampling=downsampling,
    )
    net = without_zeros(net).to(memory_format=torch.channels_last)
    feats = torch.randn(2, 37, 20)
    with inversion_errors(net) as errors:
        gradients(net, feats, autocast=autocast)
    assert len(errors) >= 5 and set(errors.values()) == {0.0}


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
    # On some processors torch's convolution itself changes the layout.
    with torch.autocast("cpu", amp, enabled=amp is not None):
        layout = conv(1, 8, 3, padding=1).to(memory_format=form)(x).stride()
    assert layout[1] != 1 or all(s[1] == 1 for s in seen)


def test_channels_last_is_kept_inside():
    layouts = []

    class RecordsCall(nn.Module):
        def forward(self, x):
            layouts.append(x.is_contiguous(memory_format=torch.channels_last))
            return torch.tanh(x)

    net = ReversibleSequence([AdditiveCoupling(RecordsCall(), RecordsCall())])
    x = images().to(memory_format=torch.channels_last).requires_grad_()
    net(x).sum().backward()
    assert layouts == [True] * 4


def test_split_streams_wants_an_even_number_of_channels():
    with pytest.raises(ValueError, match=r"\(2, 3, 4\)"):
        split_streams(torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match=r"shape \(2,\)"):
        split_streams(torch.zeros(2))
