"""The largest batch on a GPU of 11 GB, with and without this package.

It uses the analysis of ``sb-memeff fit`` to find the largest batch of a speaker
recipe, and the largest max_batch_len of the transducer recipe for utterances of up
to 25 s. No GPU is needed. All rows together take an hour: each adds a line to
results/fit_11gb.jsonl, and those with a line are not repeated.

    python benchmarks/fit_11gb.py

Authors
 * The sb_memeff authors 2026
"""

from pathlib import Path

from result_file import RESULTS, append_line, read_lines
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


ROWS = RESULTS / "fit_11gb.jsonl"


def speechbrains_loss(step):
    """Replaces the step's joint and loss by SpeechBrain's."""
    step.Tjoint = step.transducer_loss.joint
    step.transducer_lin = step.transducer_loss.classifier
    step.has_joint_loss = False


def cases():
    """Yields label, yaml file, overrides, seconds and variant of each row."""
    for depth in (34, 101, 293):
        for kind in ("ResNet", "RevNet"):
            path = VOXCELEB / f"train_{kind.lower()}.yaml"
            preset = f"{kind}{depth}"
            yield preset, path, {"preset": preset}, 2.0, None
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
        yield label, TRANSDUCER, {}, None, rows[label]


def measure(label, path, overrides, seconds, variant):
    """The largest batch of a row.

    Returns
    -------
    dict
        A line of the result file.
    """
    found = fit(
        path, overrides, usable("11GB"), seconds=seconds, variant=variant
    )
    return {
        "label": label,
        "hparams": path.name,
        "overrides": found.overrides,
        "batch": found.profile.batch_text,
        "precision": found.profile.precision,
        "optimizer": found.profile.optimizer,
        "peak_bytes": found.profile.memory.peak_bytes,
        "limit_bytes": found.limit,
    }


def main():
    """Fits, prints a Markdown table and adds to the result file."""
    print_head("", "on 11 GB", "peak")
    for label, *case in cases():
        if (label,) not in read_lines(ROWS, ("label",)):
            append_line(ROWS, measure(label, *case))
        row = read_lines(ROWS, ("label",))[label,]
        text = " ".join(f"--{k}={v}" for k, v in row["overrides"].items())
        print_row(label, f"`{text}`", f"{row['peak_bytes'] / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
