"""Memory of speaker-embedding training by kind, depth and batch.

This repeats the analysis with which Liu and Qian (arXiv 2412.01195) begin, for the
recipes here: ResNet34 to 293, vanilla and reversible, batches of 2 to 256
utterances of 2 s. Like ``sb-memeff profile`` it counts fake tensors, so the figures
are the same everywhere and no GPU is needed.

    python benchmarks/memory_analysis.py

writes the result file and two pictures beside it.

Authors
 * The sb_memeff authors 2026
"""

import re
import time
from pathlib import Path

from result_file import RESULTS, write_results
from table import print_head, print_row

from sb_memeff.analysis.plot import load_pyplot, plot_kinds
from sb_memeff.analysis.profile import profile
from sb_memeff.analysis.recipe import read_recipe

HPARAMS = (
    Path(__file__).resolve().parents[1]
    / "recipes/VoxCeleb/SpeakerRec_memeff/hparams"
)
DEPTHS = (34, 101, 152, 221, 293)
# From 2, because the embedding's batch norm cannot train on one utterance.
BATCHES = (2, 4, 16, 64, 256)
SECONDS = 2.0
# Name, yaml file, overrides, colour, marker.
NETWORKS = (
    ("ResNet", "train_resnet.yaml", {}, "#d95f02", "o"),
    (
        "RevNet Type I",
        "train_revnet.yaml",
        {"downsampling": "strided"},
        "#1b9e77",
        "s",
    ),
    (
        "RevNet Type II",
        "train_revnet.yaml",
        {"downsampling": "invertible"},
        "#2166ac",
        "^",
    ),
)
# Memory of common GPUs in GB.
GPUS = ((11, "2080 Ti"), (24, "3090"), (80, "A100"))


def analyse():
    """Profiles all networks, depths and batches.

    Returns
    -------
    dict
        Maps (network, depth, batch) to a Profile and its seconds.
    """
    found = {}
    for network, hparams, overrides, *_ in NETWORKS:
        for depth in DEPTHS:
            preset = f"{network.split()[0]}{depth}"
            recipe = read_recipe(
                HPARAMS / hparams, {**overrides, "preset": preset}
            )
            for batch in BATCHES:
                started = time.perf_counter()
                one = profile(recipe, batch, SECONDS)
                took = time.perf_counter() - started
                found[network, depth, batch] = one, took
                print(
                    f"{one.label}, batch {batch}: "
                    f"{one.memory.peak_bytes / 1e9:.2f} GB, {took:.0f} s",
                    flush=True,
                )
    return found


def plot_lines(found, path):
    """Draws memory against depth at batch 64, and against the batch.

    Arguments
    ---------
    found : dict
        Result of ``analyse``.
    path : Path
        The picture.
    """
    pyplot = load_pyplot()
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(9.5, 4.2), layout="constrained"
    )

    def peak(network, depth, batch):
        return found[network, depth, batch][0].memory.peak_bytes / 1e9

    for network, _, _, colour, marker in NETWORKS:
        style = {"color": colour, "marker": marker}
        left.plot(
            DEPTHS,
            [peak(network, depth, 64) for depth in DEPTHS],
            label=network,
            **style,
        )
        for depth, line in ((34, "--"), (293, "-")):
            right.plot(
                BATCHES,
                [peak(network, depth, batch) for batch in BATCHES],
                line,
                label=f"{network.replace('Net', f'Net{depth}')}",
                **style,
            )
    left.set_xticks(DEPTHS, [str(depth) for depth in DEPTHS])
    left.set_xlabel("layers")
    left.set_ylabel("peak memory of a training step (GB)")
    left.set_ylim(0)
    left.set_title("batch 64", fontsize="medium", loc="left")
    right.set_xscale("log", base=2)
    right.set_yscale("log")
    right.set_xticks(BATCHES, [str(batch) for batch in BATCHES])
    right.set_yticks([0.1, 1, 10, 100], ["0.1", "1", "10", "100"])
    right.set_xlabel("batch (utterances of 2 s)")
    right.set_title("34 and 293 layers", fontsize="medium", loc="left")
    for size, name in GPUS:
        right.axhline(size, color="#999999", linewidth=0.8, linestyle=":")
        right.annotate(
            f"{name}, {size} GB",
            (2, size),
            xytext=(2, 2),
            textcoords="offset points",
            fontsize="x-small",
            color="#666666",
        )
    for axes in (left, right):
        axes.legend(frameon=False, fontsize="small")
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    right.legend(
        frameon=False, fontsize="x-small", loc="lower right", handlelength=4
    )
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main():
    """Analyses, writes results and pictures, prints Markdown."""
    found = analyse()
    plot_lines(found, RESULTS / "memory_by_depth.png")
    plot_kinds(
        [
            found[network, depth, 64][0]
            for depth in (34, 293)
            for network, *_ in NETWORKS
        ],
        RESULTS / "memory_by_kind.png",
    )
    print()
    print_head("batch 64", *DEPTHS)
    for network, *_ in NETWORKS:
        cells = [
            f"{found[network, d, 64][0].memory.peak_bytes / 1e9:.1f} GB"
            for d in DEPTHS
        ]
        print_row(network, *cells)
    write_results(
        __file__,
        [
            {
                "network": re.sub("Net", f"Net{depth}", network),
                "batch": batch,
                "seconds": SECONDS,
                "precision": one.precision,
                "optimizer": one.optimizer,
                "peak_bytes": one.memory.peak_bytes,
                "by_kind": one.memory.by_kind,
                "analysis_s": round(took, 1),
            }
            for (network, depth, batch), (one, took) in found.items()
        ],
    )


if __name__ == "__main__":
    main()
