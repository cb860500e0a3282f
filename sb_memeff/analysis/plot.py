"""Pictures of where the memory goes.

Authors
 * The sb_memeff authors 2026
"""

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from sb_memeff.analysis.profile import Profile
from sb_memeff.memory.step import KINDS

__all__ = ["check_picture", "load_pyplot", "plot_kinds"]

# What is always there in greys, what a batch brings in colours.
COLOURS = {
    "parameters": "#4d4d4d",
    "buffers": "#7f7f7f",
    "gradients": "#a6a6a6",
    "optimizer states": "#d0d0d0",
    "inputs": "#8c6bb1",
    "activations": "#d95f02",
    "recomputed": "#1b9e77",
    "temporaries": "#7fc7e8",
}


def plot_kinds(profiles: Sequence[Profile], path: str | Path) -> None:
    """Draws the peaks of training steps as stacked bars.

    Arguments
    ---------
    profiles : list of Profile
        One bar each, the first at the top.
    path : str or Path
        File to write; its suffix says the format.

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    """
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(
        figsize=(8.5, 1.9 + 0.5 * len(profiles)), layout="constrained"
    )
    labels = [found.label for found in profiles]
    places = range(len(profiles))
    left = [0.0] * len(profiles)
    for kind in KINDS:
        widths = [found.memory.by_kind[kind] / 1e9 for found in profiles]
        if max(widths) > 0.001 * max(
            f.memory.peak_bytes / 1e9 for f in profiles
        ):
            axes.barh(
                places, widths, left=left, label=kind, color=COLOURS[kind]
            )
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for place, total in zip(places, left, strict=True):
        axes.annotate(
            f"{total:.2f} GB" if total < 10 else f"{total:.1f} GB",
            (total, place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
        )
    axes.set_yticks(places, labels)
    axes.invert_yaxis()
    # Room for the totals; margins() would stop at a bar without width.
    axes.set_xlim(0, 1.12 * max(left))
    axes.set_xlabel("peak memory of a training step (GB)")
    first = profiles[0]
    optimizers = dict.fromkeys(found.optimizer for found in profiles)
    axes.set_title(
        f"{first.batch_text}, {first.precision}, {' or '.join(optimizers)}",
        fontsize="medium",
        loc="left",
    )
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.legend(
        loc="outside lower center", ncols=4, frameon=False, fontsize="small"
    )
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def check_picture(path: str | Path) -> None:
    """Refuses a file that ``plot_kinds`` could not write.

    Arguments
    ---------
    path : str or Path
        File to write; its folder is not looked at.

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    ValueError
        If its suffix says no format.
    """
    known = load_pyplot().Figure().canvas.get_supported_filetypes()
    suffix = Path(path).suffix.lower().removeprefix(".")
    if suffix not in known:
        raise ValueError(
            f"The suffix of {path} says no format for pictures: take one of "
            f"{', '.join(sorted(known))}."
        )


def load_pyplot() -> ModuleType:
    """Matplotlib's pyplot, for files alone.

    Returns
    -------
    module
        matplotlib.pyplot.

    Raises
    ------
    ImportError
        If it is not installed; says how to.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(
            "Pictures need matplotlib: pip install 'sb_memeff[plot]'."
        ) from error
    # No display is needed to write a file.
    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot
