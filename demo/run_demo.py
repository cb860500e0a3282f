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

# A part has the number of its STEPS; run(data, results, epochs, heading), which
# prints a heading for each step and returns its findings; check(findings), which
# raises a DemoError if a network has not learned enough; and what to do NEXT.
PARTS = {"speakers": speaker_part, "transducer": transducer_part}


def run(names, data, results, epochs):
    """Runs parts of the demo, named by keys of PARTS."""
    total = sum(PARTS[name].STEPS for name in names)
    numbers = itertools.count(1)

    def heading(text):
        print(f"\n== {next(numbers)}/{total} {text}", flush=True)

    summary = {}
    for name in names:
        folder = results / name
        folder.mkdir(parents=True, exist_ok=True)
        summary[name] = PARTS[name].run(data, folder, epochs, heading)
        # At once: a later part may fail.
        (folder / "summary.json").write_text(
            json.dumps(summary[name], indent=1) + "\n", encoding="utf-8"
        )
    if ROOT in results.parents:
        results = results.relative_to(ROOT)
    print(
        f"\nResults: {', '.join(f'{results}/{name}/' for name in names)}\n"
        "(summary.json, train/train_log.txt, *_output.txt)"
    )
    for name in names:
        print(f"\n{PARTS[name].NEXT}")
    for name in names:
        PARTS[name].check(summary[name])


def main(argv=None):
    """Runs the command line; returns its exit status."""
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
    names = [name for name in PARTS if name in arguments.parts]
    data, results = arguments.data.resolve(), arguments.results.resolve()
    # The parts measure with the benchmarks' code.
    sys.path.append(str(ROOT / "benchmarks"))
    # As an exception it ends the recipe's process as well.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    started = time.perf_counter()
    try:
        run(names, data, results, arguments.epochs)
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
