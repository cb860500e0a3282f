"""Draws the memory of training steps.

Authors
 * The sb_memeff authors 2026
"""

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from sb_memeff.analysis.profile import Profile
from sb_memeff.memory.tracker import KINDS
from sb_memeff.memory.units import format_bytes

__all__ = ["check_picture", "load_pyplot", "plot_kinds", "plot_timelines"]

# Persistent memory in greys, a batch's memory in colours.
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
# Share of a timeline's height, about two pixels.
VISIBLE = 0.005
# Name and width of a timeline's phases. The axis is not time. Phases have the
# same width in all panels, so that panels can be compared, and room for names.
PHASES = {
    "forward": ("forward", 0.34),
    "backward": ("backward", 0.46),
    "step": ("optimizer", 0.2),
}


def plot_kinds(profiles: Sequence[Profile], path: str | Path) -> None:
    """Draws the peaks of training steps as stacked bars.

    Arguments
    ---------
    profiles : list of Profile
        One for each bar, the first at the top.
    path : str or Path
        File to write; its suffix determines the format.

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    """
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(
        figsize=(8.5, 1.9 + 0.5 * len(profiles)), layout="constrained"
    )
    labels = [one.label for one in profiles]
    heights = range(len(profiles))
    left = [0.0] * len(profiles)
    for kind in KINDS:
        widths = [one.memory.by_kind[kind] / 1e9 for one in profiles]
        if max(widths) > 0.001 * max(
            f.memory.peak_bytes / 1e9 for f in profiles
        ):
            axes.barh(
                heights, widths, left=left, label=kind, color=COLOURS[kind]
            )
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for height, total in zip(heights, left, strict=True):
        axes.annotate(
            f"{total:.2f} GB" if total < 10 else f"{total:.1f} GB",
            (total, height),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
        )
    axes.set_yticks(heights, labels)
    axes.invert_yaxis()
    # Room for the totals; margins() would stop at a bar without width.
    axes.set_xlim(0, 1.12 * max(left))
    axes.set_xlabel("peak memory of a training step (GB)")
    axes.set_title(_describe(profiles), fontsize="medium", loc="left")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    _save(figure, path)
    pyplot.close(figure)


def plot_timelines(profiles: Sequence[Profile], path: str | Path) -> None:
    """Draws the memory in use during training steps.

    Arguments
    ---------
    profiles : list of Profile
        One for each panel; all panels have the same axes.
    path : str or Path
        File to write; its suffix determines the format.

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    """
    pyplot = load_pyplot()
    columns = min(len(profiles), 2)
    rows = -(-len(profiles) // columns)
    figure, grid = pyplot.subplots(
        rows,
        columns,
        figsize=(8.5, 1.1 + 2.6 * rows),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    panels = list(grid.flat)
    most = max(one.memory.peak_bytes for one in profiles) / 1e9
    shown = {}
    for axes, one in zip(panels, profiles, strict=False):
        shown |= _draw_timeline(axes, one, most)
    for axes in panels[len(profiles) :]:
        axes.set_axis_off()
    for axes in panels[max(len(profiles) - columns, 0) : len(profiles)]:
        axes.set_xlabel("operations, in order (not timed)", fontsize="small")
    for axes in grid[:, 0]:
        axes.set_ylabel("memory alive (GB)")
    # Room for the peak's label.
    panels[0].set_ylim(0, 1.15 * most)
    figure.suptitle(
        f"One training step: {_describe(profiles)}",
        fontsize="medium",
        x=0.01,
        ha="left",
    )
    _save(figure, path, handles=[shown[k] for k in KINDS if k in shown])
    pyplot.close(figure)


def _describe(profiles: Sequence[Profile]) -> str:
    """Batch, precision and optimizers of a picture's steps."""
    first = profiles[0]
    optimizers = dict.fromkeys(one.optimizer for one in profiles)
    return f"{first.batch_text}, {first.precision}, {' or '.join(optimizers)}"


def _save(figure: Any, path: str | Path, **entries: Any) -> None:
    """Writes a figure with a legend of the kinds below it."""
    figure.legend(
        loc="outside lower center",
        ncols=4,
        frameon=False,
        fontsize="small",
        **entries,
    )
    figure.savefig(path, dpi=150)


def _draw_timeline(axes: Any, result: Profile, most: float) -> dict[str, Any]:
    """Draws one panel.

    Arguments
    ---------
    axes : matplotlib.axes.Axes
        The panel.
    result : Profile
        The step.
    most : float
        GB of the highest panel.

    Returns
    -------
    dict
        Maps each visible kind to its entry in the legend.
    """
    timeline = result.memory.timeline
    scale = 1 / sum(PHASES[phase][1] for phase in timeline)
    edges, names, gigabytes = [0.0], {}, {kind: [] for kind in KINDS}
    for phase, kinds in timeline.items():
        name, width = PHASES[phase]
        start, count = edges[-1], len(kinds[KINDS[0]])
        edges += [start + scale * width * (i + 1) / count for i in range(count)]
        names[name] = (start + edges[-1]) / 2
        for kind in KINDS:
            gigabytes[kind] += [size / 1e9 for size in kinds[kind]]
        if start:
            axes.axvline(start, color="#999999", linewidth=0.8, linestyle=":")
    shown, below = {}, [0.0] * (len(edges) - 1)
    for kind, sizes in gigabytes.items():
        top = [a + b for a, b in zip(below, sizes, strict=True)]
        area = axes.stairs(
            top, edges, baseline=below, fill=True, color=COLOURS[kind]
        )
        area.set_label(kind)
        if max(sizes) > VISIBLE * most:
            shown[kind] = area
        below = top
    highest = below.index(max(below))
    # Inside the panel, above the line between two phases.
    x = min(max(edges[highest], 0.12), 0.88)
    axes.annotate(
        _gigabytes(result.memory.peak_bytes, 1 if most >= 10 else 2),
        (x, below[highest]),
        xytext=(0, 5),
        textcoords="offset points",
        ha="center",
        weight="bold",
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
    )
    axes.grid(axis="y", color="#e5e5e5", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlim(0, 1)
    axes.set_xticks(list(names.values()), list(names))
    axes.tick_params(axis="x", length=0)
    axes.set_title(result.label, fontsize="medium", loc="left")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return shown


def _gigabytes(size: int, digits: int) -> str:
    """Formats peaks of one picture with equal precision; small ones in MB."""
    if size < 1e9:
        return format_bytes(size)
    return f"{size / 1e9:.{digits}f} GB"


def check_picture(path: str | Path) -> None:
    """Refuses a file that ``plot_kinds`` and ``plot_timelines`` cannot write.

    Arguments
    ---------
    path : str or Path
        File to write; its folder is not checked.

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    ValueError
        If its suffix is not of a supported format.
    """
    known = load_pyplot().Figure().canvas.get_supported_filetypes()
    suffix = Path(path).suffix.lower().removeprefix(".")
    if suffix not in known:
        raise ValueError(
            f"The suffix of {path} is not of a supported picture format: use one of "
            f"{', '.join(sorted(known))}."
        )


def load_pyplot() -> ModuleType:
    """Imports matplotlib's pyplot with a backend that only writes files.

    Returns
    -------
    module
        matplotlib.pyplot.

    Raises
    ------
    ImportError
        If it is not installed; the message names the command.
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
