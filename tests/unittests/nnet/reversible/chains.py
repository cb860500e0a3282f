"""Chains and comparisons that the engine's tests share."""

import copy

import torch
from torch import nn

from sb_memeff.nnet.reversible import AdditiveCoupling, ReversibleSequence


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
