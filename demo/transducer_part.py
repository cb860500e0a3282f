"""The demo's second part: a transducer learns digits without its logits.

1. makes a small corpus of spoken digits (digits_corpus.py),
2. trains a small conformer transducer on characters with the LibriSpeech
   recipe, and recognises speakers it never heard,
3. measures the transducer loss at the size of a real recipe, with the logits
   of the batch, of one utterance, and of a tile (loss_memory.py).

Authors
 * The sb_memeff authors 2026
"""

import re
import time

from corpus import describe
from digits_corpus import DIGITS
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
# The recipe's names, in the demo's words.
SHOWN = {
    "train loss": "training loss {:5.2f}".format,
    "valid WER": "validation WER {:5.1f} %".format,
}
HIGHEST_WER = 20.0

STEPS = 3
NEXT = """\
With your own LibriSpeech (flac, a GPU):

  source .venv/bin/activate
  cd recipes/LibriSpeech/ASR/transducer_memeff
  python train.py hparams/conformer_transducer.yaml \\
      --data_folder=/path/to/LibriSpeech"""


def train(corpus, output, epochs):
    """Trains and tests with the recipe; returns what read_wer does."""
    run_recipe(
        RECIPE / "train.py",
        TRAIN_YAML,
        output,
        {**OVERRIDES, "data_folder": corpus, "number_of_epochs": epochs},
        SHOWN,
        ENVIRONMENT,
    )
    return read_wer(output / "wer_test.txt")


def read_wer(path):
    """Reads `wer` in per cent, `errors` and `words` of SpeechBrain's report."""
    head = path.read_text(encoding="utf-8")
    wer, errors, words = re.match(r"%WER (\S+) \[ (\d+) / (\d+)", head).groups()
    return {"wer": float(wer), "errors": int(errors), "words": int(words)}


def run(data, results, epochs, heading):
    """Runs the part and prints its findings; run_demo.py says how."""
    heading("A corpus of spoken digits")
    corpus, found = DIGITS.make(data)
    print(describe(found))

    heading(f"A transducer that never holds its logits, {epochs} epochs")
    started = time.perf_counter()
    tested = train(corpus, results / "train", epochs)
    train_s = time.perf_counter() - started
    print(
        f"WER on unseen speakers: {tested['wer']:.1f} % ({tested['errors']} of "
        f"{tested['words']} digits) after {train_s:.0f} s of training and test"
    )

    heading("The transducer loss, with and without logits")
    # Not before: torch takes seconds, also in each process that speaks.
    import loss_memory

    losses = loss_memory.compare()
    loss_memory.print_comparison(losses)
    return {
        "corpus": found,
        "epochs": epochs,
        "train_s": round(train_s, 1),
        "test": tested,
        "losses": losses,
    }


def check(summary):
    """Raises a DemoError unless the WER is below HIGHEST_WER."""
    wer = summary["test"]["wer"]
    if not wer < HIGHEST_WER:
        raise DemoError(
            f"The transducer's WER of {wer:.1f} % is not below "
            f"{HIGHEST_WER:.0f} %"
        )
