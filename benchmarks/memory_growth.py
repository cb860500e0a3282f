"""Memory of the process in the course of a training, with each recipe.

The resident memory after some steps, when Python's garbage is collected and free
pages are returned. A checkpoint is saved every 50 steps. Batches of LibriSpeech have
many shapes, for each of which torch's libraries keep something at first. The corpora
have the layouts of VoxCeleb and LibriSpeech (digits).

    python benchmarks/memory_growth.py VOXCELEB DIGITS OUTPUT_FOLDER

Authors
 * The sb_memeff authors 2026
"""

import ctypes
import gc
import importlib
import multiprocessing
import sys
from pathlib import Path

from result_file import write_results
from table import print_head, print_row

from sb_memeff.brain import MemEffBrain

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
STEPS = 900
EVERY = 50
SHOWN = (50, 300, 600, 900)
COMMON = [
    "--device=cpu",
    "--noprogressbar",
    "--number_of_epochs=1000",
    f"--optimizer_step_limit={STEPS}",
    "--ckpt_interval_minutes=0",
    f"--ckpt_interval_steps={EVERY}",
]
TRAININGS = {
    "VoxCeleb, RevNet34 Type II, SGD8bit": (
        "VoxCeleb/SpeakerRec_memeff",
        "train_speaker_embeddings",
        "train_revnet.yaml",
        [
            "--num_workers=0",
            "--base_channels=8",
            "--lin_neurons=32",
            "--n_mels=40",
            "--batch_size=8",
            "--sentence_len=1.0",
            "--out_n_neurons=217",
            "--verification_file=null",
        ],
    ),
    "LibriSpeech, digits, AdamW8bit": (
        "LibriSpeech/ASR/transducer_memeff",
        "train",
        "digits_transducer.yaml",
        ["--max_batch_len=20"],
    ),
}


def resident_bytes():
    """Resident memory of this process without garbage and free pages."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    status = Path("/proc/self/status").read_text().split("VmRSS:")[1]
    return 1024 * int(status.split()[0])


def train(label, corpus, output_folder, found):
    """Trains, and appends the memory after every EVERY steps."""
    folder, script, hparams, flags = TRAININGS[label]
    recipe = RECIPES / folder
    sys.path.insert(0, str(recipe))
    fit_batch = MemEffBrain.fit_batch

    def watched(brain, batch):
        loss = fit_batch(brain, batch)
        if brain.optimizer_step % EVERY == 0:
            found.append((brain.optimizer_step, resident_bytes()))
        return loss

    MemEffBrain.fit_batch = watched
    importlib.import_module(script).main(
        [
            str(recipe / "hparams" / hparams),
            f"--data_folder={corpus}",
            f"--output_folder={output_folder}",
            *COMMON,
            *flags,
        ]
    )


def main():
    """Trains with each recipe, prints a table and writes the result file."""
    *corpora, output = map(Path, sys.argv[1:])
    context = multiprocessing.get_context("spawn")
    results = []
    print_head("", *(f"step {n}" for n in SHOWN), "600 to 900")
    for label, corpus in zip(TRAININGS, corpora, strict=True):
        with context.Manager() as manager:
            found = manager.list()
            arguments = label, corpus, output / label.split(",")[0], found
            process = context.Process(target=train, args=arguments)
            process.start()
            process.join()
            bytes_after = dict(found)
        results.append({"training": label, "bytes_after_step": bytes_after})
        print_row(
            label,
            *(f"{bytes_after[n] / 1e6:.0f} MB" for n in SHOWN),
            f"{100 * (bytes_after[900] / bytes_after[600] - 1):+.2f} %",
        )
    write_results(__file__, results)


if __name__ == "__main__":
    main()
