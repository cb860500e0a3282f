"""The largest batch on a GPU of 11 GB, with and without this package.

It uses the analysis of ``sb-memeff fit`` to find the largest batch of a speaker
recipe, and the largest max_batch_len of the transducer recipe for utterances of up
to 25 s. No GPU is needed.

    python benchmarks/fit_11gb.py

Authors
 * The sb_memeff authors 2026
"""

from pathlib import Path

from result_file import write_results
from table import print_head, print_row

from sb_memeff.analysis.families.step import Variant
from sb_memeff.analysis.fit import fit, usable
from sb_memeff.analysis.recipe import read_recipe

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
VOXCELEB = RECIPES / "VoxCeleb/SpeakerRec_memeff/hparams"
TRANSDUCER = (
    RECIPES
    / "LibriSpeech/ASR/transducer_memeff/hparams/conformer_transducer.yaml"
)


def speechbrains_loss(step):
    """Replaces the step's joint and loss by SpeechBrain's."""
    step.Tjoint = step.transducer_loss.joint
    step.transducer_lin = step.transducer_loss.classifier
    step.has_joint_loss = False


def cases():
    """Yields yaml file, overrides, seconds and variant of each row."""
    for depth in (34, 101, 293):
        for kind in ("resnet", "revnet"):
            preset = {"resnet": "ResNet", "revnet": "RevNet"}[kind]
            path = VOXCELEB / f"train_{kind}.yaml"
            yield path, {"preset": f"{preset}{depth}"}, 2.0, None
    rows = {v.label: v for v in read_recipe(TRANSDUCER).variants()}
    rows["SpeechBrain's loss"] = Variant(
        "SpeechBrain's loss", speechbrains_loss
    )
    for label in (
        "SpeechBrain's loss",
        "tiled",
        "tiled, encoder recomputed",
        "tiled, CNN and encoder recomputed",
        "tiled, CNN and encoder in 8 pieces",
    ):
        yield TRANSDUCER, {}, None, rows[label]


def main():
    """Fits, prints a Markdown table and writes the result file."""
    limit = usable("11GB")
    rows = []
    print_head("", "on 11 GB", "peak")
    for path, overrides, seconds, variant in cases():
        found = fit(path, overrides, limit, seconds=seconds, variant=variant)
        row = {
            "hparams": path.name,
            "label": found.profile.label,
            "overrides": found.overrides,
            "batch": found.profile.batch_text,
            "precision": found.profile.precision,
            "optimizer": found.profile.optimizer,
            "peak_bytes": found.profile.memory.peak_bytes,
            "limit_bytes": found.limit,
        }
        rows.append(row)
        text = " ".join(f"--{k}={v}" for k, v in found.overrides.items())
        peak = f"{row['peak_bytes'] / 1e9:.2f} GB"
        print_row(row["label"], f"`{text}`", peak)
    write_results(__file__, rows)


if __name__ == "__main__":
    main()
