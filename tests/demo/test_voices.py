"""The demo's voices.

Authors
 * The sb_memeff authors 2026
"""

import re

import pytest

pytest.importorskip("espeakng_loader", reason="pip install sb_memeff[demo]")
pytest.importorskip("scipy")

import numpy as np
from voices import (
    ACCENTS,
    TEST_VARIANTS,
    TRAIN_VARIANTS,
    CorpusError,
    Espeak,
    choose_voices,
)


def test_no_variant_is_in_training_and_test():
    assert not set(TRAIN_VARIANTS) & set(TEST_VARIANTS)


def test_chosen_voices_are_spread_over_the_list():
    voices = choose_voices(TRAIN_VARIANTS, 30)
    variants = [voice.split("+")[1] for voice in voices]
    assert variants == TRAIN_VARIANTS[::2]
    assert {voice.split("+")[0] for voice in voices} == set(ACCENTS)


@pytest.mark.parametrize("count", [0, 17])
def test_no_variant_is_taken_twice(count):
    with pytest.raises(CorpusError, match=f"are 16 voices, not {count}"):
        choose_voices(TEST_VARIANTS, count)


def test_every_voice_speaks():
    espeak = Espeak(seed=1)
    for variants in (TRAIN_VARIANTS, TEST_VARIANTS):
        for voice in choose_voices(variants, len(variants)):
            samples = espeak.say("three", voice)
            assert 0.1 < len(samples) / 16000 < 1.5, voice
            assert 0.02 < np.abs(samples).max() < 1.1, voice


@pytest.mark.parametrize("voice", ["en-us+nobody", "nowhere", "nowhere+adam"])
def test_unknown_voice_is_named(voice):
    with pytest.raises(CorpusError, match=re.escape(f"no voice {voice}.")):
        Espeak(seed=1).say("three", voice)
