"""Counts the yaml files of SpeechBrain's recipes that the memory analysis reads.

It profiles a training step of every yaml file in a checkout of SpeechBrain, as
``sb-memeff profile`` does, without data and without a GPU. Files that state no
length of utterances get 3 s. The checkout's own package constructs the networks,
because names differ between releases. This takes ten minutes.

    PYTHONPATH=CHECKOUT python benchmarks/upstream_recipes.py CHECKOUT

A file is read, or refused in one sentence. Any other error ends the run.

Authors
 * The sb_memeff authors 2026
"""

import sys
from collections import Counter
from pathlib import Path

import speechbrain
from result_file import write_results
from table import print_head, print_row

from sb_memeff.analysis.profile import profile
from sb_memeff.analysis.recipe import read_recipe

SECONDS = 3.0


def read(path):
    """Profiles a yaml file.

    Returns
    -------
    dict
        A row of the result file.
    """
    recipe = read_recipe(path)
    seconds = None
    try:
        result = profile(recipe)
    except ValueError as error:
        if "--seconds" not in str(error):
            raise
        seconds = SECONDS
        result = profile(recipe, seconds=seconds)
    return {
        "family": recipe.family,
        "label": result.label,
        "batch": result.batch_text,
        "seconds_given": seconds,
        "precision": result.precision,
        "optimizer": result.optimizer,
        "peak_bytes": result.memory.peak_bytes,
    }


def main():
    """Reads all, prints counts as a Markdown table, writes the result file."""
    checkout = Path(sys.argv[1]).resolve()
    if checkout not in Path(speechbrain.__file__).parents:
        sys.exit(f"Set PYTHONPATH={checkout}.")
    rows = []
    for path in sorted(checkout.glob("recipes/**/*.yaml")):
        name = str(path.relative_to(checkout / "recipes"))
        if "hparams" not in name:
            continue
        try:
            row = {"yaml": name, **read(path)}
        except ValueError as error:
            sentence = str(error).replace(f"{checkout}/recipes/", "")
            assert "\n" not in sentence, sentence
            row = {"yaml": name, "refused": sentence}
        rows.append(row)
        print(row, file=sys.stderr, flush=True)
    families = Counter(row.get("family") for row in rows)
    print_head("family", "yaml files")
    for family, count in families.most_common():
        print_row(family or "refused", count)
    version = (checkout / "speechbrain/version.txt").read_text().strip()
    write_results(__file__, {"checkout": version, "rows": rows})


if __name__ == "__main__":
    main()
