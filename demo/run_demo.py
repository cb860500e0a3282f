"""The demo: both methods at work, on a CPU, on synthetic speech.

speakers     a reversible network learns to tell speakers apart; memory of a
             training step and of the optimizers (speaker_part.py)
transducer   a transducer learns digits; memory of its loss
             (transducer_part.py)

    make demo        or        python demo/run_demo.py --parts transducer
"""

import argparse
import itertools
import json
import signal
import sys
import time
from pathlib import Path

import speaker_part
import transducer_part
from recipe_runner import ROOT, DemoError
from voices import CorpusError

PARTS = {"speakers": speaker_part, "transducer": transducer_part}


def number_headings(total):
    """Counts the steps.

    Arguments
    ---------
    total : int
        How many there are.

    Returns
    -------
    callable
        Prints the heading of the next one.
    """
    numbers = itertools.count(1)

    def heading(text):
        print(f"\n== {next(numbers)}/{total} {text}", flush=True)

    return heading


def print_next_steps(results, parts):
    """Tells how to go on.

    Arguments
    ---------
    results : Path
        Where the demo's results lie.
    parts : list of str
        Names of the parts.
    """
    if ROOT in results.parents:
        results = results.relative_to(ROOT)
    print(
        f"\nResults: {', '.join(f'{results}/{name}/' for name in parts)}\n"
        "(summary.json, train/train_log.txt, *_output.txt)"
    )
    for name in parts:
        print(f"\n{PARTS[name].NEXT}")


def run(arguments):
    """Runs the parts.

    Arguments
    ---------
    arguments : argparse.Namespace
        Arguments of the command line.

    Raises
    ------
    CorpusError
        If a corpus cannot be made.
    DemoError
        If a later step fails.
    """
    results, data = arguments.results.resolve(), arguments.data.resolve()
    parts = [name for name in PARTS if name in arguments.parts]
    heading = number_headings(sum(PARTS[name].STEPS for name in parts))
    summary = {}
    for name in parts:
        (results / name).mkdir(parents=True, exist_ok=True)
        summary[name] = PARTS[name].run(
            data, results / name, arguments.epochs, heading
        )
        # At once: a later part may fail.
        (results / name / "summary.json").write_text(
            json.dumps(summary[name], indent=1) + "\n", encoding="utf-8"
        )
    print_next_steps(results, parts)
    for name in parts:
        PARTS[name].check(summary[name])


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
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS,
        default=list(PARTS),
        help="default: both",
    )
    parser.add_argument(
        "--epochs",
        type=int,
        default=8,
        help="of each training; default: %(default)s",
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=ROOT / "data" / "demo",
        help="folder of the corpora; default: data/demo",
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=ROOT / "results" / "demo",
        help="default: results/demo",
    )
    arguments = parser.parse_args(argv)
    # As an exception it ends the recipe's process as well.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    started = time.perf_counter()
    try:
        run(arguments)
    except (CorpusError, DemoError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ndemo: stopped", file=sys.stderr)
        return 130
    minutes, seconds = divmod(round(time.perf_counter() - started), 60)
    print(f"\nTotal: {minutes} min {seconds} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
