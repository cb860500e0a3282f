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
import time

from corpus import describe
from recipe_runner import ROOT, DemoError, run_recipe
from speakers_corpus import SPEAKERS

RECIPE = ROOT / "recipes" / "VoxCeleb" / "SpeakerRec_memeff"
TRAIN_YAML = "hparams/train_revnet.yaml"
VERIFY_YAML = "hparams/verification_revnet.yaml"

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
  cd recipes/VoxCeleb/SpeakerRec_memeff
  python train_speaker_embeddings.py {TRAIN_YAML} \\
      --data_folder=/path/to/VoxCeleb --out_n_neurons=NUMBER_OF_SPEAKERS
  python speaker_verification_cosine.py {VERIFY_YAML} \\
      --data_folder=/path/to/VoxCeleb

Both take the trials from /path/to/VoxCeleb/veri_test2.txt unless
--verification_file names another list."""


def overrides_for(corpus):
    """Overrides of training and verification alike."""
    return {
        "data_folder": corpus,
        "verification_file": corpus / "veri_test.txt",
        "num_workers": 0,
        "preset": "RevNet34",
        "base_channels": BASE_CHANNELS,
        "downsampling": "invertible",
    }


def train(corpus, output, epochs, speakers):
    """Trains with the recipe; checkpoints and logs go to `output`."""
    run_recipe(
        RECIPE / "train_speaker_embeddings.py",
        TRAIN_YAML,
        output,
        {
            **overrides_for(corpus),
            "batch_size": BATCH,
            "sentence_len": CROP_S,
            "number_of_epochs": epochs,
            "out_n_neurons": speakers,
        },
        SHOWN,
    )


def verify(corpus, output, checkpoints="null"):
    """Verifies the unseen speakers; returns the recipe's result, with `eer`.

    Without a folder of checkpoints the network is untrained.
    """
    run_recipe(
        RECIPE / "speaker_verification_cosine.py",
        VERIFY_YAML,
        output,
        {**overrides_for(corpus), "pretrain_path": checkpoints},
    )
    return json.loads((output / "results.json").read_text(encoding="utf-8"))


def run(data, results, epochs, heading):
    """Runs the part and prints its findings; run_demo.py says how."""
    heading("A corpus of synthetic speakers")
    corpus, found = SPEAKERS.make(data)
    print(describe(found))

    heading(f"RevNet34 (fully reversible), 8-bit SGD, {epochs} epochs")
    before = verify(corpus, results / "verify_untrained")
    print(f"EER untrained: {before['eer']:.1f} %", flush=True)
    started = time.perf_counter()
    train(corpus, results / "train", epochs, SPEAKERS.train_speakers)
    train_s = time.perf_counter() - started
    after = verify(
        corpus, results / "verify_trained", results / "train" / "save"
    )
    print(
        f"EER on unseen speakers ({after['trials']} trials): "
        f"{before['eer']:.1f} % untrained, {after['eer']:.1f} % after "
        f"{train_s:.0f} s of training"
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
        "corpus": found,
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
