"""Runs a recipe as a user would, and shows how far it is.

Authors
 * The sb_memeff authors 2026
"""

import codecs
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class DemoError(Exception):
    """Says in one line which step failed."""


def is_progress(piece):
    """Whether a piece of output is a progress bar's.

    Arguments
    ---------
    piece : str
        Output between two line ends or carriage returns.

    Returns
    -------
    bool
        Whether it is.
    """
    return re.search(r"\d+%\|", piece) is not None


def read_stats(piece):
    """Reads an epoch's line of SpeechBrain's logger.

    Arguments
    ---------
    piece : str
        Output between two line ends or carriage returns.

    Returns
    -------
    dict
        Name to text, such as "epoch": "3", "train loss": "1.2e-01"; empty if
        it is another line.
    """
    if not re.search(r"epoch: *\d+.*loss", piece):
        return {}
    pairs = re.findall(r"(\w+(?: \w+)*): (\S+?)(?=,| -|$)", piece.strip())
    return dict(pairs)


def epoch_line(stats, shown):
    """Puts an epoch into one line.

    Arguments
    ---------
    stats : dict
        As read_stats returns it.
    shown : dict
        Name to a function that puts the number into words.

    Returns
    -------
    str
        The line.
    """
    words = [f"epoch {int(stats['epoch']):2d}"]
    words += [
        say(float(stats[name])) for name, say in shown.items() if name in stats
    ]
    return "   ".join(words)


def strip_colours(piece):
    """Takes the escape sequences out, so that a cut leaves none open.

    Arguments
    ---------
    piece : str
        Output of a program.

    Returns
    -------
    str
        The same without colours.
    """
    return re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", piece)


def pieces_of(stream):
    """Cuts a byte stream at line ends and carriage returns, as it arrives.

    Arguments
    ---------
    stream : file
        Binary, unbuffered.

    Yields
    ------
    str
        The pieces, without their ends.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    rest = ""
    while chunk := stream.read(4096):
        *whole, rest = re.split(r"[\r\n]+", rest + decoder.decode(chunk))
        yield from whole
    if rest:
        yield rest


def run_recipe(
    name, script, yaml, overrides, log, shown=None, environment=None
):
    """Runs a script of a recipe: bars on the screen, everything in a log.

    Arguments
    ---------
    name : str
        What the step is called, should it fail.
    script : Path
        The script; it runs in its folder.
    yaml : str
        Its hyperparameters.
    overrides : dict
        What differs from the yaml, and run options.
    log : Path
        File for the whole output.
    shown : dict
        What to print of each epoch, as epoch_line takes it; None prints
        nothing.
    environment : dict
        Environment variables, where the user has not set them.

    Raises
    ------
    DemoError
        If the script fails; its last lines are printed before.
    """
    command = [sys.executable, "-u", script.name, yaml]
    command += [f"--{key}={value}" for key, value in overrides.items()]
    show_bars = sys.stdout.isatty()
    width = shutil.get_terminal_size().columns - 1
    tail = []
    log.parent.mkdir(parents=True, exist_ok=True)
    with (
        open(log, "w", encoding="utf-8") as file,
        subprocess.Popen(
            command,
            cwd=script.parent,
            env={**(environment or {}), **os.environ},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            bufsize=0,
        ) as process,
    ):
        print(" ".join(command), file=file)
        try:
            for piece in map(strip_colours, pieces_of(process.stdout)):
                if is_progress(piece):
                    if show_bars:
                        # Blanks wipe what a longer bar left behind.
                        line = piece.strip()[:width].ljust(width)
                        print(f"\r{line}", end="", flush=True)
                    continue
                print(piece, file=file, flush=True)
                tail = [*tail[-14:], piece]
                stats = read_stats(piece)
                if shown and stats:
                    start = "\r" if show_bars else ""
                    line = epoch_line(stats, shown).ljust(width)
                    print(f"{start}{line}".rstrip(" "), flush=True)
        except BaseException:
            process.terminate()
            raise
    if show_bars:
        print("\r" + " " * width + "\r", end="", flush=True)
    if process.returncode:
        print("\n".join(tail), file=sys.stderr)
        raise DemoError(f"{name} failed; all of its output is in {log}")
