"""Chains and comparisons that the engine's tests share."""

import copy
import gc

import torch
from torch import nn

from sb_memeff.nnet.reversible import (
    AdditiveCoupling,
    ReversibleSequence,
    SpaceToDepth,
    Tap,
)


def body(channels, dims=2, dropout=0.2, momentum=0.1):
    """conv - batch norm - ReLU - dropout - conv - batch norm."""
    conv = {1: nn.Conv1d, 2: nn.Conv2d}[dims]
    norm = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d}[dims]
    return nn.Sequential(
        conv(channels, channels, 3, padding=1),
        norm(channels, momentum=momentum),
        nn.ReLU(),
        nn.Dropout(dropout),
        conv(channels, channels, 3, padding=1, bias=False),
        norm(channels, momentum=momentum),
    )


def chain(depth, channels=4, dims=2, **options):
    """A sequence of ``depth`` couplings, each stream of ``channels``."""
    torch.manual_seed(depth)
    body_options = {
        key: options.pop(key)
        for key in ("dropout", "momentum")
        if key in options
    }
    return ReversibleSequence(
        [
            AdditiveCoupling(
                body(channels, dims, **body_options),
                body(channels, dims, **body_options),
            )
            for _ in range(depth)
        ],
        **options,
    )


def stored(module):
    """A copy that stores its activations: plain autograd."""
    twin = copy.deepcopy(module)
    for part in twin.modules():
        if isinstance(part, ReversibleSequence):
            part.save_memory = False
    return twin


def gradients(module, x, *args, seed=1, autocast=None, **kwargs):
    """Output, gradients (input first) and final random state of a step."""
    torch.manual_seed(seed)
    x = x.detach().clone().requires_grad_()
    with torch.autocast(x.device.type, autocast, enabled=autocast is not None):
        y = module(x, *args, **kwargs)
    weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device)
    weight = weight.view_as(y)
    # Outside autocast, as SpeechBrain's Brain does.
    (y * weight).sum().backward()
    found = [x.grad, *(p.grad for p in module.parameters())]
    return y.detach(), found, torch.get_rng_state()


def relative_error(ours, reference):
    """||ours - reference|| / ||reference|| over lists of tensors."""
    ours, reference = (
        torch.cat([g.flatten().double() for g in gs if g is not None])
        for gs in (ours, reference)
    )
    assert ours.shape == reference.shape
    assert reference.norm() > 0
    return ((ours - reference).norm() / reference.norm()).item()


def assert_same_state(ours, reference):
    """Every entry of the two state_dicts is bit-equal."""
    ours, reference = ours.state_dict(), reference.state_dict()
    assert ours.keys() == reference.keys()
    for key in reference:
        assert torch.equal(ours[key], reference[key]), key


def saved_bytes(net, *args, **kwargs):
    """Bytes that autograd keeps, each storage once."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = (
            tensor.untyped_storage().nbytes()
        )
        return tensor

    known = {p.untyped_storage().data_ptr() for p in net.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = net(*args, **kwargs)
    kept = sum(n for p, n in storages.items() if p not in known)
    return kept, y


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


def coupling():
    return AdditiveCoupling(body(4), body(4))


def read(channels):
    """A tap that draws random numbers and counts batches."""
    conv = nn.Conv2d(channels, 5, 3, padding=1)
    return Tap(nn.Sequential(conv, nn.BatchNorm2d(5), nn.Dropout(0.2)))


def alive(kind):
    """Objects that nobody has freed, those of other tests among them."""
    gc.collect()
    return [o for o in gc.get_objects() if type(o) is kind]


def in_backward():
    return torch._C._current_graph_task_id() != -1


class Nondeterministic(nn.Module):
    """Not a random number that a generator could repeat."""

    calls = 0

    def forward(self, x):
        type(self).calls += 1
        return x * (1 + 0.1 * type(self).calls)


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
