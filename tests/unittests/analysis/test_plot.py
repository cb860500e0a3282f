"""Pictures of where the memory goes."""

import builtins

import pytest

from sb_memeff.analysis.plot import (
    COLOURS,
    check_picture,
    load_pyplot,
    plot_kinds,
)
from sb_memeff.analysis.profile import Profile
from sb_memeff.memory.step import KINDS, StepMemory

GB = 10**9


def profile_of(label, **kinds):
    split = {("net", k.replace("_", " ")): int(v) for k, v in kinds.items()}
    # A kind is spread over modules.
    split["net.first", "activations"] = GB // 4
    peak = sum(split.values())
    memory = StepMemory(0, 0, 0, peak, "forward", "net", split)
    return Profile(label, 64, 64, 2.0, None, "bf16", "SGD", memory)


PROFILES = [
    profile_of("stored", parameters=GB, activations=11 * GB, inputs=GB // 2),
    profile_of("recomputed", parameters=GB, recomputed=3 * GB),
    profile_of("reversible", parameters=GB, optimizer_states=2 * GB),
]


@pytest.fixture
def figure(tmp_path, monkeypatch):
    """The picture that ``plot_kinds`` has drawn of PROFILES."""
    pyplot = load_pyplot()
    made, closed = [], []
    subplots = pyplot.subplots

    def remember(**kwargs):
        made.append(subplots(**kwargs)[0])
        return made[-1], made[-1].axes[0]

    monkeypatch.setattr(pyplot, "subplots", remember)
    monkeypatch.setattr(pyplot, "close", closed.append)
    plot_kinds(PROFILES, tmp_path / "kinds.png")
    monkeypatch.undo()
    pyplot.close(made[0])
    # Not left to pyplot, which keeps figures for ever.
    assert closed == made
    return made[0]


def bars(figure):
    """Kind to the bars of all profiles, from the top."""
    return {
        group.get_label(): list(group) for group in figure.axes[0].containers
    }


def test_bars_are_the_kinds_and_sum_to_the_peak(figure):
    drawn = bars(figure)
    assert list(drawn) == [
        "parameters",
        "optimizer states",
        "inputs",
        "activations",
        "recomputed",
    ]
    for row, found in enumerate(PROFILES):
        end = 0
        for kind, group in drawn.items():
            bar = group[row]
            # One begins where another ends.
            assert bar.get_x() == pytest.approx(end)
            end += bar.get_width()
            size = found.memory.by_kind[kind]
            assert bar.get_width() * GB == pytest.approx(size)
            assert bar.get_y() + bar.get_height() / 2 == pytest.approx(row)
        assert end * GB == pytest.approx(found.memory.peak_bytes)


def test_colours_are_one_for_each_kind(figure):
    assert list(COLOURS) == list(KINDS)
    assert len(set(COLOURS.values())) == len(KINDS)
    to_hex = load_pyplot().matplotlib.colors.to_hex
    for kind, group in bars(figure).items():
        assert {to_hex(bar.get_facecolor()) for bar in group} == {COLOURS[kind]}
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == list(
        bars(figure)
    )


def test_labels_and_units(figure):
    (axes,) = figure.axes
    names = [text.get_text() for text in axes.get_yticklabels()]
    assert names == ["stored", "recomputed", "reversible"]
    # The first is at the top.
    assert axes.yaxis_inverted()
    assert axes.get_xlabel() == "peak memory of a training step (GB)"
    assert axes.get_title("left") == "batch 64 x 2 s, bf16, SGD"
    totals = [text.get_text() for text in axes.texts]
    assert totals == ["12.8 GB", "4.25 GB", "3.25 GB"]
    # Each beside its bar, inside the picture.
    for row, text in enumerate(axes.texts):
        size = PROFILES[row].memory.peak_bytes / GB
        assert text.xy == (pytest.approx(size), row)
        assert axes.get_xlim()[1] > 1.1 * size


@pytest.mark.parametrize(
    ("suffix", "start"),
    [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("SVG", b"<?xml")],
)
def test_the_suffix_is_the_format(suffix, start, tmp_path):
    path = tmp_path / f"kinds.{suffix}"
    check_picture(path)
    plot_kinds(PROFILES[:1], str(path))
    assert path.read_bytes().startswith(start)
    assert [f.name for f in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("name", ["kinds", "kinds.xyz", "kinds.", "a.b/kinds"])
def test_no_format(name):
    with pytest.raises(ValueError, match=f"suffix of {name} says no format"):
        check_picture(name)


def test_without_matplotlib(monkeypatch):
    original = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "matplotlib":
            raise ImportError("No module named 'matplotlib'")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    for draw in (
        load_pyplot,
        lambda: check_picture("a.png"),
        lambda: plot_kinds(PROFILES, "a.png"),
    ):
        with pytest.raises(ImportError) as caught:
            draw()
        assert str(caught.value) == (
            "Pictures need matplotlib: pip install 'sb_memeff[plot]'."
        )
