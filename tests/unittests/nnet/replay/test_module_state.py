"""Changes of modules are noticed, repeated and forgotten."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sb_memeff.nnet.replay.module_state import (
    ModuleState,
    modules_of,
    without_trace,
)


class Stateful(nn.Module):
    """Holds all that a module may change, and changes it by ``act``."""

    def __init__(self, act):
        super().__init__()
        self.act = act
        self.count = 0
        self.history = [1]
        self.cache = {"a": 1, "z": 1}
        self.seen = {1}
        self.table = torch.ones(2)
        self.register_buffer("total", torch.ones(2))
        self.register_buffer("lazy", None)

    def forward(self):
        self.act(self)


def replace(module, name, value):
    setattr(module, name, value)


ACTS = {
    "count": lambda m: replace(m, "count", m.count + 1),
    "history": lambda m: m.history.append(2),
    "history_replaced": lambda m: replace(m, "history", [*m.history, 2]),
    "history_same_length": lambda m: m.history.__setitem__(0, 3),
    "cache": lambda m: m.cache.update(b=2),
    "cache_value": lambda m: m.cache.update(a=2),
    "cache_key": lambda m: m.cache.update(b=m.cache.pop("a")),
    "cache_order": lambda m: m.cache.update(a=m.cache.pop("a")),
    "seen": lambda m: m.seen.add(2),
    "table_replaced": lambda m: replace(m, "table", m.table + 1),
    "total": lambda m: m.total.add_(1),
    "total_replaced": lambda m: replace(m, "total", m.total + 1),
    "total_deleted": lambda m: delattr(m, "total"),
    "lazy": lambda m: replace(m, "lazy", torch.zeros(2)),
    "new_attribute": lambda m: replace(m, "new", 1),
    "new_buffer": lambda m: m.register_buffer("new", torch.ones(2)),
    "deleted": lambda m: delattr(m, "count"),
}


def contents(module):
    """All of its state, by value."""
    found = {n: v for n, v in vars(module).items() if not n.startswith("_")}
    found |= module._buffers
    return {
        name: value.tolist() if isinstance(value, torch.Tensor) else str(value)
        for name, value in found.items()
    }


@pytest.mark.parametrize("act", ACTS)
def test_a_change_is_undone_inside_and_stands_outside(act):
    module = Stateful(ACTS[act])
    before = contents(module)
    state = ModuleState(module)
    module()
    changes = state.changes()
    after = contents(module)
    assert before != after
    assert len(changes.buffers) + len(changes.attributes) in (1, 2)
    identities = {n: id(v) for n, v in vars(module).items()}
    buffers = dict(module._buffers)
    for _ in range(2):  # a second backward finds the same
        with without_trace(module, changes):
            assert contents(module) == before
            module()
            assert contents(module) == after
        assert contents(module) == after
    # Others may hold these very objects.
    assert {n: id(v) for n, v in vars(module).items()} == identities
    assert module._buffers.keys() == buffers.keys()
    assert all(module._buffers[n] is b for n, b in buffers.items())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("act", ACTS)
def test_an_unrecorded_call_has_no_side_effects(act, training):
    """As in the inverse of a chain. A module may count in eval mode too."""
    module = Stateful(ACTS[act]).train(training)
    before = contents(module)
    with without_trace(module):
        module()
        assert contents(module) != before
    assert contents(module) == before


def test_a_tensor_that_is_changed_in_place_is_lent():
    """It is not a buffer: nothing is kept of its values before the call."""
    module = Stateful(lambda m: m.table.add_(1))
    state = ModuleState(module)
    module()
    changes = state.changes()
    assert changes.written == {(module, "table")}
    table = module.table
    with without_trace(module, changes):
        module()
        assert module.table.tolist() == [3, 3]
    assert module.table is table
    assert table.tolist() == [2, 2]


def test_unchanged_state_is_not_kept():
    module = Stateful(lambda m: None)
    state = ModuleState(module)
    module()
    changes = state.changes()
    assert changes.buffers == changes.attributes == {}
    assert changes.written == set()


def test_everything_is_put_back_after_an_error():
    module = Stateful(ACTS["history"])
    with pytest.raises(ZeroDivisionError):
        with without_trace(module):
            module()
            raise ZeroDivisionError
    assert module.history == [1]


def test_one_list_in_two_modules_stays_one():
    shared = []

    def act(m):
        m.a.history.append(len(m.b.history))

    module = Stateful(act)
    module.a, module.b = Stateful(None), Stateful(None)
    module.a.history = module.b.history = shared
    state = ModuleState(module)
    module()
    changes = state.changes()
    with without_trace(module, changes):
        assert module.a.history == []
        assert module.a.history is module.b.history
    assert module.a.history is module.b.history is shared


@pytest.mark.parametrize("when", ["before", "after", "plain"])
def test_hooks_may_change_attributes_of_torchs_modules(when):
    """And code from outside those of a plain Module."""
    layer = nn.Linear(2, 2)
    layer.calls = 0

    def count(module, *_):
        module.calls += 1

    if when == "before":
        layer.register_forward_pre_hook(count)
    elif when == "after":
        layer.register_forward_hook(count)
    else:
        layer = nn.Module()
        layer.calls = 0
        layer.forward = lambda x: count(layer)
    state = ModuleState(layer)
    layer(torch.ones(2))
    with without_trace(layer, state.changes()):
        assert layer.calls == 0
    assert layer.calls == 1


class Renorm(nn.BatchNorm1d):
    """Uses its running statistics in training."""

    def forward(self, x):
        y = x - self.running_mean
        self.running_mean.lerp_(x.mean(0), 0.1)
        return y


@pytest.mark.parametrize("training", [True, False])
def test_batch_norms_that_use_what_they_count(training):
    norm = Renorm(3).train(training)
    x = torch.rand(4, 3) + 5
    state = ModuleState(norm)
    y = norm(x)
    mean = norm.running_mean.clone()
    with without_trace(norm, state.changes()):
        assert torch.equal(norm(x), y)
    assert torch.equal(norm.running_mean, mean)


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.SyncBatchNorm])
def test_a_batch_norm_costs_no_copy_when_recorded(kind):
    norm = kind(3)
    state = ModuleState(norm)
    norm(torch.rand(4, 3))
    assert state.changes().buffers == {}


class Clones(TorchDispatchMode):
    """Counts copies of tensors."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.clone.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "norm, copies",
    [
        (nn.BatchNorm1d(3), 0),
        (nn.BatchNorm1d(3).eval(), 0),
        (nn.BatchNorm1d(3, track_running_stats=False), 0),
        # It divides by the number of batches.
        (nn.BatchNorm1d(3, momentum=None), 3),
        (Renorm(3), 3),
    ],
)
def test_statistics_are_not_copied_to_be_overwritten(norm, copies):
    """One batch norm needs three launches for that, as long as itself."""
    x = torch.rand(4, 3)
    state = ModuleState(norm)
    y = norm(x)
    before = {name: buffer.clone() for name, buffer in norm.named_buffers()}
    changes = state.changes()
    with Clones() as clones, without_trace(norm, changes):
        found = norm(x)
    # Another copy of each buffer that the record holds.
    assert clones.count == copies + len(changes.buffers)
    assert torch.equal(found, y)
    for name, buffer in norm.named_buffers():
        assert torch.equal(buffer, before[name])


def test_modules_are_in_torchs_order():
    shared = nn.Sequential(nn.ReLU(), nn.Tanh())
    net = nn.Sequential(
        nn.Sequential(shared, nn.Linear(1, 1)), shared, nn.ReLU()
    )
    net.register_module("none", None)
    assert modules_of(net) == list(net.modules())
    assert modules_of(lambda: None) == []


def test_inference_tensors_have_no_version():
    module = Stateful(lambda m: None)
    with torch.inference_mode():
        module.table = torch.ones(2)
        module.total = torch.ones(2)
    state = ModuleState(module)
    module()
    with without_trace(module, state.changes()):
        module()
    assert module.table.tolist() == module.total.tolist() == [1, 1]


@pytest.mark.parametrize("needed", [True, False])
def test_a_copied_tensor_keeps_requires_grad(needed):
    def write(m):
        with torch.no_grad():
            m.table.add_(1)

    module = Stateful(write)
    module.table.requires_grad_(needed)
    state = ModuleState(module)
    module()
    with without_trace(module, state.changes()):
        assert module.table.requires_grad == needed
        assert module.table.is_leaf
