"""WER of a small transducer on connected digits, with the recipe's script.

TransducerJointLoss, tiled and samplewise, and torchaudio's loss on batched logits
get the same seed and data. The script compares the losses of the first steps and
the word error rates. The corpus has the layout of LibriSpeech, with the splits
train, dev and test.

    python benchmarks/wer_digits.py CORPUS OUTPUT_FOLDER

Authors
 * The sb_memeff authors 2026
"""

import argparse
import json
import re
import sys
import time
from pathlib import Path

from hyperpyyaml import load_hyperpyyaml
from result_file import write_results
from table import print_head, print_row
from torchaudio_loss import TorchaudioJointLoss

RECIPE = (
    Path(__file__).resolve().parents[1]
    / "recipes/LibriSpeech/ASR/transducer_memeff"
)
sys.path.insert(0, str(RECIPE))

import train as recipe  # noqa: E402

METHODS = ("tiled", "samplewise", "torchaudio")
FIRST_STEPS = 50


class Recording(recipe.ASR):
    """Records the loss of each step."""

    losses = []

    def fit_batch(self, batch):
        """Fits a batch and records its loss."""
        loss = super().fit_batch(batch)
        self.losses.append(float(loss))
        return loss


def with_torchaudio(file, overrides):
    """Loads the yaml file and swaps the loss."""
    hparams = load_hyperpyyaml(file, overrides)
    hparams["modules"]["transducer_loss"] = TorchaudioJointLoss(
        hparams["Tjoint"], hparams["transducer_lin"], hparams["blank_index"]
    )
    return hparams


def measure(method, corpus, folder, flags):
    """Trains and tests one system.

    Arguments
    ---------
    method : str
        One of METHODS.
    corpus : Path
        Folder of the corpus.
    folder : Path
        Output folder.
    flags : list of str
        Overrides for the recipe.

    Returns
    -------
    dict
        Losses of the first steps, WER of the test set, seconds.
    """
    Recording.losses = []
    recipe.ASR = Recording
    recipe.load_hyperpyyaml = load_hyperpyyaml
    if method == "torchaudio":
        recipe.load_hyperpyyaml = with_torchaudio
    else:
        flags = [f"--transducer_method={method}", *flags]
    started = time.perf_counter()
    recipe.main(
        [
            str(RECIPE / "hparams" / "digits_transducer.yaml"),
            f"--data_folder={corpus}",
            f"--output_folder={folder}",
            "--device=cpu",
            "--noprogressbar",
            *flags,
        ]
    )
    seconds = time.perf_counter() - started
    log = (folder / "train_log.txt").read_text()
    return {
        "method": method,
        "first_losses": Recording.losses[:FIRST_STEPS],
        "valid_wer": [
            float(x) for x in re.findall(r"valid WER: ([\d.e+-]+)", log)
        ],
        "test_wer": float(re.findall(r"test WER: ([\d.e+-]+)", log)[-1]),
        "seconds": seconds,
    }


def report(runs):
    """Prints a Markdown table.

    Arguments
    ---------
    runs : list of dict
        Results of ``measure``; the last is the reference.
    """
    print_head(
        "loss",
        f"largest relative difference, {FIRST_STEPS} steps",
        "last validation WER",
        "test WER",
    )
    for run in runs:
        pairs = zip(run["first_losses"], runs[-1]["first_losses"])
        difference = max(abs(a / b - 1) for a, b in pairs)
        print_row(
            run["method"],
            f"{difference:.1e}",
            f"{run['valid_wer'][-1]:.2f} %",
            f"{run['test_wer']:.2f} %",
        )


def main():
    """Trains missing systems, prints a table and writes the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("output_folder", type=Path)
    arguments, flags = parser.parse_known_args()
    runs = []
    for method in METHODS:
        folder = arguments.output_folder / method
        done = folder / "measured.json"
        if not done.is_file():
            run = measure(method, arguments.corpus, folder, flags)
            done.write_text(json.dumps(run))
        runs.append(json.loads(done.read_text()))
    report(runs)
    write_results(__file__, runs)


if __name__ == "__main__":
    main()
