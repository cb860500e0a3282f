"""Pictures of the memory of training steps."""

import builtins

import pytest

from sb_memeff.analysis.plot import (
    COLOURS,
    check_picture,
    load_pyplot,
    plot_kinds,
    plot_timelines,
)
from sb_memeff.analysis.profile import Profile
from sb_memeff.memory.step import StepMemory
from sb_memeff.memory.tracker import KINDS

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
def draw(tmp_path, monkeypatch):
    """Calls a function that draws, and returns its figure."""
    pyplot = load_pyplot()
    subplots = pyplot.subplots

    def draw(function, profiles):
        made, closed = [], []

        def remember(*args, **kwargs):
            result = subplots(*args, **kwargs)
            made.append(result[0])
            return result

        with monkeypatch.context() as patched:
            patched.setattr(pyplot, "subplots", remember)
            patched.setattr(pyplot, "close", closed.append)
            function(profiles, tmp_path / "picture.png")
        pyplot.close(made[0])
        # Not left to pyplot, which keeps figures for ever.
        assert closed == made
        return made[0]

    return draw


@pytest.fixture
def figure(draw):
    """The picture that ``plot_kinds`` has drawn of PROFILES."""
    return draw(plot_kinds, PROFILES)


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


# --- timelines ---------------------------------------------------------------


def timeline_of(label, **phases):
    """A step whose phases are given by their bytes of some kinds."""
    timeline = {}
    for phase, some in phases.items():
        count = len(next(iter(some.values())))
        timeline[phase] = {
            kind: [int(x * GB) for x in some.get(kind, [0] * count)]
            for kind in KINDS
        }
    peak = max(
        sum(sizes)
        for kinds in timeline.values()
        for sizes in zip(*kinds.values(), strict=True)
    )
    memory = StepMemory(0, 0, 0, peak, "", "", {}, timeline=timeline)
    return Profile(label, 64, 64, 2.0, None, "bf16", "SGD", memory)


# What is there for less than two pixels has no place in the legend.
MOUNTAIN = timeline_of(
    "stored",
    forward={"parameters": [1] * 4, "activations": [0, 4, 8, 11]},
    backward={
        "parameters": [1] * 3,
        "gradients": [0, 0.02, 0.04],
        "activations": [11, 4, 0],
        "temporaries": [0.8, 1, 0],
    },
    step={"parameters": [1], "gradients": [0.04]},
)
PLAIN = timeline_of(
    "reversible",
    forward={"parameters": [0.25] * 2, "temporaries": [0, 0.25]},
    backward={"parameters": [0.25] * 2, "recomputed": [0.25, 1]},
    step={"parameters": [0.25] * 2, "temporaries": [0, 0.1]},
)


def areas(axes):
    """Maps kinds to their ``get_data`` in a panel."""
    return {p.get_label(): p.get_data() for p in axes.patches}


def test_timelines_are_stacked_to_the_peak(draw):
    figure = draw(plot_timelines, [MOUNTAIN, PLAIN])
    for axes, found in zip(figure.axes, (MOUNTAIN, PLAIN), strict=True):
        drawn = areas(axes)
        assert list(drawn) == list(KINDS)
        below = 0
        for kind, (top, edges, baseline) in drawn.items():
            # One begins where another ends.
            assert list(baseline) == pytest.approx(list(below + 0 * top))
            sizes = [
                size
                for kinds in found.memory.timeline.values()
                for size in kinds[kind]
            ]
            assert list((top - baseline) * GB) == pytest.approx(sizes)
            assert (edges[0], edges[-1]) == (0, pytest.approx(1))
            assert all(edges[1:] > edges[:-1])
            below = top
        assert max(below) * GB == pytest.approx(found.memory.peak_bytes)


def test_timelines_share_their_axes(draw):
    left, right = draw(plot_timelines, [MOUNTAIN, PLAIN]).axes
    assert left.get_ylim() == right.get_ylim()
    assert left.get_ylim()[0] == 0 and left.get_ylim()[1] > 1.1 * 12
    assert left.get_xlim() == right.get_xlim() == (0, 1)
    assert left.get_ylabel() == "memory alive (GB)"
    # Phases are at the same places, however many points they have.
    assert list(left.get_xticks()) == list(right.get_xticks())
    for axes, points in ((left, [0, 4, 7, 8]), (right, [0, 2, 4, 6])):
        names = [text.get_text() for text in axes.get_xticklabels()]
        assert names == ["forward", "backward", "optimizer"]
        edges = areas(axes)["inputs"].edges
        starts = [edges[i] for i in points]
        for place, start, end in zip(
            axes.get_xticks(), starts, starts[1:], strict=False
        ):
            assert place == pytest.approx((start + end) / 2)
        lines = [line.get_xdata()[0] for line in axes.lines]
        assert lines == pytest.approx(starts[1:-1])


def test_peaks_of_timelines_are_labelled(draw):
    figure = draw(plot_timelines, [MOUNTAIN, PLAIN])
    assert [axes.get_title("left") for axes in figure.axes] == [
        "stored",
        "reversible",
    ]
    assert (
        figure.get_suptitle() == "One training step: batch 64 x 2 s, bf16, SGD"
    )
    for axes, label, place in zip(
        figure.axes, ("12.8 GB", "1.2 GB"), (4, 3), strict=True
    ):
        (text,) = axes.texts
        edges = areas(axes)["inputs"].edges
        assert text.get_text() == label
        assert edges[place] <= text.xy[0] <= edges[place + 1]
    # Alone it is read more precisely.
    (axes,) = draw(plot_timelines, [PLAIN]).axes
    assert axes.texts[0].get_text() == "1.25 GB"


@pytest.mark.parametrize("sizes", [[0.75] + [0.5] * 9, [0.5] * 9 + [0.75]])
def test_a_peak_at_the_border_is_labelled_inside(sizes, draw):
    flat = {"inputs": [0.5]}
    first, last = ({"inputs": sizes}, flat)[:: 1 if sizes[0] > 0.5 else -1]
    # Without an optimizer.
    found = timeline_of("small", forward=first, backward=last)
    (axes,) = draw(plot_timelines, [found]).axes
    (text,) = axes.texts
    assert text.get_text() == "750 MB"
    assert 0.1 < text.xy[0] < 0.9
    names = [text.get_text() for text in axes.get_xticklabels()]
    assert names == ["forward", "backward"]
    assert areas(axes)["inputs"].edges[-1] == pytest.approx(1)


def test_colours_of_timelines(draw):
    figure = draw(plot_timelines, [MOUNTAIN, PLAIN])
    to_hex = load_pyplot().matplotlib.colors.to_hex
    for axes in figure.axes:
        for area in axes.patches:
            colour = to_hex(area.get_facecolor())
            assert colour == COLOURS[area.get_label()]
    (legend,) = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["parameters", "activations", "recomputed", "temporaries"]
    assert [to_hex(x.get_facecolor()) for x in legend.get_patches()] == [
        COLOURS[name] for name in names
    ]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_panel_for_each_timeline(count, draw):
    panels = draw(plot_timelines, [PLAIN] * count).axes
    used = [axes for axes in panels if axes.axison]
    assert len(used) == count
    assert all(axes.get_title("left") for axes in used)
    # Under the last one of each column.
    named = [i for i, axes in enumerate(used) if axes.get_xlabel()]
    assert named == {1: [0], 2: [0, 1], 5: [3, 4]}[count]


# --- files -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suffix", "start"),
    [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("SVG", b"<?xml")],
)
def test_the_suffix_is_the_format(suffix, start, tmp_path):
    for function, profiles in (
        (plot_kinds, PROFILES[:1]),
        (plot_timelines, [PLAIN]),
    ):
        path = tmp_path / f"{function.__name__}.{suffix}"
        check_picture(path)
        function(profiles, str(path))
        assert path.read_bytes().startswith(start)
        path.unlink()
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["kinds", "kinds.xyz", "kinds.", "a.b/kinds"])
def test_no_format(name):
    with pytest.raises(
        ValueError,
        match=f"suffix of {name} is not of a supported picture format",
    ):
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
        lambda: plot_timelines([PLAIN], "a.png"),
    ):
        with pytest.raises(ImportError) as caught:
            draw()
        assert str(caught.value) == (
            "Pictures need matplotlib: pip install 'sb_memeff[plot]'."
        )
