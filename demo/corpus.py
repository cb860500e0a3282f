"""A corpus that is made once and found again.

The same options make the same bytes. OUT/manifest.json holds the options,
their hash, and a digest of the audio.

Authors
 * The sb_memeff authors 2026
"""

import argparse
import dataclasses
import hashlib
import json
import multiprocessing
import os
import shutil
import sys
import time
from pathlib import Path
from typing import ClassVar

from tqdm import tqdm
from voices import (
    SAMPLE_RATE,
    TEST_VARIANTS,
    TRAIN_VARIANTS,
    CorpusError,
    find_espeak,
)


@dataclasses.dataclass(frozen=True)
class CorpusOptions:
    """Settings of a corpus: a subclass adds its counts, and a seed.

    FORMAT goes into the hash: any change to what the code writes must change
    it, or caches go stale.
    """

    FORMAT: ClassVar[int]
    LIMITS: ClassVar[dict] = {
        "train_speakers": len(TRAIN_VARIANTS),
        "test_speakers": len(TEST_VARIANTS),
    }

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            highest = self.LIMITS.get(name, 1000)
            if name != "seed" and not 1 <= value <= highest:
                raise CorpusError(f"{name} must lie in 1..{highest}: {value}")

    def fingerprint(self):
        """Hashes everything that decides the bytes of the corpus.

        Returns
        -------
        str
            A hexadecimal SHA-256.
        """
        what = [
            self.FORMAT,
            dataclasses.asdict(self),
            TRAIN_VARIANTS,
            TEST_VARIANTS,
        ]
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()


def unrepeated(draw):
    """Draws what was not drawn before.

    Arguments
    ---------
    draw : callable
        Returns something hashable, at random.

    Yields
    ------
    object
        What was drawn.

    Raises
    ------
    CorpusError
        If nothing new seems to be left.
    """
    used, failures = set(), 0
    while failures < 10000:
        drawn = draw()
        failures += 1
        if drawn not in used:
            used.add(drawn)
            failures = 0
            yield drawn
    raise CorpusError(
        f"There are only {len(used)} different texts: fewer utterances, please."
    )


def make_once(out, options, complete, write):
    """Makes a corpus, unless it is there.

    Arguments
    ---------
    out : str or Path
        Folder of the corpus.
    options : CorpusOptions
        What it consists of.
    complete : callable
        Takes the folder and the manifest; whether no file is lost.
    write : callable
        Takes an empty folder and writes the corpus; returns what the manifest
        says about it.

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
    settings = dataclasses.asdict(options)
    manifest = read_manifest(out)
    if manifest.get("options_sha256") == options.fingerprint() and complete(
        out, manifest
    ):
        return {**manifest, "cached": True}
    # It will be deleted: another program's manifest.json is not enough.
    ours = manifest.get("options", {}).keys() == settings.keys()
    empty = not out.exists() or (out.is_dir() and not any(out.iterdir()))
    if not (ours or empty):
        raise CorpusError(f"{out} holds something else: choose another folder.")
    find_espeak()

    # Made aside and moved: an interrupted run leaves no half corpus behind.
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    manifest = {
        "options_sha256": options.fingerprint(),
        "options": settings,
        **write(partial),
    }
    (partial / "manifest.json").write_text(
        json.dumps(manifest, indent=1) + "\n", encoding="utf-8"
    )
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)
    return {**manifest, "cached": False}


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
        manifest = json.loads(
            (out / "manifest.json").read_text(encoding="utf-8")
        )
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    ours = isinstance(manifest, dict) and "options_sha256" in manifest
    return manifest if ours else {}


def speak_all(write_speaker, jobs, workers=None, progress=True):
    """Lets all speakers speak, each in a fresh process.

    Arguments
    ---------
    write_speaker : callable
        Takes a job and returns the number of samples that it wrote.
    jobs : list
        One for each speaker.
    workers : int
        Processes at the same time; None for one a core.
    progress : bool
        Whether to draw a progress bar.

    Returns
    -------
    float
        Minutes of audio.
    """
    samples = 0
    bar = tqdm(
        total=len(jobs), desc="voices", unit="voice", disable=not progress
    )
    with bar, fresh_processes(workers) as pool:
        for written in pool.imap_unordered(write_speaker, jobs):
            samples += written
            bar.update()
    return round(samples / SAMPLE_RATE / 60, 2)


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


def digest_audio(folder, pattern):
    """Hashes names and bytes of all audio files.

    Arguments
    ---------
    folder : Path
        What the names are relative to.
    pattern : str
        Which files, e.g. "*.wav".

    Returns
    -------
    str
        A hexadecimal SHA-256.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.rglob(pattern)):
        digest.update(path.relative_to(folder).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def command_line(name, doc, kind, make, describe, argv=None):
    """Runs the command line of a script that makes a corpus.

    Arguments
    ---------
    name : str
        The script.
    doc : str
        Its description.
    kind : type
        Its CorpusOptions.
    make : callable
        Takes folder, options and workers; returns the manifest.
    describe : callable
        Puts a manifest into one line.
    argv : list
        Arguments; None for those of the process.

    Returns
    -------
    int
        Exit status.
    """
    parser = argparse.ArgumentParser(
        description=doc.partition("\nAuthors\n")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", type=Path, help="folder of the corpus")
    for field in dataclasses.fields(kind):
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
        manifest = make(out, kind(**arguments), workers)
    except CorpusError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    seconds = time.perf_counter() - started
    print(f"{out}: {describe(manifest)} ({seconds:.1f} s)")
    return 0
