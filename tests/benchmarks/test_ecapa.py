"""The README's claims of ECAPA-TDNN: parameters and memory.

Authors
 * The sb_memeff authors 2026
"""

import ecapa
import pytest
import torch

from tests.unittests.one_analysis import one_analysis  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_analysis")


@pytest.mark.parametrize("blocks", [3, 12])
@pytest.mark.parametrize("channels", [64, 512, 1024])
def test_as_many_parameters_as_speechbrains(channels, blocks):
    options = ecapa.arguments_of(channels, blocks)
    with torch.device("meta"):
        counts = [
            sum(p.numel() for p in network(**options).parameters())
            for network in map(ecapa.NETWORKS.get, ("stored", "reversible"))
        ]
    assert counts[1] == pytest.approx(counts[0], rel=0.01)


def test_memory_with_speechbrains_weights():
    """A sixth of SpeechBrain's, less than a third of checkpointed blocks'."""
    ours = ecapa.memory_of("same_weights").activation_bytes
    assert ecapa.memory_of("stored").activation_bytes > 6 * ours
    assert ecapa.memory_of("checkpoint").activation_bytes > 3 * ours


def test_memory_of_the_reversible_network():
    ours = ecapa.memory_of("reversible").activation_bytes
    assert ecapa.memory_of("stored").activation_bytes > 8 * ours
    assert ecapa.memory_of("checkpoint").activation_bytes > 4.5 * ours


def test_memory_does_not_grow_with_depth():
    shallow, deep = (ecapa.memory_of("reversible", n) for n in (3, 6))
    assert deep.activation_bytes < 1.02 * shallow.activation_bytes
