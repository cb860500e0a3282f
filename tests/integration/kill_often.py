"""Kills trainings of both recipes at random moments and compares their ends.

Too long for the tests, where a recipe is killed once and a small Brain five times.
Each training goes on from its checkpoints after each SIGKILL. In the end the files
of its last checkpoint equal those of a training that nobody killed, bit for bit.

    python -m tests.integration.kill_often FOLDER --kills 20

Authors
 * The sb_memeff authors 2026
"""

import argparse
import importlib
import random
import sys
from pathlib import Path

import torch

from tests.integration.runs import ROOT, last_checkpoint, output_of, start

# The path that pytest's settings give to tests.
for name in ("VoxCeleb/SpeakerRec_memeff", "LibriSpeech/ASR/transducer_memeff"):
    sys.path.insert(0, str(ROOT / "recipes" / name))
librispeech, voxceleb = (
    importlib.import_module(f"tests.integration.test_{name}_recipe")
    for name in ("librispeech", "voxceleb")
)

EPOCHS = {"voxceleb": 24, "librispeech": 80}
# A run is killed within this time, part of which it needs to start.
MAX_SECONDS = 6
OPTIMIZERS = {
    "voxceleb": [
        "torch.optim.SGD",
        "sb_memeff.optim.SGD8bit",
        "sb_memeff.optim.Adam8bit",
    ],
    "librispeech": [
        "torch.optim.AdamW",
        "sb_memeff.optim.AdamW8bit",
    ],
}
MODULES = {
    "voxceleb": ("embedding_model", "classifier", "optimizer"),
    "librispeech": ("model", "optimizer", "normalizer"),
}


def voxceleb_arguments(place, optimizer, output_folder):
    """A training with all augmentations, other speeds and a rising margin."""
    hparams = voxceleb.RECIPE.folder / "hparams" / "train_revnet.yaml"
    text = hparams.read_text()
    given = "!name:sb_memeff.optim.SGD8bit"
    assert given in text
    if "SGD" not in optimizer:
        text = text.replace("    momentum: 0.9\n", "").replace(
            "    nesterov: True\n", ""
        )
    path = place / f"{optimizer}.yaml"
    path.write_text(text.replace(given, f"!name:{optimizer}"))
    data = place / "data" / "tiny_voxceleb"
    return voxceleb.RECIPE.argv(
        "train_speaker_embeddings.py",
        path,
        *voxceleb.RUN,
        "--sentence_len=1.0",
        f"--data_folder={data}",
        f"--data_folder_noise={data / 'noise'}",
        f"--data_folder_rir={data / 'rir'}",
        "--out_n_neurons=18",
        f"--number_of_epochs={EPOCHS['voxceleb']}",
        "--warmup_epochs=1",
        "--lr=0.001",
        "--batch_size=8",
        "--ckpt_interval_minutes=0",
        "--ckpt_interval_steps=2",
        "--wav_augment={min_augmentations: 4, max_augmentations: 4}",
        "--augment_prob=1.0",
        "--speeds=[100, 90, 110]",
        "--initial_margin=0.0",
        "--margin_epochs=[1, 6]",
        f"--output_folder={output_folder}",
    )


def librispeech_arguments(place, optimizer, output_folder):
    """A training with dynamic batches and chunks, noise, echo and dropout."""
    path = librispeech.with_noise_and_echo(place)
    given = "!name:torch.optim.AdamW"
    text = path.read_text()
    assert given in text
    path = place / f"{optimizer}.yaml"
    path.write_text(text.replace(given, f"!name:{optimizer}"))
    flags = librispeech.digits(
        place,
        "",
        "--ckpt_interval_minutes=0",
        "--ckpt_interval_steps=2",
    )[1:]
    replaced = {
        "--output_folder": output_folder,
        "--number_of_epochs": EPOCHS["librispeech"],
    }
    return [
        str(librispeech.RECIPE.folder / "train.py"),
        str(path),
        *(f for f in flags if f.split("=")[0] not in replaced),
        *(f"{name}={value}" for name, value in replaced.items()),
    ]


def run_killed(place, argv, kills, rng):
    """Runs a script until it ends; kills it some times before.

    Returns
    -------
    list of float
        Seconds after which it was killed.
    """
    after = []
    while len(after) < kills:
        process, output = start(place, argv)
        wait = rng.uniform(1, MAX_SECONDS)
        process.join(wait)
        if not process.is_alive():
            assert process.exitcode == 0, output.read_text()[-3000:]
            break
        process.kill()
        process.join()
        after.append(wait)
    output_of(place, argv)
    return after


def differing(recipe, one, other):
    """Names of files of the last checkpoints that are not equal."""
    leaves = torch.utils._pytree.tree_leaves
    found = []
    for name in MODULES[recipe]:
        states = [
            leaves(
                torch.load(
                    last_checkpoint(folder) / f"{name}.ckpt",
                    weights_only=False,
                )
            )
            for folder in (one, other)
        ]
        same = [
            torch.equal(a, b) if torch.is_tensor(a) else a == b
            for a, b in zip(*states, strict=True)
        ]
        if not all(same):
            found.append(name)
    return found


def main():
    """Kills trainings with each optimizer and prints what differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--recipes", nargs="*", default=list(OPTIMIZERS))
    given = parser.parse_args()
    rng = random.Random(0)
    place = given.folder.resolve()
    place.mkdir(parents=True)
    voxceleb.make_corpus(place / "data" / "tiny_voxceleb")
    librispeech.make_corpora(place / "data")
    arguments = {
        "voxceleb": voxceleb_arguments,
        "librispeech": librispeech_arguments,
    }
    for recipe in given.recipes:
        for optimizer in OPTIMIZERS[recipe]:
            straight, killed = (
                place / "results" / recipe / f"{optimizer}_{name}"
                for name in ("straight", "killed")
            )
            output_of(place, arguments[recipe](place, optimizer, straight))
            after = run_killed(
                place,
                arguments[recipe](place, optimizer, killed),
                given.kills,
                rng,
            )
            left = [p.name for p in killed.glob("save/*partial*")]
            print(
                recipe,
                optimizer,
                f"{len(after)} kills; differing files:",
                differing(recipe, straight, killed) or "none",
                f"; partial checkpoints left: {left or 'none'}",
                flush=True,
            )


if __name__ == "__main__":
    main()
