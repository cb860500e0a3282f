"""Hooks that must see every call of a module."""

import pytest
from torch import nn

from sb_memeff.memory.tracker import ModuleTracker
from sb_memeff.utils.hooks import are_watched, only_observes

OF_MODULES = [
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
]
GLOBAL = [
    "register_module_forward_hook",
    "register_module_forward_pre_hook",
    "register_module_full_backward_hook",
    "register_module_full_backward_pre_hook",
]


@pytest.mark.parametrize("name", OF_MODULES)
def test_of_one_module(name):
    watched, other = nn.ReLU(), nn.ReLU()
    handle = getattr(watched, name)(lambda *args: None)
    assert are_watched([other, watched]) and not are_watched([other])
    handle.remove()
    assert not are_watched([watched])


def test_a_forward_of_its_own():
    module = nn.ReLU()
    module.forward = lambda x: x
    assert are_watched([module])


@pytest.mark.parametrize("name", GLOBAL)
def test_of_all_modules(name):
    handle = getattr(nn.modules.module, name)(lambda *args: None)
    assert are_watched([nn.ReLU()])
    only_observes(handle)
    assert not are_watched([nn.ReLU()])
    other = getattr(nn.modules.module, name)(lambda *args: None)
    assert are_watched([nn.ReLU()])
    other.remove()
    handle.remove()
    assert not are_watched([nn.ReLU()])


def test_the_analysis_only_observes():
    with ModuleTracker():
        assert not are_watched([nn.ReLU()])
