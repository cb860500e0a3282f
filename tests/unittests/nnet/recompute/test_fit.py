"""The cheapest recomputation that a budget allows.

Authors
 * The sb_memeff authors 2026
"""

import pytest
import torch
from hyperpyyaml import load_hyperpyyaml
from torch import nn

from sb_memeff.memory.leftovers import no_leftovers
from sb_memeff.memory.search import DoesNotFit
from sb_memeff.memory.step import training_step_memory
from sb_memeff.nnet.recompute import (
    fit_recompute,
    recompute_blocks,
    store_blocks,
)
from sb_memeff.nnet.recompute.blocks import is_split
from sb_memeff.nnet.recompute.fit import (
    Recomputation,
    cheapest_recomputation,
)
from sb_memeff.nnet.recompute.outputs import DroppedOutputError
from sb_memeff.nnet.recompute.pieces import SplitError
from tests.unittests.nnet.speech_networks import LAYERS, conformer

# --- the choice --------------------------------------------------------------


class Peaks:
    """Bytes of a step with four layers, counted by hand."""

    def __init__(self, used=False, whole_batch=False):
        self.used, self.whole_batch = used, whole_batch
        self.tried = []

    def __call__(self, how):
        self.tried.append(how)
        if how is None:
            return 440
        if how.first_output_only and self.used:
            raise DroppedOutputError("layers.0 keeps only its first output")
        if how.split > 1 and self.whole_batch:
            raise SplitError("layers.0 cannot be called in pieces")
        recomputed = round(4 / how.every)
        outputs = 4 * 2 * (not how.first_output_only)
        # The last 20 are elsewhere.
        return 20 + 80 * (4 - recomputed) + outputs + max(80 // how.split, 20)


@pytest.mark.parametrize(
    "limit, chosen",
    [
        (440, None),
        (348, Recomputation(every=4)),
        (347, Recomputation(every=4, first_output_only=True)),
        (300, Recomputation(every=2)),
        (267, Recomputation(every=2, first_output_only=True)),
        (108, Recomputation(every=1)),
        (107, Recomputation(every=1, first_output_only=True)),
        (99, Recomputation(split=2)),
        (67, Recomputation(first_output_only=True, split=2)),
        (48, Recomputation(split=4)),
        (40, Recomputation(first_output_only=True, split=4)),
    ],
)
def test_the_cheapest_that_fits(limit, chosen):
    peaks = Peaks()
    assert cheapest_recomputation(peaks, 4, limit) == chosen
    assert len(set(peaks.tried)) == len(peaks.tried) < 8


def test_outputs_that_are_used_are_kept():
    found = cheapest_recomputation(Peaks(used=True), 4, 67)
    assert found == Recomputation(split=4)


@pytest.mark.parametrize(
    "peaks, options, least",
    [
        (Peaks(), {}, 40),
        (Peaks(whole_batch=True), {}, 100),
        (Peaks(), {"may_split": False}, 100),
    ],
)
def test_nothing_fits(peaks, options, least):
    with pytest.raises(DoesNotFit) as caught:
        cheapest_recomputation(peaks, 4, 30, **options)
    assert caught.value.peak == least


# --- real networks -----------------------------------------------------------


def network():
    return nn.Sequential(
        *(
            nn.Sequential(*2 * [nn.Linear(100, 100), nn.Tanh()])
            for _ in range(8)
        )
    )


def peak(recomputed):
    """With so many of the four segments recomputed."""

    def build():
        net = network()
        recompute_blocks(net, "*", 4 / recomputed, segment_length=2)
        return net

    return training_step_memory(build, [1000, 100]).peak_bytes


def logged_names(caplog, maker):
    """The names of the blocks that a yaml file with the logged line recomputes."""
    (line,) = [r.message for r in caplog.records if "a step takes" in r.message]
    text = line[line.index("!apply:") : line.rindex(".")]
    text = text.replace("{", "{module: !ref <net>, ")
    return load_hyperpyyaml(f"net: !apply:{maker} []\nnames: {text}\n")["names"]


@no_leftovers()  # looks at all objects of the process once
def test_a_budget_for_segments_of_two_blocks(caplog):
    """As few segments as fit, each a whole one."""
    budget = (peak(1) + peak(2)) // 2
    assert peak(2) < budget < peak(1)
    net = network()
    options = fit_recompute(net, "*", budget, [1000, 100], segment_length=2)
    assert options == {"every": 2}
    found = store_blocks(net)
    assert found == recompute_blocks(net, "*", 2, segment_length=2)
    assert len(found) == 4
    assert logged_names(caplog, f"{__name__}.network") == found


@pytest.mark.parametrize(
    "blocks", ["*", "[ab].*", ["*", "CNN"], ["layer?.*", "0", "a, b", "{x}: y"]]
)
def test_names_in_yaml(blocks):
    """Some mean something else to yaml unless they are quoted."""
    text = Recomputation(split=2).yaml(blocks)
    found = load_hyperpyyaml(f"how: {{{text}}}")["how"]
    assert found == {"blocks": blocks, "split": 2}


@no_leftovers()  # looks at all objects of the process once
def test_a_budget_for_pieces(caplog):
    """Layers in pieces; the logged line is what a yaml file needs."""

    def step(net):
        return net(torch.zeros(8, 60, 20), torch.ones(8)).square().mean()

    def peak(**options):
        def build():
            net = conformer(layers=1)
            recompute_blocks(net, LAYERS, **options)
            return net

        return training_step_memory(build, step).peak_bytes

    whole, pieces = peak(first_output_only=True), peak(split=2)
    assert pieces < whole
    net = conformer(layers=1)
    options = fit_recompute(net, LAYERS, (whole + pieces) // 2, step)
    assert options == {"every": 1, "split": 2}
    assert is_split(net.transformer.encoder.layers[0])
    maker = "tests.unittests.nnet.speech_networks.conformer"
    assert len(logged_names(caplog, maker)) == 3
