"""DET curves.

Authors
 * The sb_memeff authors 2026
"""

import sys

import pytest
import torch

from sb_memeff.verification.det import check_picture, plot_det


def test_curve(tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure")
    drawn = []
    savefig = figure.Figure.savefig
    monkeypatch.setattr(
        figure.Figure,
        "savefig",
        lambda self, path: (drawn.append(self), savefig(self, path)),
    )
    torch.manual_seed(0)
    labels = torch.arange(20000) % 2
    scores = torch.randn(20000) + 2 * labels
    plot_det({"cosine": scores, "far": 3 * labels}, labels, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 1000
    (axes,) = drawn[0].axes
    curve, apart = axes.lines
    x, y = (torch.tensor(line) for line in curve.get_data())
    # Of two normals at a distance of 2 the curve is a line.
    inside = (x.abs() < 1.5) & (y.abs() < 1.5)
    assert (x + y + 2)[inside].abs().max() < 0.1
    assert 50 < inside.sum() < len(x) < 3000
    assert curve.get_label().startswith("cosine (15.")
    assert apart.get_label() == "far (0.00%)"


def test_errors(monkeypatch):
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="must end in .png, .pdf, .svg"):
        check_picture("det.txt")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"sb_memeff\[plot\]"):
        check_picture("det.png")
