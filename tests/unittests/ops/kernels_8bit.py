"""Kernels of tensors in 8 bits, and of the optimizers that have such states.

Authors
 * The sb_memeff authors 2026
"""

from unittest import mock

import torch
from torch import nn

from sb_memeff.ops.blocks_8bit import BLOCK, VALUES, Codebook, Quantized8bit
from sb_memeff.ops.triton import blocks_8bit
from sb_memeff.optim import one_launch
from sb_memeff.optim.one_launch import OneLaunch
from tests.unittests.ops.kernel import DEVICE, Kernel, fp32
from tests.unittests.optim.optimizers import (
    OPTIMIZERS,
    moved_by_rounding,
)


def _many_sizes(g, dtype, size):
    """Of many orders of magnitude; and blocks that are special."""
    sizes = 10 ** torch.empty(size).uniform_(-9, 0, generator=g)
    x = torch.randn(size, generator=g) * sizes
    x[256:512] = 0
    x[512:768] = torch.nan
    x[768:769] = torch.inf
    # On the middles between two codes, where the lower one is taken.
    for block, signed in enumerate((True, False), 4):
        values = torch.tensor(VALUES[signed])
        ties = torch.cat([(values[1:] + values[:-1]) / 2, torch.ones(1)])
        part = x[256 * block : 256 * (block + 1)]
        part.copy_(ties[: len(part)])
    return (x.to(dtype),)


def _comparable(codes, scales):
    """Of what is not finite any code will do: its maximum is not either."""
    finite = scales.isfinite().repeat_interleave(BLOCK)[: len(codes)]
    return [codes * finite, scales]


def _quantize_plain(x, signed):
    packed = Codebook(signed, x.device).quantize(x if signed else x.abs())
    return _comparable(packed.codes, packed.scales)


def _quantize_fused(x, signed):
    middles = Codebook(signed, x.device).middles
    packed = Quantized8bit.empty_like(x)
    pair = packed.codes, packed.scales
    blocks_8bit.quantize(x if signed else x.abs(), *pair, middles, signed)
    return _comparable(*pair)


QUANTIZE = Kernel(
    _quantize_fused,
    _quantize_plain,
    _many_sizes,
    [(1,), (256,), (3001,)],
    fp32(0),
    [{"signed": True}, {"signed": False}],
)


# Smaller parameters have states in 32 bits.
SMALLEST = 200


def _in_8bit(g, dtype, *sizes):
    """Parameters, gradients, and codes and scales of three moments."""
    found = [
        [torch.randn(n, generator=g).to(dtype) for n in sizes] for _ in range(5)
    ]
    params, grads, *moments = found
    packed = []
    for number, states in enumerate(moments):
        signed = number == 0
        codebook = Codebook(signed, torch.device("cpu"))
        states = [codebook.quantize(x if signed else x**2) for x in states]
        packed += [x.codes for x in states], [x.scales for x in states]
    return params, grads, *packed


def _moments(optimizer):
    """Names of the states in 8 bits."""
    (group,) = optimizer.param_groups
    return [x for x in optimizer._names(group) if x in optimizer.signed]


def _resumed(kind, settings, params, grads, *packed):
    """Our optimizer, which has done a step and has these states."""
    params = [nn.Parameter(p.clone()) for p in params]
    optimizer = kind.ours(params, min_8bit_size=SMALLEST, **settings)
    for number, p in enumerate(params):
        p.grad = grads[number]
        state = optimizer.state[p]
        if "step" in optimizer.states:
            where = DEVICE if settings.get("fused") else "cpu"
            state["step"] = torch.ones((), device=where)
        pairs = zip(packed[::2], packed[1::2])
        for name, pair in zip(_moments(optimizer), pairs):
            value = Quantized8bit(*(x[number].clone() for x in pair))
            if p.numel() < SMALLEST:
                value = _values(optimizer, name, value).to(p)
            state[name] = value
    return optimizer, params


def _values(optimizer, name, packed):
    """In float64."""
    values = torch.tensor(VALUES[optimizer.signed[name]]).to(packed.scales)
    scale = packed.scales.double().repeat_interleave(BLOCK)
    codes = packed.codes.long()
    return values[codes].double() * scale[: codes.numel()]


def _rounded(states):
    """What is compared of states: scales of those in 8 bits."""
    return [x.scales if isinstance(x, Quantized8bit) else x for x in states]


def step_of(kind):
    """The kernel of an optimizer's step, of all parameters in one launch.

    It returns parameters, states in 32 bits, and scales of those in 8 bits:
    whether the codes are right, QUANTIZE and the tests of several steps say.
    """

    def fused(*inputs, **settings):
        optimizer, params = _resumed(kind, settings, *inputs)
        names = _moments(optimizer)
        # On a CPU too.
        with mock.patch.object(
            one_launch, "package_of_kernels", return_value="triton"
        ):
            one = OneLaunch(params, optimizer.state, names)
        optimizer._update_fused(optimizer.param_groups[0], one)
        states = [optimizer.state[p][n] for n in names for p in params]
        return [*(p.detach() for p in params), *_rounded(states)]

    def plain(*inputs, **settings):
        """torch's step from the same states."""
        optimizer, params = _resumed(kind, settings, *inputs)
        theirs = kind.torchs(params, **{**settings, "fused": None})
        names = _moments(optimizer)
        for p in params:
            state = theirs.state[p]
            if "step" in optimizer.state[p]:
                state["step"] = torch.ones(())
            for name in names:
                value = optimizer.state[p][name]
                if isinstance(value, Quantized8bit):
                    value = _values(optimizer, name, value)
                state[name] = value.to(p)
        theirs.step()
        states = [
            theirs.state[p][n]
            if p.numel() < SMALLEST
            else torch.stack(
                [x[x.abs().argmax()] for x in theirs.state[p][n].split(BLOCK)]
            )
            for n in names
            for p in params
        ]
        first = optimizer.bitsandbytes[0]
        codebook = optimizer._codebook(first, params[0].device)
        for p in params:
            if p.numel() >= SMALLEST:
                packed = codebook.quantize(theirs.state[p][first])
                optimizer.state[p][first] = packed
        moved = [
            moved_by_rounding(optimizer, p, theirs, p).to(p) for p in params
        ]
        return [*moved, *states]

    def dispatched(*inputs, **settings):
        optimizer, _ = _resumed(kind, settings, *inputs)
        optimizer.step()

    return Kernel(
        fused,
        plain,
        _in_8bit,
        # Whole blocks, whose addresses are aligned, and parts of blocks; and
        # one with states in 32 bits.
        [(512, 256, 128), (301, 7, 256)],
        fp32(2e-6),
        [k.options for k in OPTIMIZERS.values() if k.ours is kind.ours],
        dispatched,
    )
