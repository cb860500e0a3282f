"""States of generators: what is read can be written, and draws show."""

import random

import numpy as np
import pytest
import torch

from sb_memeff.nnet.replay import random_states
from sb_memeff.nnet.replay.random_states import (
    equal_states,
    generators_among,
    global_sources,
    own_source,
)

CPU = torch.device("cpu")

GLOBAL = {
    "python": random.random,
    "python_normal": lambda: random.gauss(0, 1),
    "numpy": np.random.rand,
    "numpy_normal": np.random.randn,
    "torch": lambda: torch.rand(()).item(),
}


def own_draws():
    """Generators of all kinds, and how to draw from each."""
    pcg = np.random.default_rng(0)
    twister = np.random.Generator(np.random.MT19937(0))
    bits = np.random.SFC64(0)
    state = np.random.RandomState(0)
    python = random.Random(0)
    generator = torch.Generator()
    return {
        "random.Random": (python, python.random),
        "RandomState": (state, state.randn),
        "PCG64": (pcg, pcg.random),
        "MT19937": (twister, twister.normal),
        "BitGenerator": (bits, bits.random_raw),
        "torch.Generator": (
            generator,
            lambda: torch.rand((), generator=generator).item(),
        ),
    }


def assert_repeats(sources, draw):
    # Twice: the second of a pair of normal numbers is stored elsewhere.
    for _ in range(2):
        states = [source.read() for source in sources]
        assert all(
            equal_states(a, s.read())
            for a, s in zip(states, sources, strict=True)
        )
        first = draw()
        changed = [
            not equal_states(a, s.read())
            for a, s in zip(states, sources, strict=True)
        ]
        assert sum(changed) == 1
        for source, state in zip(sources, states, strict=True):
            source.write(state)
        assert draw() == first


@pytest.mark.parametrize("kind", GLOBAL)
def test_global_generators(kind):
    np.random.seed(0)
    assert_repeats(global_sources(CPU, True), GLOBAL[kind])


@pytest.mark.parametrize("kind", own_draws())
def test_generators_of_modules(kind):
    generator, draw = own_draws()[kind]
    assert_repeats([own_source(generator, True)], draw)


def test_the_second_of_a_pair_that_numpy_keeps():
    """The Mersenne twister itself is not moved by it."""
    source = global_sources(CPU, True)[1]
    np.random.seed(0)
    np.random.randn()
    state = source.read()
    second = np.random.randn()
    assert not equal_states(state, source.read())
    source.write(state)
    assert equal_states(source.read(), state)
    assert np.random.randn() == second


def test_numpy_state_is_read_only_after_a_draw():
    source = global_sources(CPU, True)[1]
    np.random.seed(0)
    state = source.read()
    assert source.read() is state
    np.random.seed(1)
    assert not equal_states(source.read(), state)


def test_numpy_with_another_global_generator():
    before = np.random.get_bit_generator()
    np.random.set_bit_generator(np.random.PCG64(0))
    try:
        assert_repeats(global_sources(CPU, True), np.random.rand)
    finally:
        np.random.set_bit_generator(before)


def test_numpy_that_keeps_its_twister_otherwise(monkeypatch):
    monkeypatch.setattr(random_states, "_TWISTER_IS_READABLE", False)
    assert_repeats(global_sources(CPU, True), np.random.rand)


def test_this_numpy_stores_its_twister_as_expected():
    """Otherwise all is right, but slow."""
    assert random_states._TWISTER_IS_READABLE


def test_generators_of_torch_are_left_out_if_so_wished():
    assert len(global_sources(CPU, True)) == len(global_sources(CPU, False)) + 1
    assert own_source(torch.Generator(), False) is None


def test_objects_that_are_not_generators():
    assert own_source(random.SystemRandom(), True) is None
    assert own_source(random, True) is None


def test_generators_among():
    a, b, c = random.Random(), torch.Generator(), np.random.default_rng()
    found = generators_among([1, a, [b, "x"], {"c": (c,), "d": c}])
    assert found == [a, b, c]


@pytest.mark.parametrize("wrap", [list, tuple, lambda x: {"key": x[0]}])
def test_generators_in_containers(wrap):
    generator = random.Random(0)
    assert generators_among([wrap([generator])]) == [generator]


def test_the_generator_of_a_device_is_that_of_its_number(monkeypatch):
    """Not of the device that happens to be the current one."""
    states = {0: "first", 1: "second"}

    class Module:
        @staticmethod
        def get_rng_state(device="cuda"):
            return states[torch.device(device).index or 0]

        @staticmethod
        def set_rng_state(state, device="cuda"):
            states[torch.device(device).index or 0] = state

    monkeypatch.setattr(torch, "get_device_module", lambda device: Module)
    source = global_sources(torch.device("cuda:1"), follow_torch=True)[-1]
    assert source.read() == "second"
    source.write("changed")
    assert states == {0: "first", 1: "changed"}
