#!/usr/bin/env python3
"""Converts VoxCeleb2 from m4a to wav or flac, with ffmpeg.

    python voxceleb_convert.py /data/vox2/dev/aac /data/vox2

writes /data/vox2/wav/<speaker>/<session>/<utterance>.wav, 16 kHz, mono. A killed
run continues. Files that ffmpeg cannot decode are listed in
/data/vox2/not_converted.csv.

Authors
 * The sb_memeff authors 2026
"""

import argparse
import os
import shutil
import subprocess
import sys
from multiprocessing.pool import ThreadPool
from pathlib import Path

from tqdm import tqdm

from sb_memeff.dataio.preparation import read_header, write_csv

SAMPLE_RATE = 16000


def convert(source, target):
    """Converts a file, unless it is converted already.

    Arguments
    ---------
    source : Path
        The m4a file.
    target : Path
        The wav or flac file. It appears when it is complete and verified.

    Returns
    -------
    str or None
        Why it failed.
    """
    if target.is_file():
        return None
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f"partial-{target.name}")
    options = ["-nostdin", "-loglevel", "error", "-xerror", "-y"]
    output = ["-ar", str(SAMPLE_RATE), "-ac", "1"]
    done = subprocess.run(
        ["ffmpeg", *options, "-i", source, *output, unfinished],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    lines = done.stderr.strip().splitlines()
    reason = lines[-1] if lines else f"ffmpeg ended with {done.returncode}"
    if done.returncode == 0:
        try:
            if read_header(unfinished, SAMPLE_RATE):
                os.replace(unfinished, target)
                return None
            reason = "the result is empty"
        except ValueError as error:
            reason = str(error)
    unfinished.unlink(missing_ok=True)
    return reason


def convert_all(source, destination, suffix="wav", jobs=None):
    """Converts all files of a corpus, with a progress bar.

    Arguments
    ---------
    source : str
        Folder with <speaker>/<session>/<utterance>.m4a.
    destination : str
        Folder that gets a folder ``wav``.
    suffix : str
        wav or flac.
    jobs : int, optional
        Files that are converted at a time. By default one for each core.

    Returns
    -------
    int
        Number of files that could not be converted.

    Raises
    ------
    FileNotFoundError
        If ffmpeg or the files are missing.
    """
    if shutil.which("ffmpeg") is None:
        raise FileNotFoundError(
            "ffmpeg is missing: install it (apt install ffmpeg, or conda "
            "install ffmpeg) so that it is on PATH."
        )
    source = Path(source).expanduser().absolute()
    target = Path(destination).expanduser().absolute() / "wav"
    if next(source.glob("*/*/*.m4a"), None) is None:
        raise FileNotFoundError(
            f"There are no files <speaker>/<session>/<utterance>.m4a below "
            f"{source}: name the folder aac of VoxCeleb2."
        )
    failed = []
    with ThreadPool(jobs or os.cpu_count()) as pool:
        # One speaker's list at a time bounds the memory.
        for speaker in tqdm(sorted(source.iterdir()), "Speakers"):
            files = sorted(speaker.glob("*/*.m4a"))
            targets = [
                target / path.relative_to(source).with_suffix(f".{suffix}")
                for path in files
            ]
            reasons = pool.starmap(convert, zip(files, targets))
            failed += [
                (str(path), reason)
                for path, reason in zip(files, reasons)
                if reason is not None
            ]
    write_csv(target.parent / "not_converted.csv", ["m4a", "reason"], failed)
    return len(failed)


def main(arguments):
    """Converts.

    Arguments
    ---------
    arguments : list of str
        The command line.

    Returns
    -------
    str or None
        What went wrong.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", help="folder aac of VoxCeleb2")
    parser.add_argument("destination", help="gets a folder wav")
    parser.add_argument("--format", default="wav", choices=["wav", "flac"])
    parser.add_argument("--jobs", type=int, help="files at a time")
    args = parser.parse_args(arguments)
    try:
        failed = convert_all(
            args.source, args.destination, args.format, args.jobs
        )
    except FileNotFoundError as error:
        return str(error)
    if failed:
        return (
            f"{failed} files could not be converted: "
            f"{args.destination}/not_converted.csv lists them. Run the command "
            f"again to retry them."
        )
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
