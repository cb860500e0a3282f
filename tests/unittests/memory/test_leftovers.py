"""After an analysis, caches are what they were."""

import functools
import gc
import logging
import threading
import types
from collections import OrderedDict, defaultdict, deque

import pytest
import torch
from speechbrain.nnet.attention import RoPEMHA, _get_precomputed_values
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from sb_memeff.memory.fake import fake_tensors
from sb_memeff.memory.leftovers import no_leftovers
from sb_memeff.memory.step import training_step_memory

# torch.compile keeps fake tensors of its own: other tests leave them.
BEFORE = set()


@pytest.fixture(autouse=True)
def _fake_tensors_of_others():
    BEFORE.clear()
    BEFORE.update(id(x) for x in gc.get_objects() if type(x) is FakeTensor)


class Memo:
    """Somewhere that a network may keep tensors: get, set, names of all."""

    def get(self, key):
        raise NotImplementedError

    def put(self, key, value):
        raise NotImplementedError

    def keys(self):
        raise NotImplementedError


class Mapping(Memo):
    def __init__(self, kind):
        self.entries = kind()

    def get(self, key):
        return self.entries.get(key)

    def put(self, key, value):
        self.entries[key] = value

    def keys(self):
        return set(self.entries)


class Deep(Mapping):
    """An object in a tuple, as SpeechBrain's rotary positions are kept."""

    def get(self, key):
        return self.entries[key][1].tensor if key in self.entries else None

    def put(self, key, value):
        self.entries[key] = 7, types.SimpleNamespace(tensor=value)


class Attributes(Memo):
    def __init__(self, holder):
        self.holder = holder

    def get(self, key):
        return getattr(self.holder, key, None)

    def put(self, key, value):
        setattr(self.holder, key, value)

    def keys(self):
        return {k for k in "ab" if hasattr(self.holder, k)}


class WithSlots:
    __slots__ = ("__weakref__", "a", "b")


class List(Memo):
    def __init__(self):
        self.entries = []

    def get(self, key):
        return next((x for k, x in self.entries if k == key), None)

    def put(self, key, value):
        others = [one for one in self.entries if one[0] != key]
        self.entries[:] = [*others, (key, value)]

    def keys(self):
        return {key for key, _ in self.entries}


class Deque(List):
    def __init__(self):
        self.entries = deque()

    def put(self, key, value):
        others = [one for one in self.entries if one[0] != key]
        self.entries.clear()
        self.entries.extend([*others, (key, value)])


class Set(List):
    def __init__(self):
        self.entries = set()

    def put(self, key, value):
        self.entries -= {one for one in self.entries if one[0] == key}
        self.entries.add((key, value))


def closure():
    """Two variables of a function."""
    a = b = None

    class Variables(Memo):
        def get(self, key):
            return {"a": a, "b": b}[key]

        def put(self, key, value):
            nonlocal a, b
            if key == "a":
                a = value
            else:
                b = value

        def keys(self):
            return {k for k in "ab" if self.get(k) is not None}

    return Variables()


def function(memo={}):  # noqa: B006
    """A default that is changed."""
    return memo


def class_attributes():
    return Attributes(type("Owner", (), {}))


def function_default():
    found = Mapping(dict)
    found.entries = types.FunctionType(function.__code__, {}, argdefs=({},))()
    return found


MEMOS = {
    "dict": lambda: Mapping(dict),
    "OrderedDict": lambda: Mapping(OrderedDict),
    "defaultdict": lambda: Mapping(lambda: defaultdict(list)),
    "object in a dict": lambda: Deep(dict),
    "object": lambda: Attributes(types.SimpleNamespace()),
    "module": lambda: Attributes(types.ModuleType("some")),
    "network": lambda: Attributes(nn.Linear(1, 1)),
    "class": class_attributes,
    "function": lambda: Attributes(lambda: None),
    "slots": lambda: Attributes(WithSlots()),
    "list": List,
    "deque": Deque,
    "set": Set,
    "closure": closure,
    "default": function_default,
    "tensor": lambda: Attributes(torch.zeros(1)),
    "thread": lambda: Attributes(threading.local()),
}


class Lookup:
    """A network that memoises, in all kinds of memos at once."""

    def __init__(self, length=5, keys="a"):
        self.memos = {name: make() for name, make in MEMOS.items()}
        self.length = length
        self.keys = keys

    def __call__(self):
        found = 1
        for memo in self.memos.values():
            for key in self.keys:
                known = memo.get(key)
                if known is None or len(known) < self.length:
                    memo.put(key, torch.arange(float(self.length)))
                found = found * memo.get(key)
        return found


class Net(nn.Module):
    """A layer whose input is scaled by what is in a memo."""

    def __init__(self, look):
        super().__init__()
        self.layer = nn.Linear(5, 5)
        # Not a part of the network.
        self.look = (look,)

    def forward(self, x):
        return self.layer(x * self.look[0]())


def real(look):
    """A real step; a fake tensor cannot take part in it."""
    torch.manual_seed(0)
    net = Net(look)
    y = net(torch.ones(2, 5))
    y.sum().backward()
    assert type(y) is torch.Tensor
    return y.detach(), net.layer.weight.grad


def analysis(look):
    return training_step_memory(lambda: Net(look), (2, 5))


def fails(look):
    """An analysis that ends with an error after forward."""

    def step(net):
        net(torch.ones(2, 5))
        raise ArithmeticError("enough")

    with pytest.raises(ArithmeticError, match="enough"):
        training_step_memory(lambda: Net(look), step)


def fakes():
    return [
        x
        for x in gc.get_objects()
        if type(x) is FakeTensor and id(x) not in BEFORE
    ]


@pytest.mark.parametrize("run", [analysis, fails])
def test_memos_are_what_they_were(run):
    look = Lookup(length=3)
    look()
    kept = {name: memo.get("a") for name, memo in look.memos.items()}
    # Others take the place of those, and some come.
    look.length, look.keys = 5, "ab"
    run(look)
    for name, memo in look.memos.items():
        assert memo.keys() == {"a"}, name
        assert memo.get("a") is kept[name], name
    assert not fakes()


def test_any_order_of_analyses_and_steps():
    expected = real(lambda: torch.arange(5.0) ** len(MEMOS))
    look, found = Lookup(), []
    # Analyses, one that fails, and real steps.
    for letter in "araafr":
        if letter == "r":
            for value, right in zip(real(look), expected, strict=True):
                assert torch.equal(value, right)
        elif letter == "f":
            fails(look)
        else:
            found.append(analysis(look))
            assert found[-1].peak_bytes == found[0].peak_bytes
            assert found[-1].by_kind == found[0].by_kind
    assert not fakes()


def test_an_entry_that_was_none_is_restored():
    def default(memo=None):
        pass

    default.memo = None
    settings, space = {"a": None, "b": 1}, types.SimpleNamespace(a=None, b=1)

    class Owner:
        a = None

    @no_leftovers()
    def run():
        with fake_tensors():
            settings.update(a=torch.ones(1), b=torch.ones(1))
            space.a = space.b = default.memo = Owner.a = torch.ones(1)

    run()
    assert settings == {"a": None, "b": 1}
    assert vars(space) == {"a": None, "b": 1}
    assert default.memo is None
    assert Owner.a is None


def test_cached_functions_drop_results_of_the_analysis():
    def positions(length):
        return torch.arange(float(length))

    kinds = functools.cache, functools.lru_cache, functools.lru_cache(maxsize=3)
    caches = [kind(positions) for kind in kinds]

    def look():
        return caches[0](5) * caches[1](5) * caches[2](5)

    early = [cached(3) for cached in caches]
    expected = real(lambda: torch.arange(5.0) ** 3)
    for run in (analysis, fails, analysis):
        run(look)
        for cached, value in zip(caches, early, strict=True):
            assert cached.cache_info().currsize == 1
            assert cached(3) is value
    for value, right in zip(real(look), expected, strict=True):
        assert torch.equal(value, right)
    late = [cached(5) for cached in caches]
    analysis(look)
    for cached, value in zip(caches, late, strict=True):
        assert cached(5) is value
        # It still works as a cache.
        for length in (1, 2, 3, 4, 5) * 3:
            assert len(cached(length)) == length


def test_all_other_changes_stay():
    counts, seen = {"calls": 0}, ["first"]

    def step(net):
        y = net(torch.ones(2, 5))
        counts["calls"] += 1
        counts["last"] = y
        seen.append(y.shape)
        seen.append(y)
        return y

    training_step_memory(lambda: Net(lambda: 1.0), step)
    assert counts == {"calls": 1}
    assert seen == ["first", (2, 5)]


def test_rotary_positions_of_speechbrain():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.mha = RoPEMHA(16, 2)

        def forward(self, x):
            return self.mha(x, x, x)[0]

    def step():
        torch.manual_seed(0)
        net = Attention()
        y = net(torch.randn(4, 30, 16))
        y.sum().backward()
        return y.detach(), net.mha.in_proj_weight.grad

    _get_precomputed_values.memo.clear()
    expected = step()
    _get_precomputed_values.memo.clear()
    first = training_step_memory(Attention, (4, 30, 16))
    assert not _get_precomputed_values.memo
    for value, right in zip(step(), expected, strict=True):
        assert torch.equal(value, right)
    before = dict(_get_precomputed_values.memo)
    (length, rotations), *_ = before.values()
    assert length == 32
    second = training_step_memory(Attention, (4, 30, 16))
    assert second.by_kind == first.by_kind
    # Longer ones replace what is there.
    training_step_memory(Attention, (4, 50, 16))
    assert _get_precomputed_values.memo == before
    assert next(iter(before.values()))[1] is rotations


def test_a_module_that_is_imported_meanwhile(tmp_path, monkeypatch):
    (tmp_path / "lazily_imported.py").write_text(
        "import functools\n"
        "import torch\n"
        "SCALE = torch.arange(5.0)\n"
        "MEMO = {}\n"
        "class Cache:\n"
        "    def __init__(self):\n"
        "        self.memo = {}\n"
        "CACHE = Cache()\n"
        "@functools.cache\n"
        "def ones(length):\n"
        "    return torch.ones(length)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)

    def look():
        import lazily_imported as found

        for memo in (found.MEMO, found.CACHE.memo):
            if "more" not in memo:
                memo["more"] = found.SCALE + torch.ones(5)
        return found.SCALE * found.ones(5) * found.MEMO["more"]

    analysis(look)
    import lazily_imported

    assert type(lazily_imported.SCALE) is torch.Tensor
    assert lazily_imported.SCALE.tolist() == [0, 1, 2, 3, 4]
    assert lazily_imported.MEMO == lazily_imported.CACHE.memo == {}
    assert not fakes()
    value, _ = real(look)
    expected, _ = real(lambda: torch.arange(5.0) * torch.arange(1.0, 6))
    assert torch.equal(value, expected)


def test_a_leftover_that_cannot_be_removed_is_named(caplog, monkeypatch):
    def keep():
        held = None
        while True:
            held = yield held

    keeper = keep()
    next(keeper)

    @no_leftovers()
    def run():
        with fake_tensors():
            keeper.send(torch.ones(1))

    log = logging.getLogger("sb_memeff.memory.leftovers")
    monkeypatch.setattr(log, "propagate", True)
    with caplog.at_level("WARNING"):
        run()
    (record,) = caplog.records
    assert "keep (a builtins.generator) contains a fake" in record.getMessage()
    keeper.close()


def test_an_analysis_inside_another():
    look = Lookup()

    @no_leftovers()
    def outer():
        return [analysis(look).by_kind for _ in range(2)]

    first, second = outer()
    assert first == second
    assert not any(memo.keys() for memo in look.memos.values())
    assert not fakes()


def test_no_memory_is_kept():
    with no_leftovers():
        pass
    gc.collect()
    gc.disable()
    try:
        before = len(gc.get_objects())
        for _ in range(2):
            with no_leftovers():
                pass
        # Frozen objects would be hidden from the collector.
        assert gc.get_freeze_count() == 0
        assert len(gc.get_objects()) < before + 1000
    finally:
        gc.enable()
