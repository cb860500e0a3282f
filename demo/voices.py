"""Synthetic voices: eSpeak NG through ctypes.

A voice is one variant with one accent. eSpeak NG (GPL-3.0) comes with the
package espeakng-loader; the demo's corpora need it and nothing else does.

Authors
 * The sb_memeff authors 2026
"""

import ctypes
from pathlib import Path

import numpy as np
from scipy.signal import resample_poly

SAMPLE_RATE = 16000

# eSpeak NG 1.52 has 104 variants, but many are all but the same: klatt6 is
# adam, steph3 is steph2, miguel is michel. Each was measured on three
# sentences (mean and deviation of 40 log-mel bands, and pitch); of any two
# that lay closer than 0.4 (the median distance is 1.4) the later one in
# alphabetical order is left out. Demonic, whisper and whisperf are left out
# too: they have no stable pitch.
TEST_VARIANTS = (
    "Alicia Andy aunty boris david ed f2 iven3 klatt3 linda m7 Nguyen quincy "
    "sandro steph travis"
).split()
TRAIN_VARIANTS = [
    *(
        "adam Alex Andrea anika Annie announcer antonio AnxiousAndy belinda "
        "caleb croak Denis Diogo edward f1 f3 f5 Gene grandma grandpa gustave "
        "ian iven iven2 iven4 Jacky john kaukovalta klatt klatt4 Lee m4 m8 "
        "marcelo Marco Mario max michel Mike mike2 norbert pablo paul pedro "
        "RicishayMax RicishayMax2 rob robosoft robosoft2 robosoft4 robosoft5 "
        "robosoft6 robosoft7 robosoft8 shelby Storm Tweaky UniRobot zac"
    ).split(),
    "Mr serious",
]
ACCENTS = ("en-us", "en", "en-gb-scotland", "en-us-nyc", "en-029", "en-gb-x-rp")


class CorpusError(Exception):
    """Says in one sentence why the corpus cannot be made."""


class Espeak:
    """eSpeak NG with a seed for its random generator; one per process.

    Its state is global: the generator and the phase of the glottal pulses live
    on, so an utterance depends on all that the process has said before.
    """

    # From espeak_ng/speak_lib.h.
    SYNCHRONOUS, DONT_EXIT, CHARS_UTF8 = 2, 0x8000, 1
    RATE, PITCH, RANGE = 1, 3, 4

    def __init__(self, seed):
        library, data = find_espeak()
        self._lib = ctypes.CDLL(library)
        self._variants = Path(data) / "voices" / "!v"
        self._rate = self._lib.espeak_Initialize(
            self.SYNCHRONOUS, 0, data.encode(), self.DONT_EXIT
        )
        if self._rate <= 0:
            raise CorpusError(f"eSpeak NG could not read its data in {data}.")
        self._lib.espeak_ng_SetRandSeed(ctypes.c_long(seed))
        self._chunks = []
        prototype = ctypes.CFUNCTYPE(
            ctypes.c_int,
            ctypes.POINTER(ctypes.c_short),
            ctypes.c_int,
            ctypes.c_void_p,
        )
        # The library keeps the pointer: the object must live as long as it.
        self._callback = prototype(self._receive)
        self._lib.espeak_SetSynthCallback(self._callback)

    def _receive(self, samples, count, events):
        if samples and count > 0:
            self._chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    def say(self, text, voice, rate=175, pitch=50, pitch_range=50):
        """Speaks a text.

        Arguments
        ---------
        text, voice : str
            What to say, and the name of the voice, e.g. "en-us+f2".
        rate : float
            Words a minute.
        pitch, pitch_range : float
            Base pitch and liveliness of the intonation, 0 to 99; 50 is the
            voice's own.

        Returns
        -------
        np.ndarray
            Samples at 16 kHz, silence at both ends cut; resampling may carry
            them a little beyond -1 and 1.
        """
        self._chunks = []
        # eSpeak NG leaves out a variant that it does not have.
        _, _, variant = voice.partition("+")
        known = not variant or (self._variants / variant).is_file()
        # The voice first: choosing one sets the parameters back.
        status = self._lib.espeak_SetVoiceByName(voice.encode())
        if not known or status != 0:
            raise CorpusError(f"eSpeak NG has no voice {voice}.")
        self._lib.espeak_SetParameter(self.RATE, int(rate), 0)
        self._lib.espeak_SetParameter(self.PITCH, int(pitch), 0)
        self._lib.espeak_SetParameter(self.RANGE, int(pitch_range), 0)
        data = text.encode() + b"\0"
        size = ctypes.c_size_t(len(data))
        status = self._lib.espeak_Synth(
            data, size, 0, 1, 0, self.CHARS_UTF8, None, None
        )
        self._lib.espeak_Synchronize()
        if status != 0 or not self._chunks:
            raise CorpusError(f"eSpeak NG's voice {voice} said nothing.")
        samples = np.concatenate(self._chunks) / 32768
        samples = resample_poly(samples, SAMPLE_RATE, self._rate)
        loud = np.flatnonzero(np.abs(samples) > 0.02 * np.abs(samples).max())
        return samples[loud[0] : loud[-1] + 1]


def find_espeak():
    """Paths of the shared library and of its data; loads neither."""
    try:
        import espeakng_loader
    except ImportError:
        raise CorpusError(
            "The corpus needs eSpeak NG: pip install 'sb_memeff[demo]'."
        ) from None
    return espeakng_loader.get_library_path(), espeakng_loader.get_data_path()


def choose_voices(variants, count):
    """Names of voices, accent+variant; no variant is taken twice."""
    if not 1 <= count <= len(variants):
        raise CorpusError(f"There are {len(variants)} voices, not {count}.")
    # Spread over the list, or a smaller corpus would hold adam to iven.
    return [
        f"{ACCENTS[i % len(ACCENTS)]}+{variants[i * len(variants) // count]}"
        for i in range(count)
    ]
