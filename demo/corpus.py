"""A corpus of synthetic speakers that is made once and found again.

The same options give the same bytes on every run. OUT/manifest.json holds the
options, their hash, and a digest of the audio.

Authors
 * The sb_memeff authors 2026
"""

import dataclasses
import hashlib
import json
import multiprocessing
import os
import shutil
from pathlib import Path
from typing import ClassVar

import numpy as np
import soundfile
from channel import Channel
from tqdm import tqdm
from voices import (
    SAMPLE_RATE,
    TEST_VARIANTS,
    TRAIN_VARIANTS,
    CorpusError,
    Espeak,
    choose_voices,
    find_espeak,
)


@dataclasses.dataclass(frozen=True)
class Speaker:
    """One speaker, complete enough for a process of its own.

    Arguments
    ---------
    name : str
        The speaker's name in the corpus.
    voice : str
        eSpeak NG's name of the voice, accent+variant.
    seed : tuple
        Seed of the speaker's own random stream.
    sessions : list
        For each session, which has one channel, a dict from the path of an
        audio file in the corpus to its text, a tuple of str.
    """

    name: str
    voice: str
    seed: tuple
    sessions: list


@dataclasses.dataclass(frozen=True)
class Corpus:
    """How all corpora are made; the fields of a subclass are its options.

    FORMAT goes into the hash: any change to what the code writes must change
    it, or an earlier corpus passes for a new one. The formats SPEAKER and AUDIO
    take the speaker's number, and split, speaker, session and utterance.
    """

    FORMAT: ClassVar[int]
    SPEAKER: ClassVar[str]
    AUDIO: ClassVar[str]
    FIRST_SESSION: ClassVar[int]
    WORDS_PER_MINUTE: ClassVar[tuple]

    def groups(self):
        """Training and test speakers.

        Each group has the variants of its voices, the first speaker's number,
        how many speakers, and a (split, utterances) for each session.
        """
        raise NotImplementedError

    def draw_text(self, rng):
        """Draws the text of an utterance, a tuple of str."""
        raise NotImplementedError

    def speak(self, rng, say, pitch, text):
        """Clean samples of a text, where say(str, pitch) calls eSpeak NG."""
        raise NotImplementedError

    def lists(self, speakers):
        """Transcripts or trials: path in the corpus to content."""
        raise NotImplementedError

    def counts(self, speakers):
        """Numbers for the manifest."""
        raise NotImplementedError

    def describe_counts(self, manifest):
        """Puts these numbers into words."""
        raise NotImplementedError

    def plan(self):
        """Hands out names, voices and texts; returns a list of Speaker."""
        rng = np.random.default_rng([self.seed, self.FORMAT])
        texts = distinct(lambda: self.draw_text(rng))
        speakers = []
        for variants, first, count, sizes in self.groups():
            voices = choose_voices(variants, count)
            for number, voice in enumerate(voices, first):
                name = self.SPEAKER.format(number)
                sessions = [
                    {
                        self.AUDIO.format(
                            split=split, speaker=name, session=s, utterance=u
                        ): next(texts)
                        for u in range(size)
                    }
                    for s, (split, size) in enumerate(sizes, self.FIRST_SESSION)
                ]
                seed = (self.seed, self.FORMAT, number)
                speakers.append(Speaker(name, voice, seed, sessions))
        return speakers

    def make(self, out, workers=None, progress=True):
        """Makes the corpus, unless it is there.

        Arguments
        ---------
        out : str or Path
            Folder of the corpus.
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
        speakers = self.plan()
        audio, lists = audio_files(speakers), self.lists(speakers)
        manifest = read_manifest(out)
        if manifest.get("options_sha256") == self.fingerprint() and all(
            (out / path).exists() for path in (*audio, *lists)
        ):
            return {**manifest, "cached": True}
        options = dataclasses.asdict(self)
        # It will be deleted: another program's manifest.json is not enough.
        ours = manifest.get("options", {}).keys() == options.keys()
        empty = not out.exists() or (out.is_dir() and not any(out.iterdir()))
        if not (ours or empty):
            raise CorpusError(
                f"{out} holds something else: choose another folder."
            )
        find_espeak()

        # Made aside and moved: an interrupted run leaves no half corpus behind.
        partial = out.with_name(out.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        minutes = speak_all(self, partial, speakers, workers, progress)
        manifest = {
            "options_sha256": self.fingerprint(),
            "options": options,
            **self.counts(speakers),
            "minutes": minutes,
            "audio_sha256": digest(partial, audio),
            "voices": {speaker.name: speaker.voice for speaker in speakers},
        }
        lists["manifest.json"] = json.dumps(manifest, indent=1) + "\n"
        for path, text in lists.items():
            (partial / path).write_text(text, encoding="utf-8")
        shutil.rmtree(out, ignore_errors=True)
        partial.rename(out)
        return {**manifest, "cached": False}

    def describe(self, manifest):
        """Puts a manifest into one line."""
        return (
            f"{self.train_speakers} training and {self.test_speakers} unseen "
            f"test speakers, {self.describe_counts(manifest)}, "
            f"{manifest['minutes']:.0f} min"
            + (", cached" if manifest["cached"] else "")
        )

    def fingerprint(self):
        """Hashes everything that decides the bytes of the corpus."""
        options = dataclasses.asdict(self)
        decisive = [self.FORMAT, options, TRAIN_VARIANTS, TEST_VARIANTS]
        return hashlib.sha256(json.dumps(decisive).encode()).hexdigest()


def distinct(draw):
    """Draws at random, and yields nothing twice."""
    drawn = set()
    while True:
        one = draw()
        if one not in drawn:
            drawn.add(one)
            yield one


def audio_files(speakers):
    """Paths of the audio files in the corpus."""
    return [
        path
        for speaker in speakers
        for session in speaker.sessions
        for path in session
    ]


def read_manifest(out):
    """Reads the manifest of an earlier run; empty if there is none."""
    try:
        manifest = json.loads(
            (out / "manifest.json").read_text(encoding="utf-8")
        )
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    ours = isinstance(manifest, dict) and "options_sha256" in manifest
    return manifest if ours else {}


def digest(folder, paths):
    """Hashes names and bytes of files."""
    found = hashlib.sha256()
    for path in sorted(paths):
        found.update(path.encode())
        found.update((folder / path).read_bytes())
    return found.hexdigest()


def speak_all(corpus, folder, speakers, workers, progress):
    """Writes the audio of all speakers; returns its minutes.

    eSpeak NG's state is global and lives on from one utterance to the next, so
    each speaker gets a fresh process.
    """
    methods = multiprocessing.get_all_start_methods()
    # A fork server loads the libraries once, not once a speaker.
    method = "forkserver" if "forkserver" in methods else "spawn"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(["soundfile", "scipy.signal", "tqdm"])
    jobs = [(corpus, folder, speaker) for speaker in speakers]
    with context.Pool(workers or os.cpu_count(), maxtasksperchild=1) as pool:
        samples = sum(
            tqdm(
                pool.imap_unordered(speak_one, jobs),
                total=len(jobs),
                desc="voices",
                unit="voice",
                disable=not progress,
            )
        )
    return round(samples / SAMPLE_RATE / 60, 2)


def speak_one(job):
    """Writes the audio of one speaker; returns the number of its samples."""
    corpus, folder, speaker = job
    rng = np.random.default_rng(speaker.seed)
    espeak = Espeak(seed=int(rng.integers(1, 2**31)))
    usual_rate = rng.uniform(*corpus.WORDS_PER_MINUTE)
    written = 0
    for session in speaker.sessions:
        pitch = np.clip(rng.normal(50, 9), 25, 75)
        pitch_range = rng.uniform(25, 75)
        rate = usual_rate * rng.uniform(0.88, 1.12)
        channel = Channel(rng)

        def say(text, pitch, rate=rate, pitch_range=pitch_range):
            return espeak.say(text, speaker.voice, rate, pitch, pitch_range)

        for path, text in session.items():
            samples = channel(corpus.speak(rng, say, pitch, text))
            file = Path(folder) / path
            file.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(file, samples, SAMPLE_RATE, subtype="PCM_16")
            written += len(samples)
    return written
