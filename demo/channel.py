"""The channel between a mouth and a recording.

Authors
 * The sb_memeff authors 2026
"""

import numpy as np
from scipy.signal import fftconvolve, firwin2, lfilter
from voices import SAMPLE_RATE

BANDS_HZ = (0, 150, 400, 1000, 2500, 5000, 8000)


class Channel:
    """Room, equalizer and noise of one session.

    Arguments
    ---------
    rng : np.random.Generator
        Source of randomness.
    """

    def __init__(self, rng):
        self._rng = rng
        reverberation_s = rng.uniform(0.1, 0.4)
        direct_to_reverb_db = rng.uniform(5, 15)
        time_s = np.arange(int(SAMPLE_RATE * reverberation_s)) / SAMPLE_RATE
        # 60 dB down after the reverberation time.
        room = rng.standard_normal(len(time_s))
        room *= 10 ** (-3 * time_s / reverberation_s)
        room *= 10 ** (-direct_to_reverb_db / 20) / np.linalg.norm(room)
        room[0] = 1
        gains = 10 ** (rng.normal(0, 2.5, len(BANDS_HZ)) / 20)
        equalizer = firwin2(255, BANDS_HZ, gains, fs=SAMPLE_RATE)
        self._response = fftconvolve(room, equalizer)
        # White at 0; at 0.95, low frequencies are 32 dB louder than high ones.
        self._noise_pole = rng.uniform(0, 0.95)
        self._snr_db = rng.uniform(14, 28)
        self._level_db = rng.uniform(-32, -20)

    def __call__(self, samples):
        """Sends clean samples through; as many come out, within -1 and 1."""
        count = len(samples)
        samples = fftconvolve(samples, self._response)[:count]
        noise = self._rng.standard_normal(count)
        noise = lfilter([1], [1, -self._noise_pole], noise)
        noise *= 10 ** (-self._snr_db / 20) / noise.std()
        mixed = samples / samples.std() + noise
        return np.clip(mixed * 10 ** (self._level_db / 20), -0.99, 0.99)
