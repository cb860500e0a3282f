"""One launch for all parameters of a group: never with a table that is stale.

Without a GPU Triton's kernels run in its interpreter, and numba's are tested too.

Authors
 * The sb_memeff authors 2026
"""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from triton.runtime import interpreter

from sb_memeff.ops.blocks_8bit import Quantized8bit
from sb_memeff.ops.numba import table as numba_table
from sb_memeff.ops.triton import table as triton_table
from sb_memeff.optim import Adam8bit, SGD8bit, one_launch
from tests.unittests.ops.kernel import DEVICE
from tests.unittests.optim.optimizers import CLASSES, OPTIMIZERS

# Some have states in 8 bits, some in 32.
SHAPES = [(16, 20), (7,), (300,)]
SMALLEST = 200
TABLES = {"triton": triton_table, "numba": numba_table}
# On a CPU torch's own function updates parameters with states in 32 bits.
TENSORS = {"triton": 3, "numba": 2}
# AdamW8bit's code is Adam8bit's.
each_kind = pytest.mark.parametrize(
    "kind", [CLASSES[SGD8bit], CLASSES[Adam8bit]], ids=["SGD8bit", "Adam8bit"]
)


@pytest.fixture(
    autouse=True, params=["triton"] if DEVICE == "cuda" else ["triton", "numba"]
)
def package(request):
    """Who compiles the kernels."""
    return request.param


@pytest.fixture(autouse=True)
def fused(monkeypatch, package):
    """All steps run as kernels; returns a function that changes it."""

    def choose(value):
        monkeypatch.setattr(
            one_launch,
            "package_of_kernels",
            lambda *tensors: package if value else None,
        )

    choose(True)
    return choose


def build(kind, groups=1, **changed):
    """An optimizer that has a table, and its parameters."""
    torch.manual_seed(0)
    params = [
        nn.Parameter(torch.randn(shape, device=DEVICE))
        for _ in range(groups)
        for shape in SHAPES
    ]
    count = len(SHAPES)
    optimizer = kind.make(
        [
            {"params": params[n : n + count]}
            for n in range(0, len(params), count)
        ],
        min_8bit_size=SMALLEST,
        **changed,
    )
    for number in range(2):
        step(optimizer, number)
    return optimizer, params


def twins(kind, **changed):
    """Two optimizers that are the same, each with its parameters."""
    optimizer, params = build(kind, **changed)
    other = copy.deepcopy(optimizer)
    groups = other.param_groups
    return optimizer, params, other, [p for g in groups for p in g["params"]]


def step(optimizer, seed, change_gradients=lambda params: None):
    """A step with random gradients."""
    g = torch.Generator().manual_seed(seed)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for p in params:
        p.grad = torch.randn(p.shape, generator=g).to(p)
    change_gradients(params)
    optimizer.step()


def saved(optimizer):
    """Weights and states, bit for bit."""
    found = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            found.append(p.detach())
            for value in optimizer.state[p].values():
                if isinstance(value, Quantized8bit):
                    found += [value.codes, value.scales]
                else:
                    found.append(value)
    return found


def assert_same(optimizer, other):
    for x, y in zip(saved(optimizer), saved(other), strict=True):
        assert torch.equal(x, y)


@pytest.fixture
def tables(monkeypatch, package):
    """The number of tensors in each table that was built."""
    built = []
    cls = TABLES[package].Table
    init = cls.__init__

    def counted(self, rows):
        built.append(len(rows[0]))
        init(self, rows)

    monkeypatch.setattr(cls, "__init__", counted)
    return built


@pytest.fixture
def launches(monkeypatch, package):
    """The number of tensors of each launch."""
    found = []
    cls = TABLES[package].Table
    launch = cls.launch

    def counted(self, *args, **kwargs):
        found.append(self._numbers.shape[1])
        launch(self, *args, **kwargs)

    monkeypatch.setattr(cls, "launch", counted)
    return found


@each_kind
def test_the_table_is_built_once(tables, package, kind):
    optimizer, params = build(kind)
    count = [TENSORS[package]]
    # Those of Codebook.quantize, of one tensor each, need a GPU.
    assert tables == count
    for number in range(3, 6):
        optimizer.param_groups[0]["lr"] *= 0.5
        step(optimizer, number)
    assert tables == count
    params[0].data = params[0].data.clone()
    step(optimizer, 6)
    assert tables == 2 * count


def replace_8bit_state(optimizer, params):
    for name, value in optimizer.state[params[0]].items():
        if isinstance(value, Quantized8bit):
            optimizer.state[params[0]][name] = Quantized8bit(
                value.codes.clone(), 3 * value.scales
            )


def replace_32bit_state(optimizer, params):
    for name in optimizer.signed.keys() & optimizer.state[params[1]].keys():
        optimizer.state[params[1]][name] = 3 * optimizer.state[params[1]][name]


def replace_all_states(optimizer, params):
    other, _ = build(CLASSES[type(optimizer)], lr=0.1)
    for p, q in zip(params, other.param_groups[0]["params"]):
        optimizer.state[p] = other.state[q]


def move_state(optimizer, params):
    for p in params[:2]:
        for name in optimizer.signed.keys() & optimizer.state[p].keys():
            x = optimizer.state[p][name]
            x = x.scales if isinstance(x, Quantized8bit) else x
            x.data = 3 * x.data


def count_steps_again(optimizer, params):
    if "step" in optimizer.state[params[0]]:
        optimizer.state[params[0]]["step"] = torch.tensor(1.0)
        optimizer.state[params[1]]["step"].fill_(1.0)


def move_counter(optimizer, params):
    if "step" in optimizer.state[params[2]]:
        optimizer.state[params[2]]["step"].data = torch.tensor(1.0)


def narrow_state(optimizer, params):
    """At the same address."""
    for name in optimizer.signed.keys() & optimizer.state[params[1]].keys():
        x = optimizer.state[params[1]][name]
        x.data = x.data.view(torch.bfloat16)[: x.numel()].fill_(0.5)


def load(optimizer, params):
    other, _ = build(CLASSES[type(optimizer)], lr=0.1)
    optimizer.load_state_dict(other.state_dict())


def move(optimizer, params):
    for p in params[1:3]:
        p.data = p.data + 1


def transpose(optimizer, params):
    """At the same address."""
    params[0].data = params[0].data.view(20, 16).T


def to_half(optimizer, params):
    for p in params[:2]:
        p.data = p.data.to(torch.bfloat16)


def add_parameter(optimizer, params):
    optimizer.add_param_group({"params": [nn.Parameter(params[0].data + 1)]})


def extend_a_group(optimizer, params):
    optimizer.param_groups[0]["params"].append(nn.Parameter(params[0].data))


def reorder(optimizer, params):
    optimizer.param_groups[0]["params"].reverse()


def mark_32bit(optimizer, params):
    params[0].optim_bits = 32


def options(**changed):
    def change(optimizer, params):
        optimizer.param_groups[0].update(
            {
                name: value
                for name, value in changed.items()
                if name in optimizer.defaults
            }
        )

    change.__name__ = "-".join(changed)
    return change


CHANGES = [
    replace_8bit_state,
    replace_32bit_state,
    replace_all_states,
    move_state,
    count_steps_again,
    move_counter,
    narrow_state,
    load,
    move,
    transpose,
    to_half,
    add_parameter,
    extend_a_group,
    reorder,
    mark_32bit,
    options(min_8bit_size=310),
    options(min_8bit_size=5),
    options(lr=0.3, weight_decay=0.7),
    options(lr=torch.tensor(0.3)),
    options(momentum=0.5, betas=(0.3, 0.4)),
    options(momentum=0.0, nesterov=False),
    options(amsgrad=True),
    options(maximize=True),
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__)
@each_kind
def test_no_change_meets_a_stale_table(kind, change):
    """The same as with tables that are built for each step."""
    optimizer, params, fresh, others = twins(kind)
    change(optimizer, params)
    change(fresh, others)
    before = [p.detach().clone() for p in params]
    for number in range(3, 5):
        step(optimizer, number)
        fresh._plans.clear()
        step(fresh, number)
    assert_same(optimizer, fresh)
    assert not any(map(torch.equal, params, before))


def without(*numbers):
    def change(params):
        for number in numbers:
            params[number].grad = None

    return change


def transposed(params):
    params[0].grad = params[0].grad.T.contiguous().T


def shared(params):
    """Two parameters, one gradient."""
    params[2].grad = params[0].grad.view(-1)[:300]


@pytest.mark.parametrize(
    "change", [without(0), without(1, 2), transposed, shared]
)
@each_kind
def test_gradients_of_one_step(kind, change):
    optimizer, params, fresh, others = twins(kind)
    for number, which in enumerate((change, lambda p: None, change), 3):
        before = [p.detach().clone() for p in params]
        step(optimizer, number, which)
        same = [torch.equal(p, q) for p, q in zip(params, before)]
        assert same == [p.grad is None for p in params]
        fresh._plans.clear()
        step(fresh, number, which)
    assert_same(optimizer, fresh)


@each_kind
def test_gradients_in_the_same_and_in_other_memory(kind):
    """As zero_grad leaves them, with and without set_to_none."""
    optimizer, params, fresh, others = twins(kind)
    buffers = [p.grad for p in params]
    for number in range(3, 5):
        g = torch.Generator().manual_seed(number)
        for p, q, buffer in zip(params, others, buffers):
            q.grad = torch.randn(p.shape, generator=g).to(p)
            p.grad = buffer.copy_(q.grad) if number % 2 else q.grad.clone()
        optimizer.step()
        fresh._plans.clear()
        fresh.step()
    assert_same(optimizer, fresh)


@each_kind
def test_two_groups_have_a_launch_each(tables, launches, package, kind):
    optimizer, params, fresh, _ = twins(kind, groups=2)
    for some in (optimizer, fresh):
        some.param_groups[1].update(lr=0.2, weight_decay=0.3)
    for number in range(3, 5):
        launches.clear()
        step(optimizer, number)
        assert launches == [TENSORS[package]] * 2
        fresh._plans.clear()
        step(fresh, number)
    # Those of two groups; and of two groups in each step.
    assert len(tables) == 2 + 2 * 2
    assert_same(optimizer, fresh)
    # Groups that change places take their tables along, or build others.
    for some in (optimizer, fresh):
        some.param_groups.reverse()
    fresh._plans.clear()
    for some in (optimizer, fresh):
        step(some, 6)
    assert_same(optimizer, fresh)


@each_kind
def test_gradients_of_another_shape_are_not_read(kind):
    """As many values as the parameter's, or fewer: a kernel would not notice."""
    for shape in ((20, 16), (4, 20)):
        optimizer, params = build(kind)
        before = params[0].detach().clone()

        def change(params, shape=shape):
            params[0].grad.data = torch.ones(shape, device=DEVICE)

        with pytest.raises(RuntimeError):
            step(optimizer, 3, change)
        assert torch.equal(params[0], before)


@each_kind
def test_plain_steps_in_between(fused, kind):
    """The kernels are switched off and on again."""
    optimizer, _, fresh, _ = twins(kind)
    for number, value in enumerate((True, False, True, True), 3):
        fused(value)
        step(optimizer, number)
        fresh._plans.clear()
        step(fresh, number)
    assert_same(optimizer, fresh)


@each_kind
def test_copies_have_tables_of_their_own(kind):
    optimizer, _ = build(kind)
    others = [
        copy.deepcopy(optimizer),
        pickle.loads(pickle.dumps(optimizer)),
    ]
    before = [x.clone() for x in saved(optimizer)]
    for other in others:
        step(other, 3)
    for x, y in zip(saved(optimizer), before, strict=True):
        assert torch.equal(x, y)
    step(optimizer, 3)
    for other in others:
        assert_same(optimizer, other)


@pytest.fixture
def exact_fma(monkeypatch):
    """The interpreter rounds twice where a GPU rounds once."""
    if DEVICE != "cpu":
        return

    def fma(self, x, y, z):
        wide = (np.float64(a.data) for a in (x, y, z))
        a, b, c = wide
        return interpreter.TensorHandle(
            (a * b + c).astype(z.data.dtype), z.dtype.scalar
        )

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fma", fma)


# In units of the last place of the largest operand. torch's Adam rounds at other
# places on a CPU than on a GPU, and the kernel as on a GPU.
ULPS = {torch.optim.SGD: 0, torch.optim.Adam: 3, torch.optim.AdamW: 3}


@pytest.mark.parametrize("kind", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_states_in_32_bits_are_torchs(exact_fma, kind):
    """SGD's bit for bit. Each step starts from the same states."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(n, device=DEVICE)) for n in (7, 1000)]
    others = copy.deepcopy(params)
    optimizer, theirs = kind.make(params), kind.make_torchs(others)
    for _ in range(4):
        before = [p.detach().clone() for p in params]
        for p, q in zip(params, others):
            sizes = 10 ** torch.empty_like(p).uniform_(-3, 0)
            p.grad = torch.randn_like(p) * sizes
            q.grad = p.grad.clone()
        optimizer.step()
        theirs.step()
        for p, q, old in zip(params, others, before):
            pairs = [(p, q, torch.maximum(q.abs(), old.abs()))]
            for name in optimizer.signed.keys() & theirs.state[q].keys():
                x, y = optimizer.state[p][name], theirs.state[q][name]
                pairs.append((x, y, y.abs()))
            for x, y, size in pairs:
                ulp = torch.finfo(torch.float32).eps * size
                assert ((x - y).abs() <= ULPS[kind.torchs] * ulp).all()
                x.data.copy_(y)


def test_counters_are_saved_and_loaded_one_by_one():
    """Though they are parts of one tensor."""
    optimizer, params = build(CLASSES[Adam8bit])
    steps = [s["step"] for s in optimizer.state_dict()["state"].values()]
    assert [float(x) for x in steps] == [2.0] * len(SHAPES)
    assert all(x.untyped_storage().nbytes() == 4 for x in steps)
