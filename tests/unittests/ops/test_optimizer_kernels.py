"""Steps of 8-bit optimizers in one launch against their plain form.

Those that numba compiles are also compared bit by bit, in test_numba_steps.py.
"""

import copy

import pytest
import torch

from sb_memeff.ops.blocks_8bit import Quantized8bit
from sb_memeff.ops.triton.launch import watch_launches
from sb_memeff.optim import AdamW8bit, SGD8bit, one_launch
from tests.unittests.ops.kernel import DEVICE
from tests.unittests.optim.optimizers import (
    CLASSES,
    OPTIMIZERS,
    each_class,
    each_setting,
)

# Whole blocks, part of a block, one block, and one that stays in 32 bits.
SHAPES = [(8, 80), (301,), (256,), (3, 256), (7,)]
SMALLEST = 200


@pytest.fixture
def switch(monkeypatch):
    """A function that chooses the form of the steps that follow."""

    def choose(fused):
        package = "triton" if fused else None
        monkeypatch.setattr(
            one_launch, "package_of_kernels", lambda *tensors: package
        )

    return choose


def made(kind, params, **changed):
    """An optimizer that keeps in 8 bits all but the smallest."""
    return kind.make(params, min_8bit_size=SMALLEST, **changed)


def parameters(shapes=SHAPES):
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(s, device=DEVICE)) for s in shapes]


def unaligned():
    """Views of one tensor, at addresses that are no multiple of 16."""
    flat = torch.randn(3 * 603, device=DEVICE)
    return [
        torch.nn.Parameter(flat[1 + 603 * n : 603 * n + 602]) for n in range(3)
    ]


def step(optimizer, seed, of_block=None):
    """A step with random gradients, of another size in each block."""
    g = torch.Generator().manual_seed(seed)
    for group in optimizer.param_groups:
        for p in group["params"]:
            grad = torch.randn(p.shape, generator=g)
            grad *= 10 ** torch.empty(p.shape).uniform_(-3, 0, generator=g)
            p.grad = grad.to(DEVICE, p.dtype)
            if of_block is not None and p.numel() >= 512:
                p.grad.view(-1)[256:512] = of_block
    optimizer.step()


def launched(function):
    """The number of tensors of each launch of an optimizer's kernel."""
    found = []

    def watch(name, arguments):
        if name in ("_sgd", "_adam"):
            found.append(arguments["tensors"])

    with watch_launches(watch):
        function()
    return found


def states(optimizer):
    """The 8-bit states of all parameters."""
    return [
        value
        for p in optimizer.state
        for value in optimizer.state[p].values()
        if isinstance(value, Quantized8bit)
    ]


# The contract has a step with other alignments for all settings.
@pytest.mark.parametrize(
    "kind, make",
    [
        *((kind, parameters) for kind in OPTIMIZERS.values()),
        *((kind, unaligned) for kind in CLASSES.values()),
    ],
    ids=[*OPTIMIZERS, *(f"{cls.__name__}-unaligned" for cls in CLASSES)],
)
def test_as_the_plain_step(switch, kind, make):
    ours = make()
    theirs = copy.deepcopy(ours)
    fused, plain = (made(kind, params) for params in (ours, theirs))
    for number in range(4):
        switch(True)
        step(fused, number, of_block=0.0)
        switch(False)
        step(plain, number, of_block=0.0)
    # A value in the middle between two codes may fall to either side.
    for p, q in zip(ours, theirs):
        differ = (p - q).abs() > 1e-6 + 1e-5 * q.abs()
        assert differ.sum() <= 0.005 * p.numel()
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)
    pairs = list(zip(states(fused), states(plain), strict=True))
    assert pairs
    for a, b in pairs:
        torch.testing.assert_close(a.scales, b.scales, rtol=1e-4, atol=0)
        differ = (a.codes.int() - b.codes.int()).abs()
        assert differ.max() <= 1 and differ.sum() <= 0.005 * a.codes.numel()


@each_setting
def test_settings_that_are_changed_are_those_of_the_plain_step(switch, kind):
    """A scheduler changes those of a group; the class's stay as they were."""
    found = []
    for fused in (True, False):
        params = parameters()
        optimizer = made(CLASSES[kind.ours], params, lr=0.02, weight_decay=0.3)
        switch(False)
        step(optimizer, 0)
        settings = made(kind, params).defaults
        optimizer.param_groups[0].update(settings)
        step(optimizer, 1)
        before = [p.detach().clone() for p in params]
        switch(fused)
        step(optimizer, 2)
        found.append([p - q for p, q in zip(params, before)])
    for p, q in zip(*found):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)


def test_each_device_has_a_launch_of_its_own(switch):
    switch(True)
    here = parameters([(64, 80), (8, 80)])
    (there,) = (torch.nn.Parameter(p.detach().to("meta")) for p in here[:1])
    params = [here[0], there, here[1]]
    optimizer = made(CLASSES[SGD8bit], params)
    for p in params:
        p.grad = torch.zeros_like(p)
        codes = torch.zeros_like(p, dtype=torch.uint8)
        scales = torch.zeros(len(codes.view(-1)[::256]), device=p.device)
        state = {"momentum_buffer": Quantized8bit(codes, scales)}
        optimizer.state[p] = state
    group = optimizer.param_groups[0]
    launches, others = optimizer._planned(0, group, params, None)
    assert [[id(p) for p in one.params] for one in launches] == [
        [id(p) for p in here],
        [id(there)],
    ]
    assert others == []
    # The next step uses the same ones.
    plan = optimizer._plans[0]
    again, _ = optimizer._planned(0, group, params, plan)
    assert again is launches


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's
@pytest.mark.parametrize(
    "kind, bad",
    [
        *((kind, torch.nan) for kind in OPTIMIZERS.values()),
        *((kind, torch.inf) for kind in CLASSES.values()),
    ],
    ids=[*OPTIMIZERS, *(f"{cls.__name__}-inf" for cls in CLASSES)],
)
def test_what_is_not_finite_stays_in_its_block(switch, kind, bad):
    found = []
    for fused in (True, False):
        switch(fused)
        params = parameters([(601,)])
        optimizer = made(kind, params)
        for number, value in enumerate((None, bad, None)):
            step(optimizer, number, of_block=value)
        found.append(
            [params[0].isfinite()]
            + [state.scales.isfinite() for state in states(optimizer)]
        )
        assert found[-1][0].sum() == 601 - 256
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "kind",
    [OPTIMIZERS["Adam-amsgrad"], OPTIMIZERS["AdamW-eps"]],
    ids=["amsgrad", "AdamW"],
)
def test_an_infinite_second_moment_restarts(switch, kind):
    """In 8 bits. In 32 bits it is torch's."""
    found = []
    for fused in (True, False):
        switch(fused)
        params = parameters([(601,), (100,)])
        optimizer = made(kind, params)
        for number in range(5):
            for p in params:
                p.grad = torch.full_like(p, 0.1 * number + 0.1)
                if number == 2:
                    p.grad[5] = 1e30
            optimizer.step()
        assert all(state.scales.isfinite().all() for state in states(optimizer))
        found.append([*params, optimizer.state[params[1]]["exp_avg_sq"]])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


@each_class
def test_one_launch_for_all_parameters(switch, kind):
    """Those with states in 32 bits included."""
    switch(True)
    optimizer = made(kind, parameters())
    # The first step makes the states.
    assert launched(lambda: step(optimizer, 0)) == []
    assert launched(lambda: step(optimizer, 1)) == [len(SHAPES)]


@each_class
def test_what_the_kernel_cannot_do_is_plain(switch, kind):
    switch(True)
    weight = torch.randn(80, 64, device=DEVICE)
    params = [
        torch.nn.Parameter(x)
        for x in (weight.bfloat16(), weight.T, weight.double())
    ]
    optimizer = made(kind, params)
    for _ in range(2):
        for p in params:
            p.grad = torch.ones_like(p)
        assert launched(optimizer.step) == []
    # A gradient's own strides are another matter.
    p = torch.nn.Parameter(weight.clone())
    optimizer = made(kind, [p])
    for _ in range(2):
        p.grad = torch.ones(64, 80, device=DEVICE).T
        assert launched(optimizer.step) == []


@each_class
def test_autograd_sees_the_update(switch, kind):
    switch(True)
    (p,) = parameters([(64, 80)])
    optimizer = made(kind, [p])
    step(optimizer, 0)
    x = torch.ones(3, 64, device=DEVICE, requires_grad=True)
    loss = (x @ p).sum()
    step(optimizer, 1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@each_class
def test_a_saved_state_stays_as_it_is(switch, kind):
    switch(True)
    params = parameters()
    optimizer = made(kind, params)
    for number in range(2):
        step(optimizer, number)
    saved = optimizer.state_dict()
    weights = [p.detach().clone() for p in params]
    step(optimizer, 2)
    after = [p.detach().clone() for p in params]
    # A new optimizer that loads it goes the same way, and leaves it alone.
    for _ in range(2):
        again = [torch.nn.Parameter(w.clone()) for w in weights]
        loaded = made(kind, again)
        loaded.load_state_dict(saved)
        step(loaded, 2)
        for p, q in zip(again, after):
            assert torch.equal(p, q)


@each_class
def test_infinite_weights_without_weight_decay(switch, kind):
    """A mask of -inf, which gets no gradient, stays where it is."""
    for fused in (True, False):
        switch(fused)
        (p,) = parameters([(64, 80)])
        p.data[0, 3] = -torch.inf
        optimizer = made(kind, [p], weight_decay=0.0)
        for number in range(3):
            step(optimizer, number)
        assert p[0, 3] == -torch.inf
        assert p.isfinite().sum() == p.numel() - 1


def test_settings_that_are_tensors_are_plain(switch):
    betas = torch.tensor(0.9), torch.tensor(0.99)
    found = []
    for fused, settings in ((True, betas), (False, (0.9, 0.99))):
        switch(fused)
        params = parameters()
        optimizer = made(
            CLASSES[AdamW8bit], params, betas=settings, foreach=False
        )
        for number in range(3):
            step(optimizer, number)
        found.append(params)
    for p, q in zip(*found):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group")
def test_a_parameter_that_is_listed_twice(switch):
    found = []
    for fused in (True, False):
        switch(fused)
        (p,) = parameters([(64, 80)])
        optimizer = made(CLASSES[SGD8bit], [p, p])
        for number in range(3):
            step(optimizer, number)
        found.append(p)
    assert (found[0] - found[1]).abs().max() < 0.1
    assert found[0].isfinite().all()


def test_a_double_leaves_the_others_their_launch(switch):
    switch(True)
    params = parameters([(64, 80), (8, 80)])
    params.append(torch.nn.Parameter(params[0].detach().double()))
    optimizer = made(CLASSES[SGD8bit], params)
    step(optimizer, 0)
    assert launched(lambda: step(optimizer, 1)) == [2]
