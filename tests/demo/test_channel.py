"""The demo's channel.

Authors
 * The sb_memeff authors 2026
"""

import pytest

pytest.importorskip("scipy")

import numpy as np
from channel import Channel


def send(seed, samples):
    return Channel(np.random.default_rng(seed))(samples)


def test_a_channel_keeps_the_length_and_the_words_but_not_the_samples():
    rng = np.random.default_rng(0)
    # Noise that comes and goes is speech enough.
    speech = rng.standard_normal(32000) * np.repeat([0, 1, 0, 1], 8000)
    sent = [send(seed, speech) for seed in (1, 2, 1)]
    assert np.array_equal(sent[0], sent[2])
    assert not np.allclose(sent[0], sent[1])
    for samples in sent:
        assert samples.shape == speech.shape
        assert np.abs(samples).max() < 1
        quiet, loud = (samples.reshape(4, 8000)[i].std() for i in (0, 1))
        assert quiet < 0.3 * loud


def test_levels_and_noises_differ():
    silence_then_tone = np.sin(0.3 * np.arange(16000)) * (
        np.arange(16000) >= 8000
    )
    sent = [send(seed, silence_then_tone) for seed in range(20)]
    level_db = 20 * np.log10([s.std() for s in sent])
    noise_db = 20 * np.log10([s[:8000].std() / s.std() for s in sent])
    assert -33 < level_db.min() < -28 and -24 < level_db.max() < -19
    assert noise_db.min() < -20 and noise_db.max() > -20
