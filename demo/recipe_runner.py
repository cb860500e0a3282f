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
    """Shortens SpeechBrain's line about an epoch; any other becomes empty.

    `shown` maps a name, such as "train loss", to a function that puts its
    number into words.
    """
    if not re.search(r"epoch: *\d+.*loss", line):
        return ""
    stats = dict(re.findall(r"(\w+(?: \w+)*): (\S+?)(?=,| -|$)", line.strip()))
    words = [f"epoch {int(stats['epoch']):2d}"]
    words += [
        say(float(stats[name])) for name, say in shown.items() if name in stats
    ]
    return "   ".join(words)


def run_recipe(script, yaml, output, overrides, shown={}, environment={}):
    """Runs a script of a recipe: bars on the screen, everything in a log.

    The log is beside the output folder, which the script finds empty: it would
    resume from a leftover checkpoint, and train nothing.

    Arguments
    ---------
    script : Path
        The script; it runs in its folder.
    yaml : str
        Its hyperparameters.
    output : Path
        The script's output folder.
    overrides : dict
        Other overrides of the yaml file, and run options.
    shown : dict
        What to print of each epoch, as epoch_line takes it.
    environment : dict
        Environment variables, where the user has not set them.

    Raises
    ------
    DemoError
        If the script fails; its last lines are printed before.
    """
    shutil.rmtree(output, ignore_errors=True)
    log = output.parent / f"{output.name}_output.txt"
    command = [sys.executable, "-u", script.name, yaml]
    overrides = {"output_folder": output, "device": "cpu", **overrides}
    command += [f"--{key}={value}" for key, value in overrides.items()]
    width = shutil.get_terminal_size().columns - 1
    # Wipes the bar off a terminal's line.
    wipe = "\r\x1b[K" if sys.stdout.isatty() else ""
    with open(log, "w", encoding="utf-8") as file, subprocess.Popen(
        command,
        cwd=script.parent,
        env={**environment, **os.environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        # As text a carriage return, which begins each bar, ends a line.
        text=True,
        encoding="utf-8",
        errors="replace",
    ) as process:
        print(" ".join(command), file=file)
        try:
            for line in process.stdout:
                # Without colours, so that a cut leaves none open.
                line = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", line.strip())
                if re.search(r"\d+%\|", line):
                    if wipe:
                        print(wipe + line[:width], end="", flush=True)
                elif line:
                    print(line, file=file, flush=True)
                    if epoch := shown and epoch_line(line, shown):
                        print(wipe + epoch, flush=True)
        except BaseException:
            process.terminate()
            raise
    print(wipe, end="")
    if process.returncode:
        tail = log.read_text(encoding="utf-8").splitlines()[-15:]
        print(*tail, sep="\n", file=sys.stderr)
        raise DemoError(f"{script.name} failed; all of its output is in {log}")
