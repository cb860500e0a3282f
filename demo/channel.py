"""The channel between a mouth and a recording.

Authors
 * The sb_memeff authors 2026
"""

import numpy as np
from scipy.signal import fftconvolve
from voices import SAMPLE_RATE

BANDS_HZ = (50, 150, 400, 1000, 2500, 5000, 8000)


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
        tail = rng.standard_normal(len(time_s))
        tail *= 10 ** (-3 * time_s / reverberation_s)
        tail *= 10 ** (-direct_to_reverb_db / 20) / np.linalg.norm(tail)
        self._response = np.concatenate([[1.0], tail])
        self._gains_db = rng.normal(0, 2.5, len(BANDS_HZ))
        self._noise_slope = rng.uniform(0, 1.5)
        self._snr_db = rng.uniform(14, 28)
        self._level_db = rng.uniform(-32, -20)

    def __call__(self, samples):
        """Sends clean samples through; as many come out, within -1 and 1."""
        count = len(samples)
        samples = fftconvolve(samples, self._response)[:count]
        samples = _filter(samples, self._equalizer_gain)
        samples /= samples.std()
        noise = _filter(self._rng.standard_normal(count), self._noise_gain)
        noise *= 10 ** (-self._snr_db / 20) / noise.std()
        mixed = (samples + noise) * 10 ** (self._level_db / 20)
        return np.clip(mixed, -0.99, 0.99)

    def _equalizer_gain(self, hertz):
        octave = np.log2(np.maximum(hertz, 1))
        gain_db = np.interp(octave, np.log2(BANDS_HZ), self._gains_db)
        return 10 ** (gain_db / 20)

    def _noise_gain(self, hertz):
        return np.maximum(hertz, 50) ** (-self._noise_slope / 2)


def _filter(samples, gain):
    """Multiplies the spectrum by a function of the frequency."""
    spectrum = np.fft.rfft(samples)
    hertz = np.fft.rfftfreq(len(samples), 1 / SAMPLE_RATE)
    return np.fft.irfft(spectrum * gain(hertz), len(samples))
