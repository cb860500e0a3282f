"""EER of ResNet34 and RevNet34 on a small corpus, by the recipe's scripts.

The same seed, data order and number of steps for all; a run that is there
already is continued. The corpus is laid out like VoxCeleb and has a
veri_test.txt.

    python benchmarks/eer_mini_voxceleb.py CORPUS OUTPUT_FOLDER

Authors
 * The sb_memeff authors 2026
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

from common import write_results

RECIPE = Path(__file__).resolve().parents[1] / "recipes/VoxCeleb/SpeakerRec"
SYSTEMS = {
    "ResNet34": ("resnet", []),
    "RevNet34_strided": ("revnet", ["--downsampling=strided"]),
    "RevNet34_invertible": ("revnet", ["--downsampling=invertible"]),
}
NETWORK = [
    "--base_channels=8",
    "--n_mels=40",
    "--lin_neurons=128",
    "--num_workers=0",
]
TRAINING = [
    "--out_n_neurons=207",
    "--batch_size=16",
    "--sentence_len=2.0",
    "--number_of_epochs=20",
    "--warmup_epochs=1",
    "--decay_factor=0.01",
]


def run(script, hparams, *flags):
    """Runs a script of the recipe."""
    command = [sys.executable, script, f"hparams/{hparams}", *flags]
    subprocess.run(command, cwd=RECIPE, check=True)


def main():
    """Trains, verifies, prints a Markdown table, writes the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("output_folder", type=Path)
    arguments = parser.parse_args()
    corpus = arguments.corpus.resolve()
    rows = []
    for name, (kind, flags) in SYSTEMS.items():
        folder = arguments.output_folder.resolve() / name
        common = [
            f"--data_folder={corpus}",
            f"--verification_file={corpus / 'veri_test.txt'}",
            f"--preset={name.split('_')[0]}",
            *flags,
            *NETWORK,
        ]
        run(
            "train_speaker_embeddings.py",
            f"train_{kind}.yaml",
            *common,
            *TRAINING,
            f"--output_folder={folder}",
        )
        log = (folder / "train_log.txt").read_text(encoding="utf-8")
        row = {"system": name, "flags": [*flags, *NETWORK, *TRAINING]}
        row["last_train_loss"] = float(
            re.findall(r"train loss: ([\d.e+-]+)", log)[-1]
        )
        row["steps"] = int(re.findall(r"steps: (\d+)", log)[-1])
        for state in ("untrained", "trained"):
            weights = "null" if state == "untrained" else folder / "save"
            run(
                "speaker_verification_cosine.py",
                f"verification_{kind}.yaml",
                *common,
                f"--output_folder={folder / state}",
                f"--pretrain_path={weights}",
            )
            result = (folder / state / "results.json").read_text()
            result = json.loads(result)
            row[state] = {k: result[k] for k in ("eer", "min_dcf", "trials")}
        rows.append(row)
    print("| system | EER untrained | EER | minDCF | last training loss |")
    print("|---|---|---|---|---|")
    for row in rows:
        before, after = row["untrained"], row["trained"]
        print(
            f"| {row['system']} | {before['eer']:.1f} % | {after['eer']:.2f} %"
            f" | {after['min_dcf']:.3f} | {row['last_train_loss']:.2f} |"
        )
    write_results(__file__, rows)


if __name__ == "__main__":
    main()
