"""Networks by name."""

import pytest

from sb_memeff.lobes.presets import Presets


class Network(Presets):
    PRESETS = {"Small": {"width": 1, "depth": 2}, "Large": {"width": 3}}

    def __init__(self, width, depth=5):
        self.width, self.depth = width, depth


def test_overrides_win_over_the_preset():
    net = Network.from_preset("Small", depth=7)
    assert (net.width, net.depth) == (1, 7)
    assert Network.from_preset("Small").depth == 2
    assert Network.from_preset("Large").depth == 5


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="Network.*'Huge'.*Small, Large"):
        Network.from_preset("Huge")
