"""Makes a small multi-speaker corpus in the layout of VoxCeleb.

The speakers are voice variants of eSpeak NG: one variant and one accent make
one speaker. A session of a speaker has its own pitch, rate, room, equalizer
and noise, as a VoxCeleb video has, so that neither the spectrum of the channel
nor the pitch alone tells who speaks. No text occurs twice.

    python demo/make_speakers.py data/demo/voices

writes

    OUT/wav/<speaker>/<session>/<utterance>.wav    16 kHz, 16 bit
    OUT/veri_test.txt       "1 a.wav b.wav" same speaker, "0 a.wav b.wav" not
    OUT/manifest.json       options, their hash, digest of the audio

The speakers of veri_test.txt occur in no training file. The same options make
the same bytes on every run, and a second run finds the first one's result.

Authors
 * The sb_memeff authors 2026
"""

import dataclasses
import itertools
import sys
from pathlib import Path

import numpy as np
import soundfile
from channel import Channel
from corpus import (
    CorpusOptions,
    command_line,
    digest_audio,
    make_once,
    speak_all,
    unrepeated,
)
from voices import (
    SAMPLE_RATE,
    TEST_VARIANTS,
    TRAIN_VARIANTS,
    Espeak,
    choose_voices,
)

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


@dataclasses.dataclass(frozen=True)
class Options(CorpusOptions):
    """Settings of the corpus.

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

    FORMAT = 1

    train_speakers: int = 60
    train_sessions: int = 3
    train_utterances: int = 3
    test_speakers: int = 16
    test_sessions: int = 4
    test_utterances: int = 2
    seed: int = 2412


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
    rng = np.random.default_rng([options.seed, options.FORMAT])
    sentences = unrepeated(lambda: draw_sentence(rng))

    def plan(variants, first, count, sessions, utterances):
        return [
            Speaker(
                f"id{first + i:05d}",
                voice,
                (options.seed, options.FORMAT, first + i),
                tuple(
                    tuple(
                        (next(sentences), next(sentences))
                        for _ in range(utterances)
                    )
                    for _ in range(sessions)
                ),
            )
            for i, voice in enumerate(choose_voices(variants, count))
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


def write_speaker(job):
    """Speaks and writes all of one speaker; to be run in a fresh process.

    Arguments
    ---------
    job : tuple
        Folder `wav` of the corpus, and the Speaker.

    Returns
    -------
    int
        Samples written.
    """
    folder, speaker = job
    rng = np.random.default_rng(speaker.seed)
    espeak = Espeak(seed=int(rng.integers(1, 2**31)))
    usual_rate = rng.uniform(150, 190)
    written = 0
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
            written += len(samples)
    return written


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


def make_speakers(out, options=None, workers=None, progress=True):
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
    options = Options() if options is None else options

    def complete(folder, manifest):
        present = len(list(folder.glob("wav/*/*/*.wav")))
        return (
            present == manifest["utterances"]
            and (folder / "veri_test.txt").exists()
        )

    def write(folder):
        wav = folder / "wav"
        wav.mkdir()
        train, test = plan_speakers(options)
        speakers = train + test
        jobs = [(str(wav), speaker) for speaker in speakers]
        minutes = speak_all(write_speaker, jobs, workers, progress)
        trials = list_trials(test)
        (folder / "veri_test.txt").write_text(
            "\n".join(trials) + "\n", encoding="utf-8"
        )
        return {
            "utterances": len(list(wav.glob("*/*/*.wav"))),
            "minutes": minutes,
            "trials": len(trials),
            "target_trials": sum(line[0] == "1" for line in trials),
            "audio_sha256": digest_audio(wav, "*.wav"),
            "voices": {speaker.name: speaker.voice for speaker in speakers},
        }

    return make_once(out, options, complete, write)


def describe(manifest):
    """Puts a manifest into one line.

    Arguments
    ---------
    manifest : dict
        As make_speakers returns it.

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
    return command_line(
        "make_speakers", __doc__, Options, make_speakers, describe, argv
    )


if __name__ == "__main__":
    sys.exit(main())
