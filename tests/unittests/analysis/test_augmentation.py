"""largest_copies counts what SpeechBrain's Augmenter really gives out.

Authors
 * The sb_memeff authors 2026
"""

import itertools

import pytest
import torch
from speechbrain.augment.augmenter import Augmenter

from sb_memeff.analysis.augmentation import largest_copies

ROWS = 6  # divisible by any number of augmentations here


def largest_batch(**arguments):
    """The most rows that many draws give, relative to the loader's."""
    augmenter = Augmenter(
        augmentations=[torch.nn.Identity() for _ in range(3)], **arguments
    )
    wavs, lens = torch.zeros(ROWS, 4), torch.ones(ROWS)
    return max(len(augmenter(wavs, lens)[0]) for _ in range(25)) / ROWS


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("concat", [False, True])
@pytest.mark.parametrize("repeat", [0, 1, 2])
def test_copies_equal_those_of_the_augmenter(parallel, concat, repeat):
    torch.manual_seed(0)
    limits = [(None, None), (0, 2), (3, 3), (0, 0), (-1, 9), (3, 1)]
    for least, most in limits:
        arguments = {
            "parallel_augment": parallel,
            "concat_original": concat,
            "repeat_augment": repeat,
            "min_augmentations": least,
            "max_augmentations": most,
        }
        assert largest_copies(3, **arguments) == largest_batch(**arguments), (
            arguments
        )


def test_only_what_is_enabled():
    for flags in itertools.product([False, True], repeat=3):
        arguments = {
            "parallel_augment": True,
            "concat_original": True,
            "enable_augmentations": list(flags),
        }
        assert largest_copies(3, **arguments) == largest_batch(**arguments)


def test_a_part_of_the_batch_for_each():
    arguments = {
        "parallel_augment": True,
        "parallel_augment_fixed_bs": True,
        "concat_original": True,
        "shuffle_augmentations": True,
    }
    assert largest_copies(3, **arguments) == largest_batch(**arguments) == 2


def test_never():
    arguments = {"concat_original": True, "augment_prob": 0.0}
    assert largest_copies(3, **arguments) == largest_batch(**arguments) == 1


def test_upstreams_voxceleb():
    assert (
        largest_copies(
            4,
            parallel_augment=True,
            concat_original=True,
            repeat_augment=1,
            shuffle_augmentations=False,
            min_augmentations=4,
            max_augmentations=4,
            augment_prob=1.0,
        )
        == 5
    )
