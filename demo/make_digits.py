"""Makes a small corpus of spoken digits in the layout of LibriSpeech.

An utterance is a string of digits, with or without pauses between them. The
speakers are voices of eSpeak NG; a chapter of a speaker has its own pitch,
rate, room, equalizer and noise. No string occurs twice.

    python demo/make_digits.py data/demo/digits

writes

    OUT/<split>/<speaker>/<chapter>/<speaker>-<chapter>-<number>.flac    16 kHz
    OUT/<split>/<speaker>/<chapter>/<speaker>-<chapter>.trans.txt
    OUT/manifest.json       options, their hash, digest of the audio

for the splits train, dev and test. The speakers of dev are those of train;
those of test occur nowhere else. The same options make the same bytes on
every run, and a second run finds the first one's result.

Authors
 * The sb_memeff authors 2026
"""

import dataclasses
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

WORDS = "zero one two three four five six seven eight nine".split()
# Fewer, and strings would run out; more, and training would take longer.
SHORTEST, LONGEST = 3, 6


@dataclasses.dataclass(frozen=True)
class Options(CorpusOptions):
    """Settings of the corpus.

    Arguments
    ---------
    train_speakers : int
        Number of training speakers.
    train_chapters : int
        Chapters of each of them in train.
    train_utterances : int
        Utterances of each training chapter.
    dev_utterances : int
        Utterances of each training speaker in dev, one chapter.
    test_speakers : int
        Number of unseen test speakers.
    test_chapters : int
        Chapters of each test speaker.
    test_utterances : int
        Utterances of each test chapter.
    seed : int
        Decides everything that is drawn at random.
    """

    FORMAT = 1

    train_speakers: int = 30
    train_chapters: int = 3
    train_utterances: int = 10
    dev_utterances: int = 2
    test_speakers: int = 16
    test_chapters: int = 2
    test_utterances: int = 4
    seed: int = 2211


@dataclasses.dataclass(frozen=True)
class Chapter:
    """Utterances of one speaker over one channel.

    Arguments
    ---------
    split : str
        train, dev or test.
    number : int
        Its number among the speaker's.
    texts : tuple
        For every utterance a tuple of words.
    """

    split: str
    number: int
    texts: tuple


@dataclasses.dataclass(frozen=True)
class Speaker:
    """One speaker's part of the work, complete enough for another process.

    Arguments
    ---------
    name : str
        The speaker's folder, a number.
    voice : str
        eSpeak NG's name of the voice, accent+variant.
    seed : tuple
        Seed of the speaker's own random stream.
    chapters : tuple
        Of Chapter.
    """

    name: str
    voice: str
    seed: tuple
    chapters: tuple


def draw_digits(rng):
    """Draws a string of digits.

    Arguments
    ---------
    rng : np.random.Generator
        Source of randomness.

    Returns
    -------
    tuple
        The words.
    """
    count = rng.integers(SHORTEST, LONGEST + 1)
    return tuple(WORDS[digit] for digit in rng.integers(len(WORDS), size=count))


def plan_speakers(options):
    """Hands out names, voices and texts.

    Arguments
    ---------
    options : Options
        What the corpus consists of.

    Returns
    -------
    list
        Of Speaker.
    """
    rng = np.random.default_rng([options.seed, options.FORMAT])
    texts = unrepeated(lambda: draw_digits(rng))

    def plan(variants, first, count, chapters):
        return [
            Speaker(
                str(first + i),
                voice,
                (options.seed, options.FORMAT, first + i),
                tuple(
                    Chapter(split, number, tuple(next(texts) for _ in range(n)))
                    for number, (split, n) in enumerate(chapters, 1)
                ),
            )
            for i, voice in enumerate(choose_voices(variants, count))
        ]

    train = [("train", options.train_utterances)] * options.train_chapters
    dev = [("dev", options.dev_utterances)]
    test = [("test", options.test_utterances)] * options.test_chapters
    return [
        *plan(TRAIN_VARIANTS, 101, options.train_speakers, train + dev),
        *plan(TEST_VARIANTS, 201, options.test_speakers, test),
    ]


def write_speaker(job):
    """Speaks and writes all of one speaker; to be run in a fresh process.

    Arguments
    ---------
    job : tuple
        Folder of the corpus, and the Speaker.

    Returns
    -------
    int
        Samples written.
    """
    folder, speaker = job
    rng = np.random.default_rng(speaker.seed)
    espeak = Espeak(seed=int(rng.integers(1, 2**31)))
    usual_rate = rng.uniform(130, 170)
    written = 0
    for chapter in speaker.chapters:
        pitch = np.clip(rng.normal(50, 9), 25, 75)
        pitch_range = rng.uniform(25, 75)
        rate = usual_rate * rng.uniform(0.88, 1.12)
        channel = Channel(rng)
        prefix = f"{speaker.name}-{chapter.number}"
        place = (
            Path(folder) / chapter.split / speaker.name / str(chapter.number)
        )
        place.mkdir(parents=True)
        lines = []
        for u, words in enumerate(chapter.texts):
            # A comma is a pause.
            gaps = rng.choice([" ", ", "], len(words), p=[0.7, 0.3])
            text = "".join(f"{gap}{word}" for gap, word in zip(gaps, words))
            how = (speaker.voice, rate, pitch + rng.normal(0, 2), pitch_range)
            samples = espeak.say(text.lstrip(" ,"), *how)
            # Room for the echo of the last word.
            silence = (SAMPLE_RATE * rng.uniform(0.1, 0.3, 2)).astype(int)
            samples = channel(np.pad(samples, silence))
            name = f"{prefix}-{u:04d}"
            soundfile.write(
                place / f"{name}.flac", samples, SAMPLE_RATE, subtype="PCM_16"
            )
            lines.append(f"{name} {' '.join(words).upper()}\n")
            written += len(samples)
        (place / f"{prefix}.trans.txt").write_text(
            "".join(lines), encoding="utf-8"
        )
    return written


def make_digits(out, options=None, workers=None, progress=True):
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

    def count(folder):
        splits = ("train", "dev", "test")
        return {
            split: len(list(folder.glob(f"{split}/*/*/*.flac")))
            for split in splits
        }

    def complete(folder, manifest):
        texts = len(list(folder.glob("*/*/*/*.trans.txt")))
        return (
            count(folder) == manifest["utterances"]
            and texts == manifest["chapters"]
        )

    def write(folder):
        speakers = plan_speakers(options)
        jobs = [(str(folder), speaker) for speaker in speakers]
        minutes = speak_all(write_speaker, jobs, workers, progress)
        return {
            "utterances": count(folder),
            "chapters": sum(len(speaker.chapters) for speaker in speakers),
            "minutes": minutes,
            "audio_sha256": digest_audio(folder, "*.flac"),
            "voices": {speaker.name: speaker.voice for speaker in speakers},
        }

    return make_once(out, options, complete, write)


def describe(manifest):
    """Puts a manifest into one line.

    Arguments
    ---------
    manifest : dict
        As make_digits returns it.

    Returns
    -------
    str
        The line.
    """
    options, utterances = manifest["options"], manifest["utterances"]
    return (
        f"{options['train_speakers']} training and "
        f"{options['test_speakers']} unseen test speakers, "
        f"{' + '.join(map(str, utterances.values()))} utterances "
        f"({', '.join(utterances)}), {manifest['minutes']:.0f} min"
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
        "make_digits", __doc__, Options, make_digits, describe, argv
    )


if __name__ == "__main__":
    sys.exit(main())
