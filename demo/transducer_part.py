"""The demo's second part: a transducer learns digits without its logits.

1. makes a small corpus of spoken digits (make_digits.py),
2. trains a small conformer transducer on characters with the LibriSpeech
   recipe, and recognises speakers it never heard,
3. measures the transducer loss at the size of a real recipe, with the logits
   of the batch, of one utterance, and of a tile.

Authors
 * The sb_memeff authors 2026
"""

import re
import shutil
import sys
import time

from make_digits import describe, make_digits
from recipe_runner import ROOT, DemoError, run_recipe

RECIPE = ROOT / "recipes" / "LibriSpeech" / "ASR" / "transducer"
TRAIN_YAML = "hparams/digits_transducer.yaml"
# The yaml file is for twice the audio: these are small batches, so that there
# are steps enough, and the average leaves out the first half of the training.
OVERRIDES = {"max_batch_len": 25, "warmup_steps": 150, "avg_checkpoints": 3}
# Threads would wait for each other more than they compute, so small are the
# tensors: on two cores that are busy with something else, two threads were
# five times slower than one.
ENVIRONMENT = {"OMP_NUM_THREADS": "1"}
SHOWN = {
    "train loss": "training loss {:5.2f}".format,
    "valid WER": "validation WER {:5.1f} %".format,
}
HIGHEST_WER = 20.0

# Batch, frames of 40 ms, tokens, joint dimension, vocabulary.
LOSS_SHAPE = (4, 250, 50, 640, 1000)
# Method to what it holds.
METHODS = {
    "batched": "the batch",
    "samplewise": "an utterance",
    "tiled": "a tile",
}

STEPS = 3
NEXT = """\
With your own LibriSpeech (flac, a GPU):

  source .venv/bin/activate
  cd recipes/LibriSpeech/ASR/transducer
  python train.py hparams/conformer_transducer.yaml \\
      --data_folder=/path/to/LibriSpeech"""


def train(corpus, output, epochs):
    """Trains and tests with the recipe.

    Arguments
    ---------
    corpus : Path
        Folder of the corpus.
    output : Path
        Folder for checkpoints and logs.
    epochs : int
        Number of epochs.

    Returns
    -------
    dict
        As read_wer returns it.
    """
    overrides = {
        **OVERRIDES,
        "data_folder": corpus,
        "output_folder": output,
        "number_of_epochs": epochs,
        "device": "cpu",
    }
    # A leftover checkpoint would be resumed, and nothing trained.
    shutil.rmtree(output, ignore_errors=True)
    run_recipe(
        "Training",
        RECIPE / "train.py",
        TRAIN_YAML,
        overrides,
        output.parent / "train_output.txt",
        SHOWN,
        ENVIRONMENT,
    )
    return read_wer(output / "wer_test.txt")


def read_wer(path):
    """Reads the head of SpeechBrain's file of word error rates.

    Arguments
    ---------
    path : Path
        The file.

    Returns
    -------
    dict
        `wer` in per cent, `errors` and `words`.
    """
    head = path.read_text(encoding="utf-8")
    wer, errors, words = re.match(r"%WER (\S+) \[ (\d+) / (\d+)", head).groups()
    return {"wer": float(wer), "errors": int(errors), "words": int(words)}


def compare_losses():
    """Measures the transducer loss, forward and backward.

    Returns
    -------
    list
        One dict for each method.
    """
    # What the benchmark measures, the demo shows.
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from transducer_loss import Batch

    from sb_memeff.nnet.transducer.joint_loss import TransducerJointLoss

    size, frames, tokens, hidden, vocabulary = LOSS_SHAPE
    batch = Batch([frames] * size, [tokens] * size, hidden, vocabulary, False)
    exact = batch.exact()
    rows = []
    for method in METHODS:
        # One step alone may meet another program on the cores.
        extra, seconds, error = batch.measure(
            TransducerJointLoss, exact, rounds=3, method=method
        )
        rows.append(
            {
                "method": method,
                "extra_bytes": extra,
                "step_s": seconds,
                "gradient_error": error,
            }
        )
    return rows


def print_losses(rows):
    """Prints the comparison.

    Arguments
    ---------
    rows : list
        As compare_losses returns them.
    """
    size, frames, tokens, hidden, vocabulary = LOSS_SHAPE
    print(
        f"\nbatch {size} x {frames} frames x {tokens} tokens, "
        f"joint network {hidden}, vocabulary {vocabulary}\n"
        f"{'method':<12}{'logits of':<14}{'extra memory':>20}{'s/step':>8}"
        f"{'gradient error':>17}"
    )
    for row in rows:
        fewer = rows[0]["extra_bytes"] / row["extra_bytes"]
        print(
            f"{row['method']:<12}{METHODS[row['method']]:<14}"
            f"{row['extra_bytes'] / 2**20:>9.0f} MiB {f'1/{fewer:.1f}':>6}"
            f"{row['step_s']:>8.2f}{row['gradient_error']:>17.0e}"
        )
    print(
        "\nExtra: the peak of forward and backward beyond inputs and their "
        "gradients.\nError: relative, against float64. Seconds: this machine. "
        "The training above used\ntiled, the recipe's default."
    )


def run(data, results, epochs, heading):
    """Runs the part and prints what it finds.

    Arguments
    ---------
    data : Path
        Folder of the corpora.
    results : Path
        Folder for everything that is written.
    epochs : int
        Number of epochs.
    heading : callable
        Prints a step's heading.

    Returns
    -------
    dict
        What was found.

    Raises
    ------
    CorpusError
        If the corpus cannot be made.
    DemoError
        If a later step fails.
    """
    heading("A corpus of spoken digits")
    corpus = data / "digits"
    manifest = make_digits(corpus, progress=sys.stderr.isatty())
    print(describe(manifest))

    heading(f"A transducer that never holds its logits, {epochs} epochs")
    started = time.perf_counter()
    tested = train(corpus, results / "train", epochs)
    train_s = time.perf_counter() - started
    print(
        f"WER on unseen speakers: {tested['wer']:.1f} % ({tested['errors']} of "
        f"{tested['words']} digits) after {train_s:.0f} s of training and test"
    )

    heading("The transducer loss, with and without logits")
    rows = compare_losses()
    print_losses(rows)
    return {
        "corpus": {k: v for k, v in manifest.items() if k != "voices"},
        "epochs": epochs,
        "train_s": round(train_s, 1),
        "test": tested,
        "losses": rows,
    }


def check(summary):
    """Complains about a transducer that learned too little.

    Arguments
    ---------
    summary : dict
        As run returns it.

    Raises
    ------
    DemoError
        If the WER is not below HIGHEST_WER.
    """
    wer = summary["test"]["wer"]
    if not wer < HIGHEST_WER:
        raise DemoError(
            f"The transducer's WER of {wer:.1f} % is not below "
            f"{HIGHEST_WER:.0f} %"
        )
