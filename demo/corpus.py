"""Corpora of spoken digits that are made once and found again.

An utterance is a string of digits, with or without pauses between them; no
string occurs twice. The speakers are voices of eSpeak NG: one variant with one
accent is one speaker. A session of a speaker has its own pitch, rate, room,
equalizer and noise, as a VoxCeleb video has, so that neither the spectrum of
the channel nor the pitch alone tells who speaks.

Authors
 * The sb_memeff authors 2026
"""

import dataclasses
import hashlib
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable

import numpy as np
import soundfile
from channel import Channel
from tqdm import tqdm
from voices import (
    SAMPLE_RATE,
    TEST_VARIANTS,
    TRAIN_VARIANTS,
    Espeak,
    choose_voices,
    find_espeak,
)

WORDS = "zero one two three four five six seven eight nine".split()
# Of the code below and of all that it calls. Without a new number an earlier
# corpus passes for one that changed code would make.
FORMAT = 2


@dataclasses.dataclass(frozen=True)
class Speaker:
    """One speaker, complete enough for a process of its own.

    Arguments
    ---------
    voice : str
        eSpeak NG's name of the voice, accent+variant.
    seed : tuple
        Seed of the speaker's own random stream.
    sessions : list
        For each session, which has one channel, a dict from the path of an
        audio file in the corpus to its text, a tuple of str.
    """

    voice: str
    seed: tuple
    sessions: list


@dataclasses.dataclass(frozen=True)
class Corpus:
    """How a corpus is made. The same options give the same bytes on every run.

    Arguments
    ---------
    name : str
        Its folder's name begins with this.
    audio : str
        Path of an audio file, a format of split, speaker, session, utterance.
    lists : callable
        Maps speakers to transcripts or trials: path in the corpus to content.
    digits : tuple
        Fewest and most digits of an utterance.
    train_speakers, test_speakers : int
        Numbers of the speakers.
    train_sessions, test_sessions : tuple
        Split and number of utterances of each session of such a speaker.
    seed : int
        Seed of all that is drawn.
    """

    name: str
    audio: str
    lists: Callable
    digits: tuple
    train_speakers: int
    train_sessions: tuple
    test_speakers: int
    test_sessions: tuple
    seed: int

    def plan(self):
        """Hands out voices and texts; returns a list of Speaker."""
        rng = np.random.default_rng([self.seed, FORMAT])
        texts = distinct(lambda: draw_text(rng, *self.digits))
        train = choose_voices(TRAIN_VARIANTS, self.train_speakers)
        test = choose_voices(TEST_VARIANTS, self.test_speakers)
        return [
            Speaker(
                voice,
                (self.seed, FORMAT, number),
                [
                    {
                        self.audio.format(
                            split=split, speaker=number, session=s, utterance=u
                        ): next(texts)
                        for u in range(utterances)
                    }
                    for s, (split, utterances) in enumerate(sessions, 1)
                ],
            )
            for first, voices, sessions in (
                (101, train, self.train_sessions),
                (201, test, self.test_sessions),
            )
            for number, voice in enumerate(voices, first)
        ]

    def make(self, folder, workers=None):
        """Makes the corpus, unless it is there.

        Arguments
        ---------
        folder : Path
            Folder of corpora.
        workers : int
            Processes that speak at the same time; None for one a core.

        Returns
        -------
        tuple
            The corpus' own folder, and a dict of numbers for the user.

        Raises
        ------
        CorpusError
            If eSpeak NG is missing, or lacks voices.
        """
        speakers = self.plan()
        audio, lists = audio_files(speakers), self.lists(speakers)
        # The name tells what is inside: other options, another folder.
        digest = hashlib.sha256(repr((FORMAT, speakers)).encode()).hexdigest()
        out = folder / f"{self.name}-{digest[:8]}"
        manifest = out / "manifest.json"
        if all((out / path).exists() for path in (*audio, *lists, manifest)):
            return out, {**json.loads(manifest.read_text()), "cached": True}
        find_espeak()

        # Made aside and moved: an interrupted run leaves no half corpus behind.
        partial = out.with_name(out.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        found = {
            "train_speakers": self.train_speakers,
            "test_speakers": self.test_speakers,
            "utterances": len(audio),
            "minutes": speak_all(partial, speakers, workers),
        }
        lists[manifest.name] = json.dumps(found, indent=1) + "\n"
        for path, text in lists.items():
            (partial / path).write_text(text, encoding="utf-8")
        shutil.rmtree(out, ignore_errors=True)
        partial.rename(out)
        return out, {**found, "cached": False}


def describe(found):
    """Puts the numbers of a corpus into one line."""
    return (
        f"{found['train_speakers']} training and {found['test_speakers']} "
        f"unseen test speakers, {found['utterances']} utterances, "
        f"{found['minutes']:.0f} min" + (", cached" if found["cached"] else "")
    )


def distinct(draw):
    """Draws at random, and yields nothing twice."""
    drawn = set()
    while True:
        one = draw()
        if one not in drawn:
            drawn.add(one)
            yield one


def draw_text(rng, fewest, most):
    """Draws a string of digits, a tuple of str."""
    count = rng.integers(fewest, most + 1)
    return tuple(WORDS[i] for i in rng.integers(len(WORDS), size=count))


def audio_files(speakers):
    """Paths of the audio files in the corpus."""
    return [
        path
        for speaker in speakers
        for session in speaker.sessions
        for path in session
    ]


def speak_all(folder, speakers, workers):
    """Writes the audio of all speakers; returns its minutes.

    eSpeak NG's state is global and lives on from one utterance to the next, so
    each speaker gets a fresh process.
    """
    # A fork server loads the libraries once, not once a speaker.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["soundfile", "scipy.signal", "tqdm"])
    jobs = [(folder, speaker) for speaker in speakers]
    with context.Pool(workers or os.cpu_count(), maxtasksperchild=1) as pool:
        samples = sum(
            tqdm(
                pool.imap_unordered(speak_one, jobs),
                total=len(jobs),
                desc="voices",
                unit="voice",
                # None: unless the output goes elsewhere than to a terminal.
                disable=None,
            )
        )
    return round(samples / SAMPLE_RATE / 60, 2)


def speak_one(job):
    """Writes the audio of one speaker; returns the number of its samples."""
    folder, speaker = job
    rng = np.random.default_rng(speaker.seed)
    espeak = Espeak(seed=int(rng.integers(1, 2**31)))
    usual_rate = rng.uniform(130, 170)
    written = 0
    for session in speaker.sessions:
        usual_pitch = np.clip(rng.normal(50, 9), 25, 75)
        pitch_range = rng.uniform(25, 75)
        rate = usual_rate * rng.uniform(0.88, 1.12)
        channel = Channel(rng)
        for path, text in session.items():
            # A comma is a pause.
            gaps = rng.choice([" ", ", "], len(text), p=[0.7, 0.3])
            line = "".join(f"{gap}{word}" for gap, word in zip(gaps, text))
            pitch = usual_pitch + rng.normal(0, 2)
            samples = espeak.say(
                line.lstrip(" ,"), speaker.voice, rate, pitch, pitch_range
            )
            # Room for the echo of the last word.
            silence = (SAMPLE_RATE * rng.uniform(0.1, 0.3, 2)).astype(int)
            samples = channel(np.pad(samples, silence))
            file = folder / path
            file.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(file, samples, SAMPLE_RATE, subtype="PCM_16")
            written += len(samples)
    return written
