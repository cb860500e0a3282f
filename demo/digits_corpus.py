"""A small corpus of spoken digits in the layout of LibriSpeech.

An utterance is a string of digits, with or without pauses between them. The
speakers are voices of eSpeak NG; a chapter of a speaker has its own pitch,
rate, room, equalizer and noise. No string occurs twice.

    OUT/<split>/<speaker>/<chapter>/<speaker>-<chapter>-<number>.flac    16 kHz
    OUT/<split>/<speaker>/<chapter>/<speaker>-<chapter>.trans.txt

The splits are train, dev and test. The speakers of dev are those of train;
those of test occur nowhere else.

Authors
 * The sb_memeff authors 2026
"""

import collections
import dataclasses
from pathlib import Path

import numpy as np
from corpus import Corpus, audio_files
from voices import SAMPLE_RATE, TEST_VARIANTS, TRAIN_VARIANTS

WORDS = "zero one two three four five six seven eight nine".split()
# Fewer, and strings would run out; more, and training would take longer.
SHORTEST, LONGEST = 3, 6


@dataclasses.dataclass(frozen=True)
class Digits(Corpus):
    """Settings of the corpus.

    A speaker has so many chapters of so many utterances each; dev has one more
    chapter of each training speaker.
    """

    FORMAT = 1
    SPEAKER = "{}"
    AUDIO = (
        "{split}/{speaker}/{session}/{speaker}-{session}-{utterance:04d}.flac"
    )
    FIRST_SESSION = 1
    WORDS_PER_MINUTE = (130, 170)

    train_speakers: int = 30
    train_chapters: int = 3
    train_utterances: int = 10
    dev_utterances: int = 2
    test_speakers: int = 16
    test_chapters: int = 2
    test_utterances: int = 4
    seed: int = 2211

    def groups(self):
        """Training speakers, who speak dev too, and test speakers."""
        train = [("train", self.train_utterances)] * self.train_chapters
        dev = [("dev", self.dev_utterances)]
        test = [("test", self.test_utterances)] * self.test_chapters
        return [
            (TRAIN_VARIANTS, 101, self.train_speakers, train + dev),
            (TEST_VARIANTS, 201, self.test_speakers, test),
        ]

    def draw_text(self, rng):
        """Draws a string of digits."""
        count = rng.integers(SHORTEST, LONGEST + 1)
        return tuple(WORDS[i] for i in rng.integers(len(WORDS), size=count))

    def speak(self, rng, say, pitch, text):
        """Speaks the digits, and leaves room for the echo of the last one."""
        # A comma is a pause.
        gaps = rng.choice([" ", ", "], len(text), p=[0.7, 0.3])
        line = "".join(f"{gap}{word}" for gap, word in zip(gaps, text))
        samples = say(line.lstrip(" ,"), pitch + rng.normal(0, 2))
        silence = (SAMPLE_RATE * rng.uniform(0.1, 0.3, 2)).astype(int)
        return np.pad(samples, silence)

    def lists(self, speakers):
        """A transcript for each chapter."""
        transcripts = {}
        for speaker in speakers:
            for session in speaker.sessions:
                chapter = next(iter(session)).rpartition("-")[0]
                transcripts[f"{chapter}.trans.txt"] = "".join(
                    f"{Path(path).stem} {' '.join(text).upper()}\n"
                    for path, text in session.items()
                )
        return transcripts

    def counts(self, speakers):
        """Utterances of each split, and chapters."""
        splits = (path.partition("/")[0] for path in audio_files(speakers))
        return {
            "utterances": dict(collections.Counter(splits)),
            "chapters": sum(len(speaker.sessions) for speaker in speakers),
        }

    def describe_counts(self, manifest):
        """Utterances of each split."""
        splits = manifest["utterances"]
        return (
            f"{' + '.join(map(str, splits.values()))} utterances "
            f"({', '.join(splits)})"
        )
