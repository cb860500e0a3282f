"""Steps of 8-bit optimizers that numba compiles against their plain form.

The same bits: in SGD of all, in Adam of the states. torch's square root on a CPU
(MKL's) is not always the nearest number, which moves Adam's parameters in the last
bit. With the nearest one they are the same, too.

Authors
 * The sb_memeff authors 2026
"""

import os
import signal

import pytest
import torch
from torch import nn

from sb_memeff.ops.blocks_8bit import Quantized8bit
from sb_memeff.ops.numba import table
from sb_memeff.optim import one_launch, optimizer_8bit
from tests.unittests.optim.optimizers import OPTIMIZERS, each_class

# Whole blocks, parts of a block, and states in 32 bits.
SIZES = [20 * 256, 4109, 301, 37, 7]
SMALLEST = 200


@pytest.fixture(autouse=True)
def switch(monkeypatch):
    """A function that chooses the form of the steps that follow."""
    # The plain form unpacks parts of a parameter.
    monkeypatch.setattr(optimizer_8bit, "CPU_CHUNK", 1024)

    def choose(compiled):
        package = "numba" if compiled else None
        monkeypatch.setattr(
            one_launch, "package_of_kernels", lambda *tensors: package
        )

    choose(True)
    return choose


@pytest.fixture
def exact_roots(monkeypatch):
    """torch's square roots are rounded to the nearest number."""

    def sqrt(x):
        return torch.pow(x.double(), 0.5).to(x.dtype)

    monkeypatch.setattr(torch.Tensor, "sqrt", sqrt)
    monkeypatch.setattr(torch.Tensor, "sqrt_", lambda x: x.copy_(sqrt(x)))


@pytest.fixture
def threads(monkeypatch):
    """A function that chooses how many threads share even the smallest work."""
    before = torch.get_num_threads()
    monkeypatch.setattr(table, "MIN_BLOCKS_PER_THREAD", 1)
    yield torch.set_num_threads
    torch.set_num_threads(before)


def build(kind, **changed):
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(n)) for n in SIZES]
    return kind.make(params, min_8bit_size=SMALLEST, **changed), params


def gradients(params, seed, special):
    """Of many orders of magnitude; with blocks that are special."""
    g = torch.Generator().manual_seed(seed)
    for p in params:
        sizes = 10 ** torch.empty(p.shape).uniform_(-12, 0, generator=g)
        p.grad = torch.randn(p.shape, generator=g) * sizes
        if special and p.numel() > 1000:
            p.grad[256:512] = 0
            p.grad[600] = -100.0
            if seed == 2:
                p.grad[768] = torch.nan
                p.grad[1024] = torch.inf
                # Its square is infinite.
                p.grad[1280] = 1e30


def saved(optimizer, params):
    """Weights, and states by name."""
    weights, states = [p.detach() for p in params], []
    for p in params:
        for value in optimizer.state[p].values():
            if isinstance(value, Quantized8bit):
                states += [value.codes, value.scales]
            else:
                states.append(value)
    return weights, states


def same(x, y):
    """The same bits, or NaN."""
    return torch.equal(x, y) or (
        torch.equal(x.nan_to_num(0.123), y.nan_to_num(0.123))
        and torch.equal(x.isnan(), y.isnan())
    )


def both(switch, kind, steps=5, special=True, **changed):
    """Weights and states of both forms."""
    found = []
    for compiled in (True, False):
        optimizer, params = build(kind, **changed)
        switch(compiled)
        for number in range(steps):
            gradients(params, number, special)
            optimizer.step()
        found.append(saved(optimizer, params))
    return found


@pytest.mark.parametrize("kind", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_the_same_bits(switch, exact_roots, kind):
    # torch's other functions have other roots, or round elsewhere.
    (weights, states), (plain_weights, plain_states) = both(
        switch, kind, foreach=False, fused=False
    )
    for ours, theirs in zip(states, plain_states, strict=True):
        assert same(ours, theirs)
    for ours, theirs in zip(weights, plain_weights, strict=True):
        assert same(ours, theirs)
    assert not weights[0].isfinite().all()


@pytest.mark.parametrize("option", [{}, {"foreach": True}, {"fused": True}])
@each_class
def test_weights_differ_in_the_last_bits(switch, kind, option):
    (weights, _), (plain, _) = both(
        switch, kind, steps=2, special=False, **option
    )
    for ours, theirs in zip(weights, plain):
        # As large as the update.
        rate = kind.options["lr"]
        torch.testing.assert_close(ours, theirs, rtol=3e-7, atol=1e-6 * rate)


@each_class
def test_threads_share_the_blocks(switch, threads, kind):
    found = []
    for number in (1, 2, 3, 40):
        threads(number)
        optimizer, params = build(kind)
        for seed in range(3):
            gradients(params, seed, special=True)
            optimizer.step()
        found.append(saved(optimizer, params))
    for weights, states in found[1:]:
        for x, y in zip(weights + states, found[0][0] + found[0][1]):
            assert same(x, y)


@each_class
def test_denormal_numbers_are_flushed_where_torch_flushes(
    switch, threads, kind
):
    if not torch.set_flush_denormal(True):
        pytest.skip("not on this CPU")
    threads(2)
    try:
        ends = []
        for flushes in (True, False):
            torch.set_flush_denormal(flushes)
            optimizer, params = build(kind, weight_decay=0)
            for p in params:
                p.data.zero_()
            for _ in range(3):
                for p in params:
                    p.grad = torch.full_like(p, 1e-39)
                optimizer.step()
            ends.append(saved(optimizer, params))
    finally:
        torch.set_flush_denormal(False)
    (flushed, _), (exact, _) = ends
    for x, y in zip(flushed, exact):
        # In the blocks of all threads.
        assert (x == 0).all() and (y != 0).all()


@each_class
def test_steps_in_a_forked_process(switch, threads, kind):
    """After steps in threads of its parent."""
    threads(2)
    optimizer, params = build(kind)
    for seed in range(3):
        gradients(params, seed, special=False)
        if seed == 2:
            child = os.fork()
            if not child:
                signal.alarm(60)
                optimizer.step()
                os._exit(0)
            _, status = os.waitpid(child, 0)
            assert status == 0
        optimizer.step()


@each_class
def test_other_parameters_are_plain(kind):
    """Those in half precision, and gradients with other strides."""
    torch.manual_seed(0)
    params = [
        nn.Parameter(x)
        for x in (
            torch.randn(80, 64).bfloat16(),
            torch.randn(64, 80).T,
            torch.randn(8, 80),
        )
    ]
    optimizer = kind.make(params, min_8bit_size=SMALLEST)
    for _ in range(2):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    (one,) = optimizer._plans[0].launches
    assert [id(p) for p in one.params] == [id(params[2])]
