"""Runs a recipe as a user would, and shows its progress.

Authors
 * The sb_memeff authors 2026
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class DemoError(Exception):
    """Says in one line which step failed."""


def epoch_line(line, shown):
    """Puts an epoch of SpeechBrain's train logger into a shorter line.

    Arguments
    ---------
    line : str
        Any line of the recipe's output.
    shown : dict
        Name, such as "train loss", to a function that puts its number into
        words.

    Returns
    -------
    str
        The shorter line; empty if this is no epoch's.
    """
    if not re.search(r"epoch: *\d+.*loss", line):
        return ""
    stats = dict(re.findall(r"(\w+(?: \w+)*): (\S+?)(?=,| -|$)", line.strip()))
    words = [f"epoch {int(stats['epoch']):2d}"]
    words += [
        say(float(stats[name])) for name, say in shown.items() if name in stats
    ]
    return "   ".join(words)


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
        Overrides of the yaml file, and run options.
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

    def overwrite(text, end=""):
        # Blanks wipe what a longer bar left behind.
        print(f"\r{text.ljust(width)}", end=end, flush=True)

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
            # As text a carriage return, which begins each bar, ends a line.
            text=True,
            encoding="utf-8",
            errors="replace",
        ) as process,
    ):
        print(" ".join(command), file=file)
        try:
            for line in process.stdout:
                # Without colours, so that a cut leaves none open.
                line = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", line.rstrip("\n"))
                if re.search(r"\d+%\|", line):
                    if show_bars:
                        overwrite(line.strip()[:width])
                elif line:
                    print(line, file=file, flush=True)
                    tail = [*tail[-14:], line]
                    if shown and (epoch := epoch_line(line, shown)):
                        if show_bars:
                            overwrite(epoch, end="\n")
                        else:
                            print(epoch, flush=True)
        except BaseException:
            process.terminate()
            raise
    if show_bars:
        overwrite("", end="\r")
    if process.returncode:
        print("\n".join(tail), file=sys.stderr)
        raise DemoError(f"{name} failed; all of its output is in {log}")
