"""EER of vanilla and reversible networks on a small corpus, with the recipe.

Trainings with one seed have the same data order and number of steps. Reversible
networks store their activations: the gradients are the same, and a step takes less
time. All together take hours: each adds a line to results/eer_mini_voxceleb.jsonl, and those with a line are
not repeated. The corpus has the layout of VoxCeleb and a veri_test.txt.

    python benchmarks/eer_mini_voxceleb.py CORPUS OUTPUT_FOLDER
    python benchmarks/eer_mini_voxceleb.py CORPUS OUTPUT_FOLDER --device cuda --jobs 12

Authors
 * The sb_memeff authors 2026
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from result_file import (
    RESULTS,
    append_line,
    read_lines,
    write_results,
)
from speechbrain.lobes.models.ECAPA_TDNN import Classifier
from table import print_head, print_row
from timing import median_seconds, training_step

from sb_memeff import optim
from sb_memeff.lobes.models.DFResNet import DFResNet
from sb_memeff.lobes.models.RecomputedECAPA_TDNN import ECAPA_TDNN
from sb_memeff.lobes.models.RevDFResNet import RevDFResNet
from sb_memeff.lobes.models.RevECAPA_TDNN import RevECAPA_TDNN
from sb_memeff.lobes.models.RevResNet import RevResNet
from sb_memeff.lobes.models.WeSpeakerResNet import ResNet
from sb_memeff.memory.step import training_step_memory

RECIPE = (
    Path(__file__).resolve().parents[1] / "recipes/VoxCeleb/SpeakerRec_memeff"
)
INPUTS = ["--n_mels=40", "--num_workers=0"]
EMBEDDING = 128
RESNET = {"base_channels": 8, "lin_neurons": EMBEDDING}
ECAPA = {
    "channels": [128, 128, 128, 128, 384],
    "attention_channels": 32,
    "lin_neurons": EMBEDDING,
}
# Suffix of the recipe's yaml files, overrides, the network's class.
NETWORKS = {
    "ResNet34": ("resnet", {**RESNET, "preset": "ResNet34"}, ResNet),
    "RevNet34 Type I": (
        "revnet",
        {**RESNET, "preset": "RevNet34", "downsampling": "strided"},
        RevResNet,
    ),
    "RevNet34 Type II": (
        "revnet",
        {**RESNET, "preset": "RevNet34", "downsampling": "invertible"},
        RevResNet,
    ),
    "DFResNet56": ("dfresnet", {**RESNET, "preset": "DFResNet56"}, DFResNet),
    "DFRevNet56 Type I": (
        "dfrevnet",
        {**RESNET, "preset": "DFRevNet56", "downsampling": "strided"},
        RevDFResNet,
    ),
    "DFRevNet56 Type II": (
        "dfrevnet",
        {**RESNET, "preset": "DFRevNet56", "downsampling": "invertible"},
        RevDFResNet,
    ),
    "ECAPA-TDNN": ("ecapa", ECAPA, ECAPA_TDNN),
    "RevECAPA-TDNN": ("revecapa", ECAPA, RevECAPA_TDNN),
}
SGD = """
    lr: !ref <lr>
    momentum: 0.9
    nesterov: True
    weight_decay: 0.0001
"""
ADAM = """
    lr: !ref <lr>
    weight_decay: 0.000002
"""
# The optimizer's class, its settings in the yaml file, learning rate.
OPTIMIZERS = {
    "SGD": ("torch.optim.SGD", SGD, 0.1),
    "SGD8bit": ("sb_memeff.optim.SGD8bit", SGD, 0.1),
    "Adam": ("torch.optim.Adam", ADAM, 0.002),
    "Adam8bit": ("sb_memeff.optim.Adam8bit", ADAM, 0.002),
}
# Their networks take save_memory.
REVERSIBLE = {"train_revnet.yaml", "train_dfrevnet.yaml", "train_revecapa.yaml"}
SYSTEMS = [
    (network, optimizer)
    for network in ("ResNet34", "RevNet34 Type II")
    for optimizer in OPTIMIZERS
] + [
    ("RevNet34 Type I", "SGD"),
    ("DFResNet56", "SGD"),
    ("DFRevNet56 Type I", "SGD"),
    ("DFRevNet56 Type II", "SGD"),
    ("ECAPA-TDNN", "Adam"),
    ("RevECAPA-TDNN", "Adam"),
]
FIRST_SEED = 1986
MOST_SEEDS = 8
# Eight seeds where systems are compared: EERs of one system lie up to 2 points apart.
EIGHT_SEEDS = [
    (network, optimizer)
    for network in ("ResNet34", "RevNet34 Type II")
    for optimizer in OPTIMIZERS
] + [("RevNet34 Type I", "SGD")]
# System and reference: pairs of the same seed.
PAIRS = [
    ((network, f"{optimizer}8bit"), (network, optimizer))
    for network in ("ResNet34", "RevNet34 Type II")
    for optimizer in ("SGD", "Adam")
] + [
    ((f"RevNet34 Type {kind}", "SGD"), ("ResNet34", "SGD"))
    for kind in ("I", "II")
]
# A line for each training, written when it ends.
RUNS = RESULTS / "eer_mini_voxceleb.jsonl"
TRAINING = [
    "--out_n_neurons=207",
    "--batch_size=16",
    "--sentence_len=2.0",
    "--number_of_epochs=10",
    "--warmup_epochs=1",
    "--decay_factor=0.01",
]


def seeds(network, optimizer):
    """The seeds of a system's trainings."""
    number = MOST_SEEDS if (network, optimizer) in EIGHT_SEEDS else 1
    return range(FIRST_SEED, FIRST_SEED + number)


def network_flags(network):
    """Suffix of the yaml files of a network, and flags for both scripts.

    Arguments
    ---------
    network : str
        A key of NETWORKS.

    Returns
    -------
    str
        Such as "resnet".
    list of str
        Sizes and features.
    """
    kind, sizes, _ = NETWORKS[network]
    flags = [
        f"--{key}={value}".replace(" ", "") for key, value in sizes.items()
    ]
    return kind, flags + INPUTS


def run_script(script, hparams, *flags):
    """Runs a script of the recipe."""
    command = [sys.executable, script, str(hparams), *flags]
    subprocess.run(command, cwd=RECIPE, check=True)


def with_optimizer(hparams, optimizer, folder):
    """Writes the recipe's yaml file with another opt_class; activations are stored.

    Arguments
    ---------
    hparams : str
        Name of the yaml file.
    optimizer : str
        A key of OPTIMIZERS.
    folder : Path
        Folder of the new file.

    Returns
    -------
    Path
        The new file.
    """
    name, settings, _ = OPTIMIZERS[optimizer]
    text = (RECIPE / "hparams" / hparams).read_text(encoding="utf-8")
    text, found = re.subn(
        r"(?m)^opt_class: .*\n(?:    .*\n)+",
        f"opt_class: !name:{name}{settings}",
        text,
    )
    assert found == 1, f"{hparams}: opt_class was found {found} times"
    if hparams in REVERSIBLE:
        text, found = re.subn(
            r"(?m)^(embedding_model: .*\n)", r"\1    save_memory: False\n", text
        )
        assert found == 1, f"{hparams}: {found} embedding models"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / hparams
    path.write_text(text, encoding="utf-8")
    return path


def measure(network, optimizer, seed, corpus, folder, device):
    """Trains and verifies one system.

    Arguments
    ---------
    network : str
        A key of NETWORKS.
    optimizer : str
        A key of OPTIMIZERS.
    seed : int
        The recipe's seed.
    corpus : Path
        The corpus.
    folder : Path
        Folder for all outputs.
    device : str
        Device of the training.

    Returns
    -------
    dict
        A row of the result file.
    """
    kind, flags = network_flags(network)
    rate = OPTIMIZERS[optimizer][2]
    common = [
        f"--data_folder={corpus}",
        f"--verification_file={corpus / 'veri_test.txt'}",
        f"--seed={seed}",
        f"--device={device}",
        *flags,
    ]
    run_script(
        "train_speaker_embeddings.py",
        with_optimizer(f"train_{kind}.yaml", optimizer, folder),
        *common,
        *TRAINING,
        f"--lr={rate}",
        f"--output_folder={folder}",
    )
    log = (folder / "train_log.txt").read_text(encoding="utf-8")
    row = {
        "network": network,
        "optimizer": optimizer,
        "seed": seed,
        "device": device,
        "flags": [*flags, *TRAINING, f"--lr={rate}"],
        "last_train_loss": float(
            re.findall(r"train loss: ([\d.e+-]+)", log)[-1]
        ),
        "steps": int(re.findall(r"steps: (\d+)", log)[-1]),
    }
    for state in ("untrained", "trained"):
        weights = "null" if state == "untrained" else folder / "save"
        run_script(
            "speaker_verification_cosine.py",
            f"hparams/verification_{kind}.yaml",
            *common,
            f"--output_folder={folder / state}",
            f"--pretrain_path={weights}",
        )
        results = (folder / state / "results.json").read_text(encoding="utf-8")
        result = json.loads(results)
        row[state] = {k: result[k] for k in ("eer", "min_dcf", "trials")}
    return row


def runs():
    """Rows of the result file by network, optimizer and seed."""
    return read_lines(RUNS, ("network", "optimizer", "seed"))


def build(network):
    """Builds embedding model and classifier as in the recipe.

    Arguments
    ---------
    network : str
        A key of NETWORKS.

    Returns
    -------
    torch.nn.Module
        Maps features to cosines.
    """
    _, sizes, kind = NETWORKS[network]
    make, name = kind, {}
    if "preset" in sizes:
        make, name = kind.from_preset, {"name": sizes["preset"]}
    others = {k: v for k, v in sizes.items() if k != "preset"}
    embedding = make(input_size=40, **name, **others)
    classifier = Classifier(input_size=EMBEDDING, out_neurons=207)
    return torch.nn.Sequential(embedding, classifier)


def make_optimizer(optimizer):
    """Returns a function that makes an optimizer with the recipe's settings.

    Arguments
    ---------
    optimizer : str
        A key of OPTIMIZERS.

    Returns
    -------
    callable
        Makes the optimizer from parameters.
    """
    module = optim if optimizer.endswith("8bit") else torch.optim
    options = {"lr": 1e-4}
    if optimizer.startswith("SGD"):
        options.update(momentum=0.9, nesterov=True)
    return lambda parameters: getattr(module, optimizer)(parameters, **options)


def costs(rounds=7):
    """Measures state bytes, peak memory and time per step of all systems.

    Arguments
    ---------
    rounds : int
        Timed steps of each; the median counts.

    Returns
    -------
    dict
        Maps (network, optimizer) to a dict.
    """
    shape = (16, 200, 40)
    features = torch.randn(shape)
    found, optimizers, steps = {}, {}, {}
    for network, name in SYSTEMS:
        key = network, name
        memory = training_step_memory(
            lambda network=network: build(network), shape, make_optimizer(name)
        )
        found[key] = {"peak_bytes": memory.peak_bytes}
        net = build(network)
        optimizers[key] = make_optimizer(name)(net.parameters())
        steps[key] = training_step(net, features, optimizers[key])
    for key, step_s in median_seconds(steps, rounds).items():
        found[key]["step_s"] = step_s
        found[key]["state_bytes"] = optim.state_bytes(optimizers[key])
    return found


def mean_and_error(values):
    """Mean and its standard error."""
    return statistics.mean(values), statistics.stdev(values) / len(
        values
    ) ** 0.5


def report_pairs(rows):
    """Prints a Markdown table of systems with several seeds.

    Arguments
    ---------
    rows : list of dict
        Results of ``measure``.

    Returns
    -------
    list of dict
        EERs of both systems and their difference: mean and standard error.
    """
    eers = {}
    for row in rows:
        system = eers.setdefault((row["network"], row["optimizer"]), {})
        system[row["seed"]] = row["trained"]["eer"]
    found = []
    print_head("system", "EER", "reference", "EER", "difference", "seeds")
    for system, reference in PAIRS:
        both = sorted(eers.get(system, {}).keys() & eers.get(reference, {}))
        if len(both) < 2:
            continue
        ours = [eers[system][seed] for seed in both]
        theirs = [eers[reference][seed] for seed in both]
        differences = [a - b for a, b in zip(ours, theirs)]
        row = {
            "system": system,
            "reference": reference,
            "seeds": both,
            "eer": mean_and_error(ours),
            "reference_eer": mean_and_error(theirs),
            "difference": mean_and_error(differences),
        }
        found.append(row)
        print_row(
            " ".join(system),
            "{:.2f} ± {:.2f} %".format(*row["eer"]),
            " ".join(reference),
            "{:.2f} ± {:.2f} %".format(*row["reference_eer"]),
            "{:+.2f} ± {:.2f}".format(*row["difference"]),
            str(len(both)),
        )
    return found


def main():
    """Trains, verifies, prints a Markdown table, writes the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("output_folder", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--jobs", type=int, default=1, help="trainings at the same time"
    )
    parser.add_argument(
        "--done",
        action="store_true",
        help="report the trainings that are done, and train nothing",
    )
    arguments = parser.parse_args()
    # Systems that are compared come first, seed by seed.
    jobs = sorted(
        (
            (network, optimizer, seed)
            for network, optimizer in SYSTEMS
            for seed in seeds(network, optimizer)
        ),
        key=lambda job: (job[:2] not in EIGHT_SEEDS, job[2]),
    )
    corpus, output = (
        arguments.corpus.resolve(),
        arguments.output_folder.resolve(),
    )

    def run(job):
        folder = output / "_".join(map(str, job)).replace(" ", "_")
        row = measure(*job, corpus, folder, arguments.device)
        append_line(RUNS, row)

    if not arguments.done:
        done = runs()
        with ThreadPoolExecutor(arguments.jobs) as pool:
            list(pool.map(run, [job for job in jobs if job not in done]))
    rows = [runs()[job] for job in jobs if job in runs()]
    measured = costs()
    print_head(
        "network",
        "optimizer",
        "seed",
        "EER untrained",
        "EER",
        "minDCF",
        "last training loss",
        "states",
        "peak",
        "s/step",
    )
    for row in rows:
        row.update(measured[row["network"], row["optimizer"]])
        before, after = row["untrained"], row["trained"]
        print_row(
            *(row[name] for name in ("network", "optimizer", "seed")),
            f"{before['eer']:.1f} %",
            f"{after['eer']:.2f} %",
            f"{after['min_dcf']:.3f}",
            f"{row['last_train_loss']:.2f}",
            f"{row['state_bytes'] / 1e6:.2f} MB",
            f"{row['peak_bytes'] / 1e6:.0f} MB",
            f"{row['step_s']:.2f}",
        )
    print()
    write_results(__file__, {"runs": rows, "pairs": report_pairs(rows)})


if __name__ == "__main__":
    main()
