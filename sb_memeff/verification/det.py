"""Detection error trade-off (DET) curves.

Authors
 * The sb_memeff authors 2026
"""

from collections.abc import Mapping
from pathlib import Path

import torch

from sb_memeff.verification.errors import DetectionErrors

__all__ = ["check_picture", "plot_det"]

# Ticks of both axes, in percent.
TICKS = (0.01, 0.1, 0.5, 1, 2, 5, 10, 20, 40)
FORMATS = (".png", ".pdf", ".svg")


def check_picture(path: str | Path) -> None:
    """Refuses a picture that ``plot_det`` cannot draw.

    Arguments
    ---------
    path : str or Path
        File to write.

    Raises
    ------
    ImportError
        If matplotlib is not installed; the message names the command.
    ValueError
        If the suffix is of no format.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "A DET curve needs matplotlib: pip install 'sb_memeff[plot]'."
        ) from error
    if Path(path).suffix.lower() not in FORMATS:
        raise ValueError(
            f"det_curve must end in {', '.join(FORMATS)}, got {path}."
        )


def plot_det(
    stages: Mapping[str, torch.Tensor], labels: torch.Tensor, path: str | Path
) -> None:
    """Draws miss over false alarm rates on normal deviate axes.

    Arguments
    ---------
    stages : dict
        Maps the name of each curve to the scores of all trials.
    labels : torch.Tensor
        1 for one speaker, 0 for two.
    path : str or Path
        File to write; its suffix determines the format.

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    ValueError
        If the suffix is of no format.
    """
    check_picture(path)
    # Without pyplot, which would need a display or a switch of backends.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.subplots()
    for name, scores in stages.items():
        errors = DetectionErrors.of(scores[labels == 1], scores[labels == 0])
        rates = torch.stack([errors.false_alarm_rates, errors.miss_rates])
        # Within the axes' limits: the deviate of 0 and of 1 is infinite.
        rates = rates.clamp(TICKS[0] / 200, 1 - 1e-4)
        # One point for each pixel or so is enough: a curve has as many points
        # as trials.
        deviates = torch.special.ndtri(rates)
        kept = (deviates * 200).round().diff(prepend=torch.full((2, 1), 1e9))
        deviates = deviates[:, kept.any(0)]
        axes.plot(*deviates.numpy(), label=f"{name} ({errors.eer():.2%})")
    ticks = torch.special.ndtri(torch.tensor(TICKS) / 100).tolist()
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(ticks, labels=[f"{tick:g}" for tick in TICKS])
    axes.set_xlim(ticks[0], ticks[-1])
    axes.set_ylim(ticks[0], ticks[-1])
    axes.set_xlabel("false alarms, %")
    axes.set_ylabel("misses, %")
    axes.grid(alpha=0.3)
    axes.legend(title="EER")
    figure.savefig(path)
