"""The demo's first part: a reversible network learns to tell speakers apart.

1. makes a small corpus of synthetic speakers (speakers_corpus.py),
2. measures the verification EER of the untrained RevNet34, trains it with the
   VoxCeleb recipe, and measures again on speakers it never heard,
3. compares memory and time of a training step with the vanilla ResNet34, and
   the bytes of 8-bit optimizer states with those of 32-bit ones
   (network_memory.py).

Everything is narrow (a quarter of the published width) and short, so that it
takes minutes. The memory figures at full width do not depend on that.

Authors
 * The sb_memeff authors 2026
"""

import json
import shutil
import sys
import time

from recipe_runner import ROOT, DemoError, run_recipe
from speakers_corpus import Speakers

RECIPE = ROOT / "recipes" / "VoxCeleb" / "SpeakerRec"
TRAIN_YAML = "hparams/train_revnet.yaml"
VERIFY_YAML = "hparams/verification_revnet.yaml"

PRESET = "RevNet34"
BASE_CHANNELS = 8
BATCH = 32
CROP_S = 2.0
# The recipe's names, in the demo's words.
SHOWN = {
    "train loss": "training loss {:5.2f}".format,
    "valid loss": "validation loss {:5.2f}".format,
    "valid ErrorRate": lambda x: f"validation error {100 * x:5.1f} %",
}

STEPS = 3
NEXT = f"""\
With your own VoxCeleb (16 kHz wav, full width, a GPU):

  source .venv/bin/activate
  cd recipes/VoxCeleb/SpeakerRec
  python train_speaker_embeddings.py {TRAIN_YAML} \\
      --data_folder=/path/to/VoxCeleb --out_n_neurons=NUMBER_OF_SPEAKERS
  python speaker_verification_cosine.py {VERIFY_YAML} \\
      --data_folder=/path/to/VoxCeleb

Both take the trials from /path/to/VoxCeleb/veri_test2.txt unless
--verification_file names another list."""


def common_overrides(corpus):
    """Overrides of training and verification alike."""
    return {
        "data_folder": corpus,
        "verification_file": corpus / "veri_test.txt",
        "num_workers": 0,
        "preset": PRESET,
        "base_channels": BASE_CHANNELS,
        "downsampling": "invertible",
        "device": "cpu",
    }


def train(corpus, output, epochs, speakers):
    """Trains with the recipe; checkpoints and logs go to `output`."""
    run_recipe(
        "Training",
        RECIPE / "train_speaker_embeddings.py",
        TRAIN_YAML,
        {
            **common_overrides(corpus),
            "output_folder": output,
            "batch_size": BATCH,
            "sentence_len": CROP_S,
            "number_of_epochs": epochs,
            "out_n_neurons": speakers,
        },
        output.parent / "train_output.txt",
        SHOWN,
    )


def verify(corpus, output, checkpoints):
    """Verifies the unseen speakers with the recipe.

    Arguments
    ---------
    corpus : Path
        Folder of the corpus.
    output : Path
        Folder for scores and the result.
    checkpoints : Path
        Folder of the trained network; None verifies with an untrained one.

    Returns
    -------
    dict
        The recipe's result; `eer` in per cent.
    """
    shutil.rmtree(output, ignore_errors=True)
    run_recipe(
        "Verification",
        RECIPE / "speaker_verification_cosine.py",
        VERIFY_YAML,
        {
            **common_overrides(corpus),
            "output_folder": output,
            "pretrain_path": checkpoints or "null",
        },
        output.parent / f"{output.name}_output.txt",
    )
    return json.loads((output / "results.json").read_text(encoding="utf-8"))


def run(data, results, epochs, heading):
    """Runs the part and prints its findings; run_demo.py says how."""
    heading("A corpus of synthetic speakers")
    corpus, folder = Speakers(), data / "voices"
    manifest = corpus.make(folder, progress=sys.stderr.isatty())
    print(corpus.describe(manifest))

    heading(f"{PRESET} (fully reversible), 8-bit SGD, {epochs} epochs")
    # A leftover checkpoint would be resumed, and nothing trained.
    shutil.rmtree(results / "train", ignore_errors=True)
    before = verify(folder, results / "verify_untrained", None)
    print(f"EER untrained: {before['eer']:.1f} %", flush=True)
    started = time.perf_counter()
    train(folder, results / "train", epochs, corpus.train_speakers)
    train_s = time.perf_counter() - started
    after = verify(
        folder, results / "verify_trained", results / "train" / "save"
    )
    print(
        f"EER on unseen speakers: {before['eer']:.1f} % untrained, "
        f"{after['eer']:.1f} % after {train_s:.0f} s of training"
    )

    heading("A training step, vanilla and reversible")
    # Not before: torch takes seconds, also in each process that speaks.
    import network_memory

    # Frames of 10 ms, bands.
    shape = (BATCH, int(CROP_S * 100), 80)
    steps = network_memory.compare_networks(BASE_CHANNELS, shape)
    network_memory.print_networks(steps)
    states = network_memory.compare_states()
    network_memory.print_states(states)
    return {
        "corpus": {k: v for k, v in manifest.items() if k != "voices"},
        "epochs": epochs,
        "train_s": round(train_s, 1),
        "untrained": before,
        "trained": after,
        "steps": steps,
        "optimizer_states": states,
    }


def check(summary):
    """Raises a DemoError if the EER did not fall."""
    before, after = (summary[k]["eer"] for k in ("untrained", "trained"))
    if after >= before:
        raise DemoError(
            f"Training did not improve the EER: {before:.1f} % before, "
            f"{after:.1f} % after"
        )
