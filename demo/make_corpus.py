"""Makes a small multi-speaker corpus in the layout of VoxCeleb.

The speakers are voice variants of eSpeak NG: one variant and one accent make
one speaker. A session of a speaker has its own pitch, rate, room, equalizer
and noise, as a VoxCeleb video has, so that neither the spectrum of the channel
nor the pitch alone tells who speaks. No text occurs twice.

    python demo/make_corpus.py data/demo/voices

writes

    OUT/wav/<speaker>/<session>/<utterance>.wav    16 kHz, 16 bit
    OUT/veri_test.txt       "1 a.wav b.wav" same speaker, "0 a.wav b.wav" not
    OUT/manifest.json       options, their hash, digest of the audio

The speakers of veri_test.txt occur in no training file. The same options make
the same bytes on every run, and a second run finds the first one's result.

eSpeak NG (GPL-3.0) comes with the package espeakng-loader and is called
through ctypes; it is needed for this corpus only.
"""

import argparse
import ctypes
import dataclasses
import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import soundfile
from scipy.signal import fftconvolve, resample_poly
from tqdm import tqdm

SAMPLE_RATE = 16000
# Any change to what the code writes must change this, or caches go stale.
FORMAT = 1

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

DETERMINERS = "the a this that every one another our their some".split()
ADJECTIVES = (
    "quiet yellow enormous clever frozen patient hollow northern careful rusty "
    "gentle crooked famous empty purple thirsty modern wooden sudden bitter"
).split()
NOUNS = (
    "lighthouse parrot engineer cathedral violin harbour teacher mountain "
    "bicycle orchard letter captain kitchen thunderstorm museum puzzle "
    "shepherd telescope basket village river doctor chimney journey"
).split()
VERBS = (
    "watched followed measured painted ignored repaired described borrowed "
    "surprised visited counted imagined guarded mentioned chose understood"
).split()
PLACES = (
    "behind the station;near the old bridge;under a grey sky;in the valley;"
    "across the square;beside the fire;on the third floor;far from home;"
    "outside the theatre;among tall trees"
).split(";")
TIMES = (
    "before breakfast;on Thursday;all through July;at half past nine;"
    "without a word;for five years;twice a week;just in time;every winter;"
    "long after midnight"
).split(";")


class CorpusError(Exception):
    """Says in one sentence why the corpus cannot be made."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What the corpus consists of.

    Arguments
    ---------
    train_speakers : int
        Number of training speakers.
    train_sessions : int
        Sessions of each training speaker.
    train_utterances : int
        Utterances of each training session.
    test_speakers : int
        Number of unseen test speakers.
    test_sessions : int
        Sessions of each test speaker.
    test_utterances : int
        Utterances of each test session.
    seed : int
        Decides everything that is drawn at random.
    """

    train_speakers: int = 60
    train_sessions: int = 3
    train_utterances: int = 3
    test_speakers: int = 16
    test_sessions: int = 4
    test_utterances: int = 2
    seed: int = 2412

    def __post_init__(self):
        limits = {
            "train_speakers": len(TRAIN_VARIANTS),
            "test_speakers": len(TEST_VARIANTS),
        }
        for name, value in dataclasses.asdict(self).items():
            highest = limits.get(name, 1000)
            if name != "seed" and not 1 <= value <= highest:
                raise CorpusError(f"{name} must lie in 1..{highest}: {value}")

    def fingerprint(self):
        """Hashes everything that decides the bytes of the corpus.

        Returns
        -------
        str
            A hexadecimal SHA-256.
        """
        what = [FORMAT, dataclasses.asdict(self), TRAIN_VARIANTS, TEST_VARIANTS]
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Speaker:
    """One speaker's part of the work, complete enough for another process.

    Arguments
    ---------
    name : str
        The speaker's folder, idNNNNN.
    voice : str
        eSpeak NG's name of the voice, accent+variant.
    seed : tuple
        Seed of the speaker's own random stream.
    texts : tuple
        For every session a tuple with the (first, second) sentence of each
        utterance; the second is spoken where the first is too short.
    """

    name: str
    voice: str
    seed: tuple
    texts: tuple


class Espeak:
    """eSpeak NG through ctypes, one per process: its state is global.

    Several voices draw from a random generator inside the library, and the
    phase of the glottal pulses lives on from one utterance to the next. So
    what it says depends on all that the process let it say before.

    Arguments
    ---------
    seed : int
        Seed of the library's generator.
    """

    # From espeak_ng/speak_lib.h.
    RETRIEVAL = 1
    SYNCHRONOUS = 2
    DONT_EXIT = 0x8000
    CHARS_UTF8 = 1
    RATE, PITCH, RANGE = 1, 3, 4

    def __init__(self, seed):
        library, data = find_espeak()
        self._lib = ctypes.CDLL(library)
        self._rate = self._lib.espeak_Initialize(
            self.SYNCHRONOUS, 0, data.encode(), self.DONT_EXIT
        )
        if self._rate <= 0:
            raise CorpusError(f"eSpeak NG could not read its data in {data}.")
        self._lib.espeak_ng_SetRandSeed.argtypes = [ctypes.c_long]
        self._lib.espeak_ng_SetRandSeed(seed)
        self._lib.espeak_Synth.argtypes = [
            ctypes.c_char_p,
            ctypes.c_size_t,
            ctypes.c_uint,
            ctypes.c_int,
            ctypes.c_uint,
            ctypes.c_uint,
            ctypes.c_void_p,
            ctypes.c_void_p,
        ]
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
            chunk = np.ctypeslib.as_array(samples, (count,))
            self._chunks.append(chunk.copy())
        return 0

    def say(self, text, voice, rate=175, pitch=50, pitch_range=50):
        """Speaks a text.

        Arguments
        ---------
        text : str
            What to say.
        voice : str
            Name of the voice, e.g. "en-us+f2".
        rate : int
            Words a minute.
        pitch : int
            Base pitch, 0 to 99; 50 is the voice's own.
        pitch_range : int
            Liveliness of the intonation, 0 to 99; 50 is the voice's own.

        Returns
        -------
        np.ndarray
            Samples at 16 kHz, between -1 and 1, silence at both ends cut.

        Raises
        ------
        CorpusError
            If the voice is not there, or nothing was said.
        """
        self._chunks = []
        # The voice first: choosing one sets the parameters back.
        if self._lib.espeak_SetVoiceByName(voice.encode()) != 0:
            raise CorpusError(f"eSpeak NG has no voice {voice}.")
        self._lib.espeak_SetParameter(self.RATE, int(rate), 0)
        self._lib.espeak_SetParameter(self.PITCH, int(pitch), 0)
        self._lib.espeak_SetParameter(self.RANGE, int(pitch_range), 0)
        data = text.encode() + b"\0"
        status = self._lib.espeak_Synth(
            data, len(data), 0, 1, 0, self.CHARS_UTF8, None, None
        )
        self._lib.espeak_Synchronize()
        if status != 0 or not self._chunks:
            raise CorpusError(f"eSpeak NG's voice {voice} said nothing.")
        samples = np.concatenate(self._chunks) / 32768
        common = np.gcd(SAMPLE_RATE, self._rate)
        samples = resample_poly(
            samples, SAMPLE_RATE // common, self._rate // common
        )
        loud = np.flatnonzero(np.abs(samples) > 0.02 * np.abs(samples).max())
        return samples[loud[0] : loud[-1] + 1]


def find_espeak():
    """Finds the library and its data without loading either.

    Returns
    -------
    tuple
        Path of the shared library, path of espeak-ng-data.

    Raises
    ------
    CorpusError
        If the package espeakng-loader is missing.
    """
    try:
        import espeakng_loader
    except ImportError:
        raise CorpusError(
            "The corpus needs eSpeak NG: pip install 'sb_memeff[demo]'."
        ) from None
    return espeakng_loader.get_library_path(), espeakng_loader.get_data_path()


def draw_sentence(rng):
    """Draws one sentence of ten to fourteen words.

    Arguments
    ---------
    rng : np.random.Generator
        Source of randomness.

    Returns
    -------
    str
        The sentence.
    """

    def pick(words):
        return words[rng.integers(len(words))]

    def thing():
        return f"{pick(DETERMINERS)} {pick(ADJECTIVES)} {pick(NOUNS)}"

    main = f"{thing()} {pick(VERBS)} {thing()}"
    order = rng.integers(3)
    if order == 0:
        sentence = f"{main} {pick(PLACES)} {pick(TIMES)}."
    elif order == 1:
        sentence = f"{pick(TIMES)}, {main} {pick(PLACES)}."
    else:
        sentence = f"{pick(PLACES)} {main}, {pick(TIMES)}."
    return sentence[0].upper() + sentence[1:]


def plan_speakers(options):
    """Hands out names, voices and texts.

    Arguments
    ---------
    options : Options
        What the corpus consists of.

    Returns
    -------
    tuple
        Training speakers and test speakers, two lists of Speaker.
    """
    rng = np.random.default_rng([options.seed, FORMAT])
    used = set()

    def new_sentence():
        while True:
            sentence = draw_sentence(rng)
            if sentence not in used:
                used.add(sentence)
                return sentence

    def plan(variants, first, count, sessions, utterances):
        # Spread over the list, or a smaller corpus would hold adam to iven.
        chosen = [variants[i * len(variants) // count] for i in range(count)]
        return [
            Speaker(
                f"id{first + i:05d}",
                f"{ACCENTS[i % len(ACCENTS)]}+{variant}",
                (options.seed, FORMAT, first + i),
                tuple(
                    tuple(
                        (new_sentence(), new_sentence())
                        for _ in range(utterances)
                    )
                    for _ in range(sessions)
                ),
            )
            for i, variant in enumerate(chosen)
        ]

    train = plan(
        TRAIN_VARIANTS,
        10001,
        options.train_speakers,
        options.train_sessions,
        options.train_utterances,
    )
    test = plan(
        TEST_VARIANTS,
        20001,
        options.test_speakers,
        options.test_sessions,
        options.test_utterances,
    )
    return train, test


class Channel:
    """Room, equalizer and noise of one session.

    Arguments
    ---------
    rng : np.random.Generator
        Source of randomness.
    """

    POINTS_HZ = (50, 150, 400, 1000, 2500, 5000, 8000)

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
        self._gains_db = rng.normal(0, 2.5, len(self.POINTS_HZ))
        self._noise_slope = rng.uniform(0, 1.5)
        self._snr_db = rng.uniform(14, 28)
        self._level_db = rng.uniform(-32, -20)

    def _filter(self, samples, gains):
        spectrum = np.fft.rfft(samples)
        hertz = np.fft.rfftfreq(len(samples), 1 / SAMPLE_RATE)
        return np.fft.irfft(spectrum * gains(hertz), len(samples))

    def _equalize(self, hertz):
        octave = np.log2(np.maximum(hertz, 1))
        gain_db = np.interp(octave, np.log2(self.POINTS_HZ), self._gains_db)
        return 10 ** (gain_db / 20)

    def _colour(self, hertz):
        return np.maximum(hertz, 50) ** (-self._noise_slope / 2)

    def __call__(self, samples):
        """Sends a clean utterance through the channel.

        Arguments
        ---------
        samples : np.ndarray
            The clean utterance.

        Returns
        -------
        np.ndarray
            As many samples, between -1 and 1.
        """
        count = len(samples)
        samples = fftconvolve(samples, self._response)[:count]
        samples = self._filter(samples, self._equalize)
        samples /= samples.std()
        noise = self._rng.standard_normal(count)
        noise = self._filter(noise, self._colour)
        noise *= 10 ** (-self._snr_db / 20) / noise.std()
        mixed = (samples + noise) * 10 ** (self._level_db / 20)
        return np.clip(mixed, -0.99, 0.99)


def write_speaker(job):
    """Speaks and writes all of one speaker; to be run in a fresh process.

    Arguments
    ---------
    job : tuple
        Folder `wav` of the corpus, and the Speaker.

    Returns
    -------
    float
        Seconds of audio written.
    """
    folder, speaker = job
    rng = np.random.default_rng(speaker.seed)
    espeak = Espeak(seed=int(rng.integers(1, 2**31)))
    usual_rate = rng.uniform(150, 190)
    seconds = 0.0
    for s, texts in enumerate(speaker.texts):
        pitch = np.clip(rng.normal(50, 9), 25, 75)
        pitch_range = rng.uniform(25, 75)
        rate = usual_rate * rng.uniform(0.88, 1.12)
        channel = Channel(rng)
        session = Path(folder) / speaker.name / f"s{s:02d}"
        session.mkdir(parents=True)
        for u, (first, second) in enumerate(texts):
            how = (speaker.voice, rate, pitch + rng.normal(0, 2), pitch_range)
            length = int(SAMPLE_RATE * rng.uniform(3.1, 4.0))
            samples = espeak.say(first, *how)
            if len(samples) < length:
                samples = espeak.say(f"{first} {second}", *how)
            samples = channel(samples[:length])
            soundfile.write(
                session / f"{u:05d}.wav", samples, SAMPLE_RATE, subtype="PCM_16"
            )
            seconds += len(samples) / SAMPLE_RATE
    return seconds


def list_trials(speakers):
    """Lists verification trials: every pair of two sessions.

    Pairs within a session are left out, since a shared channel gives them
    away, and so they are in VoxCeleb.

    Arguments
    ---------
    speakers : list
        The test speakers.

    Returns
    -------
    list
        Lines of veri_test.txt.
    """
    names = [
        (speaker.name, f"s{s:02d}", f"{u:05d}.wav")
        for speaker in speakers
        for s, texts in enumerate(speaker.texts)
        for u in range(len(texts))
    ]
    return [
        f"{int(a[0] == b[0])} {'/'.join(a)} {'/'.join(b)}"
        for a, b in itertools.combinations(names, 2)
        if a[:2] != b[:2]
    ]


def digest_audio(folder):
    """Hashes names and bytes of all audio files.

    Arguments
    ---------
    folder : Path
        Folder `wav` of the corpus.

    Returns
    -------
    str
        A hexadecimal SHA-256.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.wav")):
        digest.update(path.relative_to(folder).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def read_manifest(out):
    """Reads what an earlier run left.

    Arguments
    ---------
    out : Path
        Folder of the corpus.

    Returns
    -------
    dict
        The manifest; empty if there is none.
    """
    try:
        return json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return {}


def make_corpus(out, options=None, workers=None, progress=True):
    """Makes the corpus, unless it is there.

    Arguments
    ---------
    out : str or Path
        Folder of the corpus.
    options : Options
        What it consists of; None for the demo's.
    workers : int
        Processes that speak at the same time; None for one a core.
    progress : bool
        Whether to draw a progress bar.

    Returns
    -------
    dict
        The manifest, with a key `cached` that says whether it was there.

    Raises
    ------
    CorpusError
        If eSpeak NG is missing, or `out` holds something else.
    """
    out = Path(out).resolve()
    options = Options() if options is None else options
    manifest = read_manifest(out)
    present = len(list(out.glob("wav/*/*/*.wav")))
    if (
        manifest.get("options_sha256") == options.fingerprint()
        and manifest["utterances"] == present
        and (out / "veri_test.txt").exists()
    ):
        return {**manifest, "cached": True}
    if not manifest and out.exists() and any(out.iterdir()):
        raise CorpusError(f"{out} holds something else: choose another folder.")
    find_espeak()

    # Made aside and moved: an interrupted run leaves no half corpus behind.
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "wav").mkdir(parents=True)
    train, test = plan_speakers(options)
    jobs = [(str(partial / "wav"), speaker) for speaker in train + test]
    bar = tqdm(
        total=len(jobs), desc="voices", unit="voice", disable=not progress
    )
    with bar, fresh_processes(workers) as pool:
        seconds = 0.0
        for spoken in pool.imap_unordered(write_speaker, jobs):
            seconds += spoken
            bar.update()
    trials = list_trials(test)
    (partial / "veri_test.txt").write_text(
        "\n".join(trials) + "\n", encoding="utf-8"
    )
    manifest = {
        "options_sha256": options.fingerprint(),
        "options": dataclasses.asdict(options),
        "utterances": len(list(partial.glob("wav/*/*/*.wav"))),
        "minutes": round(seconds / 60, 2),
        "trials": len(trials),
        "target_trials": sum(line[0] == "1" for line in trials),
        "audio_sha256": digest_audio(partial / "wav"),
        "voices": {speaker.name: speaker.voice for speaker in train + test},
    }
    (partial / "manifest.json").write_text(
        json.dumps(manifest, indent=1) + "\n", encoding="utf-8"
    )
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)
    return {**manifest, "cached": False}


def fresh_processes(workers):
    """Starts a pool in which every speaker gets a process of its own.

    Arguments
    ---------
    workers : int
        Processes at the same time; None for one a core.

    Returns
    -------
    multiprocessing.pool.Pool
        The pool.
    """
    methods = multiprocessing.get_all_start_methods()
    # A fork server loads the libraries once, not once a speaker.
    method = "forkserver" if "forkserver" in methods else "spawn"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(["soundfile", "scipy.signal", "tqdm"])
    return context.Pool(workers or os.cpu_count(), maxtasksperchild=1)


def describe(manifest):
    """Puts a manifest into one line.

    Arguments
    ---------
    manifest : dict
        As make_corpus returns it.

    Returns
    -------
    str
        The line.
    """
    options = manifest["options"]
    return (
        f"{options['train_speakers']} training and "
        f"{options['test_speakers']} unseen test speakers, "
        f"{manifest['utterances']} utterances, {manifest['minutes']:.0f} min, "
        f"{manifest['trials']} trials ({manifest['target_trials']} target)"
        + (", cached" if manifest["cached"] else "")
    )


def main(argv=None):
    """Runs the command line.

    Arguments
    ---------
    argv : list
        Arguments; None for those of the process.

    Returns
    -------
    int
        Exit status.
    """
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", type=Path, help="folder of the corpus")
    for field in dataclasses.fields(Options):
        parser.add_argument(
            "--" + field.name.replace("_", "-"),
            type=int,
            default=field.default,
            help="default: %(default)s",
        )
    parser.add_argument(
        "--workers", type=int, help="processes; default: one a core"
    )
    arguments = vars(parser.parse_args(argv))
    out, workers = arguments.pop("out"), arguments.pop("workers")
    started = time.perf_counter()
    try:
        manifest = make_corpus(out, Options(**arguments), workers)
    except CorpusError as error:
        print(f"make_corpus: {error}", file=sys.stderr)
        return 1
    print(
        f"{out}: {describe(manifest)} ({time.perf_counter() - started:.1f} s)"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
