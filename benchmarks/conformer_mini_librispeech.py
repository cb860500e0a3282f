"""50 steps of a small conformer transducer with and without saving memory.

The recipe trains the same weights on the same batches twice: with the logits,
the CNN and the encoder as SpeechBrain has them, and with tiled logits and
everything recomputed in pieces of the batch. Augmentation is on. Dropout is off,
because pieces of a batch draw other random numbers. The script compares the losses
and times the steps. The corpus has the layout of LibriSpeech, with the splits
train-mini, dev-mini and test-mini.

    python benchmarks/conformer_mini_librispeech.py CORPUS OUTPUT_FOLDER

Authors
 * The sb_memeff authors 2026
"""

import argparse
import statistics
import time
from pathlib import Path

from result_file import write_results
from table import print_head, print_row
from wer_digits import RECIPE, Recording, recipe

STEPS = 50
# The first run is the reference.
RUNS = {
    "nothing": ["--transducer_method=batched"],
    "everything": [
        "--transducer_method=tiled",
        "--recompute=True",
        "--recompute_split=2",
    ],
}
NETWORK = """
    --d_model=144 --nhead=4 --num_encoder_layers=6 --d_ffn=576
    --joint_dim=320 --dec_dim=320 --output_neurons=200
    --transformer_dropout=0 --dec_emb_dropout=0 --dec_dropout=0
    --CNN={'dropout':0}
    --precision=fp32 --device=cpu
"""
DATA = """
    --train_splits=[train-mini] --dev_splits=[dev-mini]
    --test_splits=[test-mini] --pretrained_lm_tokenizer_path=
    --dynamic_batching=False --batch_size=8 --num_workers=0
    --grad_accumulation_factor=1 --warmup_steps=50 --number_of_epochs=5
    --noprogressbar
"""


class Timed(Recording):
    """Records the loss and the CPU time of each step; does not test."""

    seconds: list[float] = []

    def fit_batch(self, batch):
        """Fits a batch and records its loss and its CPU time."""
        started = time.process_time()
        loss = super().fit_batch(batch)
        self.seconds.append(time.process_time() - started)
        return loss

    def evaluate(self, *args, **kwargs):
        """Skips the test sets."""


def measure(flags, corpus, folder):
    """Trains 50 steps.

    Arguments
    ---------
    flags : list of str
        Overrides for the recipe.
    corpus : Path
        Folder of the corpus.
    folder : Path
        Output folder.

    Returns
    -------
    dict
        Losses and CPU seconds of the steps.
    """
    Recording.losses, Timed.seconds = [], []
    recipe.ASR = Timed
    data = [f"--data_folder={corpus}", f"--output_folder={folder}"]
    data += [f"--test_csv=[{folder}/test-mini.csv]"]
    data += [f"--valid_csv={folder}/dev-mini.csv"]
    recipe.main(
        [
            str(RECIPE / "hparams" / "conformer_transducer.yaml"),
            *data,
            *NETWORK.split(),
            *DATA.split(),
            *flags,
        ]
    )
    if len(Timed.losses) != STEPS:
        raise RuntimeError(f"{len(Timed.losses)} steps instead of {STEPS}.")
    return {"losses": Timed.losses, "cpu_seconds": Timed.seconds}


def main():
    """Trains, prints a Markdown table and writes the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("output_folder", type=Path)
    arguments = parser.parse_args()
    rows = []
    print_head(
        "saved",
        "first loss",
        f"loss of step {STEPS}",
        "largest relative difference",
        "CPU time of a step",
    )
    for label, flags in RUNS.items():
        row = measure(flags, arguments.corpus, arguments.output_folder / label)
        rows.append({"saved": label, **row})
        losses = row["losses"]
        pairs = zip(losses, rows[0]["losses"])
        difference = max(abs(a / b - 1) for a, b in pairs)
        seconds = statistics.median(row["cpu_seconds"])
        print_row(
            label,
            f"{losses[0]:.3f}",
            f"{losses[-1]:.3f}",
            f"{difference:.1e}",
            f"{seconds:.2f} s",
        )
    write_results(__file__, rows)


if __name__ == "__main__":
    main()
