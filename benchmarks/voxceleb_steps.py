"""What each step of a VoxCeleb recipe is worth, on a small corpus.

Adds one step at a time: speeds as new speakers, a rising margin, the large-margin
stage, the mean of checkpoints, AS-Norm, calibration. Then batch sizes at equal
epochs and learning rate. Networks, corpus and optimizer are those of
eer_mini_voxceleb.py; its pieces of 3 s limit the crops of the large-margin stage.
All trainings together take hours: each adds a line to
results/voxceleb_steps.jsonl, and those with a line are not repeated.

    python benchmarks/voxceleb_steps.py CORPUS OUTPUT_FOLDER
    python benchmarks/voxceleb_steps.py CORPUS OUTPUT_FOLDER --device cuda --jobs 6

Authors
 * The sb_memeff authors 2026
"""

import argparse
import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from eer_mini_voxceleb import (
    OPTIMIZERS,
    TRAINING,
    mean_and_error,
    network_flags,
    run_script,
    with_optimizer,
)
from result_file import RESULTS, append_line, read_lines, write_results
from table import print_head, print_row

from sb_memeff.utils.atomic_checkpoints import best_checkpoint

NETWORKS = ["ResNet34", "RevNet34 Type II"]
SEEDS = [1986, 1987, 1988]
OPTIMIZER = "SGD"
RUNS = RESULTS / "voxceleb_steps.jsonl"
KEYS = ("network", "training", "seed")
# Flags of each training; a later one replaces an earlier one of its name.
SPEEDS = ["--speeds=[100,90,110]", "--out_n_neurons=621"]
MARGIN = ["--initial_margin=0.0", "--margin_epochs=[3,7]"]
# Utterances have 3 s, so the crops have too. The rate starts at a little more than
# the last one of the first stage.
LARGE_MARGIN = [
    "--sentence_len=3.0",
    "--batch_size=16",
    "--number_of_epochs=3",
    "--warmup_epochs=0.5",
    "--lr=0.0015",
    "--decay_factor=0.33",
]
# The mean is saved, but a training without it can be followed, too.
MEAN = ["--avg_checkpoints=4"]
TRAININGS = {
    "plain": [],
    "speeds": SPEEDS,
    "margin": [*SPEEDS, *MARGIN, *MEAN],
    "large margin": LARGE_MARGIN,
    "large margin of the mean": LARGE_MARGIN,
    **{f"batch {size}": [f"--batch_size={size}"] for size in (32, 64, 128)},
}
# What each row of the first table adds, its training, its stage of verification.
STEPS = [
    ("plain", "plain", "cosine"),
    ("+ speeds as speakers", "speeds", "cosine"),
    ("+ rising margin", "margin", "cosine"),
    ("+ large-margin stage", "large margin", "cosine"),
    ("+ mean of checkpoints", "large margin of the mean", "cosine"),
    ("+ AS-Norm", "large margin of the mean", "s-norm"),
    ("+ calibration (QMF)", "large margin of the mean", "qmf"),
]
BATCHES = [("batch 16", "plain", "cosine")] + [
    (name, name, "cosine") for name in TRAININGS if name.startswith("batch")
]
VERIFICATION = [
    "--score_norm=s-norm",
    "--cohort_size=50",
    "--calibration_trials=20000",
]
# Figures of results.json, and how they are printed.
FIGURES = {
    "eer": "{:.2f} ± {:.2f} %",
    "min_dcf": "{:.3f} ± {:.3f}",
    "min_dcf_p05": "{:.3f} ± {:.3f}",
    "cllr": "{:.3f} ± {:.3f}",
}


def with_flags(*lists):
    """Command-line flags; the last of a name counts."""
    flags = {flag.split("=", 1)[0]: flag for flags in lists for flag in flags}
    return list(flags.values())


def without_mean(save_folder):
    """A save folder with the weights of the best checkpoint alone.

    Arguments
    ---------
    save_folder : Path
        Of a training that saved a mean of checkpoints.

    Returns
    -------
    Path
        The folder.
    """
    folder = save_folder.parent / "best"
    folder.mkdir(exist_ok=True)
    best = best_checkpoint(save_folder).path
    for path in (
        best / "embedding_model.ckpt",
        best / "classifier.ckpt",
        save_folder / "label_encoder.txt",
    ):
        shutil.copy(path, folder)
    return folder


def measure(network, training, seed, corpus, output, device):
    """Trains and verifies once.

    Arguments
    ---------
    network : str
        One of NETWORKS.
    training : str
        A key of TRAININGS.
    seed : int
        The recipe's seed.
    corpus : Path
        The corpus.
    output : Path
        Folder of the trainings of this network and seed.
    device : str
        Device of the training.

    Returns
    -------
    dict
        A row of the result file.
    """
    kind, flags = network_flags(network)
    folder = output / training.replace(" ", "_")
    first = output / "margin" / "save"
    start = []
    if training.startswith("large margin"):
        if not (first / "embedding_model.ckpt").is_file():
            raise FileNotFoundError(
                f"There is no training in {first}: remove the line of {network}, "
                f"margin, {seed} from {RUNS} to repeat it."
            )
        source = first if "mean" in training else without_mean(first)
        start = [f"--large_margin={source}"]
    rate = [f"--lr={OPTIMIZERS[OPTIMIZER][2]}"]
    flags_of_training = with_flags(TRAINING, rate, TRAININGS[training])
    common = [
        f"--data_folder={corpus}",
        f"--verification_file={corpus / 'veri_test.txt'}",
        f"--seed={seed}",
        f"--device={device}",
        *flags,
    ]
    began = time.perf_counter()
    run_script(
        "train_speaker_embeddings.py",
        with_optimizer(f"train_{kind}.yaml", OPTIMIZER, folder),
        *common,
        *flags_of_training,
        *start,
        f"--output_folder={folder}",
    )
    seconds = time.perf_counter() - began
    weights = folder / "save"
    if training == "margin":
        weights = without_mean(weights)
    run_script(
        "speaker_verification_cosine.py",
        f"hparams/verification_{kind}.yaml",
        *common,
        *VERIFICATION,
        f"--pretrain_path={weights}",
        f"--train_data={folder / 'save' / 'train.csv'}",
        f"--output_folder={folder / 'verification'}",
    )
    path = folder / "verification" / "results.json"
    results = json.loads(path.read_text(encoding="utf-8"))
    return {
        **dict(zip(KEYS, (network, training, seed))),
        "device": device,
        "flags": [*flags, *flags_of_training, *VERIFICATION],
        "seconds": round(seconds),
        "trials": results["trials"],
        "stages": results["stages"],
    }


def report(steps, done):
    """Prints a Markdown table for each network: means and standard errors.

    Arguments
    ---------
    steps : list of tuple
        Like STEPS.
    done : dict
        Result of ``read_lines``.

    Returns
    -------
    list of dict
        The rows.
    """
    found = []
    for network in NETWORKS:
        print_head(
            network, "EER", "minDCF 0.01", "minDCF 0.05", "Cllr", "seeds"
        )
        for name, training, stage in steps:
            rows = [
                done[network, training, seed]
                for seed in SEEDS
                if (network, training, seed) in done
            ]
            # Of one seed there is no error.
            if len(rows) < 2:
                continue
            figures = {
                key: mean_and_error([row["stages"][stage][key] for row in rows])
                for key in FIGURES
            }
            found.append(
                {"network": network, "step": name, "seeds": len(rows)} | figures
            )
            print_row(
                name,
                *(form.format(*figures[k]) for k, form in FIGURES.items()),
                len(rows),
            )
        print()
    return found


def main():
    """Trains, verifies, prints Markdown tables, writes the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("output_folder", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--jobs", type=int, default=1, help="networks and seeds at a time"
    )
    parser.add_argument(
        "--done",
        action="store_true",
        help="report the trainings that are done, and train nothing",
    )
    arguments = parser.parse_args()
    corpus = arguments.corpus.resolve()
    output = arguments.output_folder.resolve()

    def run(network, seed):
        """One after the other: the large-margin stages follow a training."""
        folder = output / f"{network}_{seed}".replace(" ", "_")
        for training in TRAININGS:
            job = network, training, seed
            if job not in read_lines(RUNS, KEYS):
                row = measure(*job, corpus, folder, arguments.device)
                append_line(RUNS, row)

    if not arguments.done:
        with ThreadPoolExecutor(arguments.jobs) as pool:
            # Seed by seed.
            chains = [(n, seed) for seed in SEEDS for n in NETWORKS]
            list(pool.map(lambda chain: run(*chain), chains))
    done = read_lines(RUNS, KEYS)
    rows = [
        done[job]
        for network in NETWORKS
        for training in TRAININGS
        for seed in SEEDS
        if (job := (network, training, seed)) in done
    ]
    results = {"steps": report(STEPS, done), "batches": report(BATCHES, done)}
    write_results(__file__, {"runs": rows, **results})


if __name__ == "__main__":
    main()
