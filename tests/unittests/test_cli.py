"""The command sb-memeff."""

import json
import subprocess
import sys
from contextlib import nullcontext

import pytest

from sb_memeff.analysis import plot
from sb_memeff.cli import main, parse_overrides
from sb_memeff.memory.tracker import KINDS
from sb_memeff.memory.units import format_bytes
from sb_memeff.nnet.replay import recorder
from tests.unittests.analysis.shallow import shallow  # noqa: F401
from tests.unittests.analysis.yaml_files import (
    LIBRISPEECH,
    SMALL_TRANSDUCER,
    UPSTREAM_SPEAKERS,
    VOXCELEB,
    speaker_yaml,
)
from tests.unittests.one_analysis import one_analysis  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_analysis")


def test_presets_lists_every_network(capsys):
    assert main(["presets"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 15 + 24
    assert lines[0].split() == ["ResNet34", "6.63", "M", "parameters"]
    expected = ["RevNet293", "invertible", "28.91", "M", "parameters"]
    assert lines[14].split() == expected
    expected = ["GeminiDFRevNet237", "invertible", "11.48", "M", "parameters"]
    assert lines[-1].split() == expected


def test_bad_input_is_one_line_and_exit_code_2(tmp_path, capsys):
    nowhere = str(tmp_path / "nowhere")
    assert main(["export", nowhere, str(tmp_path / "model")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("sb-memeff: ") and nowhere in error
    assert error.count("\n") == 1
    assert not (tmp_path / "model").exists()


def test_without_a_command_it_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


def test_python_m_is_the_same_command():
    run = subprocess.run(
        [sys.executable, "-m", "sb_memeff.cli", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "presets" in run.stdout and "export" in run.stdout


# --- check -------------------------------------------------------------------

SMALL_REVNET = [
    str(speaker_yaml("revnet")[0]),
    "--base_channels=2",
    "--out_n_neurons=11",
    "--seconds=0.5",
]


@pytest.mark.usefixtures("shallow")
def test_check_passes(capsys):
    assert main(["check", *SMALL_REVNET, "--precision", "bf16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("train_revnet.yaml: 2 x 0.5 s, bf16, cpu; ")
    assert all(line.endswith(": ok") for line in lines[1:-1])
    assert lines[-1] == "passed"


@pytest.mark.usefixtures("shallow")
def test_check_fails(monkeypatch, capsys):
    # Batch norms count twice.
    monkeypatch.setattr(recorder, "without_trace", lambda *_: nullcontext())
    assert main(["check", *SMALL_REVNET]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "FAILED: embedding_model.trunk.blocks." in lines[-2]
    assert lines[-1] == "failed"


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["nowhere.yaml"], "no yaml file nowhere.yaml"),
        ([*SMALL_REVNET, "--precision=fp8"], "fp8"),
        ([*SMALL_REVNET, "--preset=RevNet35"], "RevNet35"),
        ([*SMALL_REVNET, "--base_chanels=2"], "did you mean base_channels"),
        ([*SMALL_REVNET, "--preset"], "write --key=value"),
        ([*SMALL_REVNET, "preset=RevNet101"], "write --key=value"),
        ([*SMALL_REVNET, "--=1"], "write --key=value"),
    ],
)
def test_check_of_bad_input(arguments, words, capsys):
    assert main(["check", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("sb-memeff: ") and words in captured.err
    assert captured.err.count("\n") == 1
    assert not captured.out


def test_overrides_are_for_yaml_files_only(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["presets", "--lr=1"])
    assert stop.value.code == 2
    assert "unrecognized arguments: --lr=1" in capsys.readouterr().err


def test_overrides():
    overrides = parse_overrides(
        ["--a=1", "--b=", "--c=x=--y", "--a=2", "--d", "5"]
    )
    assert overrides == {"a": "2", "b": "", "c": "x=--y", "d": "5"}


# --- profile -----------------------------------------------------------------

SMALL_RESNET = [
    str(speaker_yaml("resnet")[0]),
    *(f"--{key}={value}" for key, value in speaker_yaml("resnet")[1].items()),
]
SHORT = [*SMALL_RESNET, "--batch=2", "--seconds=0.5"]
DIGITS = [
    str(LIBRISPEECH / "hparams/digits_transducer.yaml"),
    *(f"--{key}={value}" for key, value in SMALL_TRANSDUCER.items()),
    "--num_encoder_layers=1",
]


@pytest.mark.usefixtures("shallow")
def test_profile(tmp_path, capsys):
    json_file, picture = tmp_path / "found.json", tmp_path / "found.png"
    timeline = tmp_path / "timeline.svg"
    files = ["--json", str(json_file), "--plot", str(picture)]
    files += ["--timeline", str(timeline)]
    assert main(["profile", *SHORT, "--precision", "bf16", *files]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[0].startswith("ResNet34: batch 2 x 0.5 s, bf16, SGD, ")
    assert lines[1].startswith("peak of a training step: ")
    assert not captured.err
    (found,) = json.loads(json_file.read_text())
    memory = found.pop("memory")
    assert found == {
        "label": "ResNet34",
        "batch": 2,
        "rows": 2,
        "seconds": 0.5,
        "tokens": None,
        "precision": "bf16",
        "optimizer": "SGD",
        "measured_bytes": None,
    }
    peak = memory["peak_bytes"]
    assert format_bytes(peak) in lines[1]
    assert list(memory["by_kind"]) == list(KINDS)
    assert sum(memory["by_kind"].values()) == peak
    assert sum(memory["by_module"].values()) == peak
    assert memory["parameter_bytes"] == 4 * memory["parameters"]
    assert "timeline" not in memory
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert timeline.read_bytes().startswith(b"<?xml")


@pytest.mark.usefixtures("shallow")
def test_profile_compares(tmp_path, monkeypatch, capsys):
    path = tmp_path / "found.json"
    arguments = [*SHORT, "--compare", "--json", str(path)]
    drawn = []
    monkeypatch.setattr(plot, "plot_timelines", lambda *x: drawn.append(x))
    timeline = str(tmp_path / "timeline.png")
    assert main(["profile", *arguments, "--timeline", timeline]) == 0
    captured = capsys.readouterr()
    labels = [
        "ResNet34",
        "ResNet34, blocks recomputed",
        "RevNet34 Type I",
        "RevNet34 Type II",
    ]
    rows = captured.out.splitlines()[-4:]
    assert [row.split("  ")[0] for row in rows] == labels
    assert captured.err.splitlines() == [f"{label} ..." for label in labels]
    found = json.loads(path.read_text())
    assert [one["label"] for one in found] == labels
    for row, one in zip(rows, found, strict=True):
        assert format_bytes(one["memory"]["peak_bytes"]) in row
    ((panels, file),) = drawn
    assert [one.label for one in panels] == labels and file == timeline


def test_profile_reports_that_there_is_no_alternative(tmp_path, capsys):
    text = UPSTREAM_SPEAKERS["xvector"]
    start = text.index("embedding_model: !new:")
    path = tmp_path / "train.yaml"
    path.write_text(
        f"{text[:start]}"
        "embedding_model: !new:speechbrain.nnet.containers.Sequential\n"
        "    input_shape: [null, null, 16]\n"
        "    pool: !new:speechbrain.nnet.pooling.StatisticsPooling\n"
        "    linear: !new:speechbrain.nnet.linear.Linear\n"
        "        input_size: 32\n        n_neurons: 8\n\n"
        f"{text[text.index('classifier: !new:') :]}"
    )
    arguments = [str(path), "--batch=2", "--seconds=0.5", "--compare"]
    assert main(["profile", *arguments]) == 0
    captured = capsys.readouterr()
    assert "there is no alternative to SpeechBrain's Seq" in captured.err
    assert captured.out.splitlines()[-1].startswith("SpeechBrain's Sequential")


def test_profile_of_a_transducer(tmp_path, capsys):
    picture = tmp_path / "timeline.png"
    arguments = [*DIGITS, "--batch=2", "--seconds=1"]
    assert main(["profile", *arguments, f"--timeline={picture}"]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.startswith(
        "tiled: batch 2 x 1 s with 5 tokens, fp32, AdamW, "
    )


# --- fit ---------------------------------------------------------------------


@pytest.mark.usefixtures("shallow")
def test_fit_prints_overrides_for_the_recipe(capsys):
    budget = ["--budget=20MB", "--margin=2MB", "--seconds=0.5"]
    assert main(["fit", *SMALL_RESNET, *budget]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[0] == "20MB less the margin: 18.0 MB"
    batch, seconds = lines[2].split()
    assert batch.startswith("--batch_size=") and batch > "--batch_size=1"
    assert seconds == "--sentence_len=0.5"
    size = lines[1].rpartition(": ")[2]
    count = batch.partition("=")[2]
    assert lines[1] == f"ResNet34, batch {count} x 0.5 s: {size}"
    # What was tried on the way is no part of the answer.
    assert lines[1] in captured.err.splitlines()
    # They mean to profile, and to the recipe, what was meant here.
    assert main(["profile", *SMALL_RESNET, batch, seconds]) == 0
    out = capsys.readouterr().out
    assert f"batch {count} x 0.5 s" in out and f": {size}, in " in out


@pytest.mark.usefixtures("shallow")
def test_fit_names_the_smallest_step_if_it_does_not_fit(capsys):
    arguments = [*SMALL_RESNET, "--seconds=0.5", "--budget=20MB"]
    assert main(["fit", *arguments, "--margin=19999kB"]) == 2
    captured = capsys.readouterr()
    *tried, error = captured.err.splitlines()
    assert [line.split(":")[0] for line in tried] == [
        "ResNet34, batch 4 x 0.5 s",
        "ResNet34, batch 2 x 0.5 s",
    ]
    assert error.startswith("sb-memeff: ")
    assert "ResNet34 does not fit into 1.00 kB: a batch of 2 x 0.5 s" in error
    assert not captured.out


def test_fit_names_the_batches_that_do_not_fit(tmp_path, capsys):
    path = tmp_path / "cuts.jsonl"
    path.write_text(
        "".join(
            f'{{"id": "u{i}", "duration": {1 + i / 2}}}\n' for i in range(6)
        )
    )
    arguments = [*DIGITS, "--dynamic_batching=False", "--batch_size=2"]
    arguments += [f"--durations={path}", "--margin=1MB"]
    assert main(["fit", *arguments, "--budget=2MB"]) == 0
    captured = capsys.readouterr()
    head, titles, *rows = captured.out.splitlines()
    assert head == (
        "Too large for 1.00 MB: 3 of 3 batches, with utterances of 1.5 s or "
        "more. The largest:"
    )
    assert [row.split()[:2] for row in rows] == [
        ["2", "3.5"],
        ["2", "2.5"],
        ["2", "1.5"],
    ]
    assert [row.split()[-1] for row in rows] == ["u5", "u3", "u1"]
    lines = captured.err.splitlines()
    assert lines[0].startswith("tiled, batch 2 x 3.5 s with 18 tokens: ")
    size = lines[0].rpartition(": ")[2]
    assert size in rows[0] and len(lines) == 3


@pytest.mark.parametrize("option", ["--batch=2", "--seconds=1"])
def test_durations_are_of_the_recipes_batches(option, capfd):
    arguments = [*DIGITS, "--budget=1GB", "--durations=none.csv"]
    refuse(["fit", *arguments, option], "override its keys instead of", capfd)
    refuse(["fit", *arguments], "no file none.csv of durations", capfd)


# --- bad input of both -------------------------------------------------------


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Bad files in the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "empty.yaml").touch()
    (tmp_path / "broken.yaml").write_text("a: [1, 2\nb: }\n")
    (tmp_path / "binary.yaml").write_bytes(b"\x89PNG\xff\xfe")
    text = UPSTREAM_SPEAKERS["ecapa"]
    start = text.index("embedding_model: !new:")
    head = "embedding_model: !new:speechbrain.lobes.models.ECAPA_TDNN."
    (tmp_path / "positional.yaml").write_text(
        f"{text[:start]}{head}ECAPA_TDNN [!ref <n_mels>]\n"
    )
    (tmp_path / "preset.yaml").write_text(f"{text}\npreset: hello\n")
    return tmp_path


def refuse(arguments, words, capfd):
    assert main(arguments) == 2
    captured = capfd.readouterr()
    assert captured.err.startswith("sb-memeff: ") and words in captured.err
    assert captured.err.count("\n") == 1
    assert not captured.out


BAD = [
    (["nowhere.yaml"], "no yaml file nowhere.yaml"),
    (["folder.yaml"], "no yaml file folder.yaml"),
    (["empty.yaml"], "empty.yaml is not a yaml file of keys and values"),
    (["broken.yaml"], "broken.yaml is not readable yaml: line 2: "),
    (["binary.yaml"], "binary.yaml is not readable yaml: "),
    (["positional.yaml"], "cannot be analysed: "),
    (
        [str(VOXCELEB / "hparams/verification_revnet.yaml")],
        "has no modules: it is not a yaml file for training",
    ),
    ([*SMALL_RESNET, "--preset=ResNet35"], "ResNet has no preset 'ResNet3"),
    ([*SMALL_RESNET, "--preset=5"], "ResNet has no preset 5; it has "),
    ([*SMALL_RESNET, "--base_chanels=2"], "did you mean base_channels"),
    ([*SMALL_RESNET, "--n_mels=0"], "train_resnet.yaml: "),
    ([*SMALL_RESNET, "--lr=fast"], "train_resnet.yaml: "),
    ([*SMALL_RESNET, "--precision=FP32"], "must be fp32, bf16 or fp16"),
    ([*SMALL_RESNET, "--precision="], "must be fp32, bf16 or fp16"),
    ([*SMALL_RESNET, "--tokens=5"], "so tokens=5 does not apply"),
    ([*SMALL_RESNET, "--batch=1"], "batch norm cannot train on one utter"),
    ([*SMALL_RESNET, "--batch=-1"], "batch=-1 must be positive"),
    ([*SMALL_RESNET, "--seconds=0"], "seconds=0.0 must be positive"),
    ([*SMALL_RESNET, "--seconds=-2"], "seconds=-2.0 must be positive"),
    ([*SMALL_RESNET, "--seconds=nan"], "seconds=nan must be positive"),
    ([*SMALL_RESNET, "--seconds=inf"], "seconds=inf must be positive"),
    ([*SMALL_RESNET, "--seconds=1e15"], "samples: use at least 1"),
    ([*SMALL_RESNET, "--seconds=1e-9"], "samples: use at least 1"),
    ([*DIGITS, "--seconds=0"], "seconds=0.0 must be positive"),
    ([*DIGITS, "--seconds=0.001"], "x 0.001 s cannot be analysed: "),
    ([*DIGITS, "--tokens=0"], "tokens=0 must be positive"),
]
# Arguments for which fit fails in profile's code, after an analysis.
ALIKE = ("positional.yaml", "--lr=fast", "--seconds=1e15")


@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize(
    ("command", "arguments", "words"),
    [
        *(("profile", *bad) for bad in BAD),
        *(("fit", *bad) for bad in BAD if bad[0][-1] not in ALIKE),
    ],
)
def test_bad_input(command, arguments, words, here, capfd):
    if command == "fit":
        arguments = [*arguments, "--budget=11GB"]
    refuse([command, *arguments], words, capfd)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--json=nowhere/a.json"], "no folder for "),
        (["--plot=nowhere/a.png"], "no folder for "),
        (["--json=folder.yaml"], "folder.yaml is a folder: name a file"),
        (["--plot=folder.png"], "folder.png is a folder: name a file"),
        (["--json="], "is a folder: name a file"),
        (
            ["--plot=a.xyz"],
            "The suffix of a.xyz is not of a supported picture format",
        ),
        (["--plot=a"], "The suffix of a is not of a supported picture format"),
        (["--timeline=nowhere/a.png"], "no folder for "),
        (["--timeline=folder.png"], "folder.png is a folder: name a file"),
        (
            ["--timeline=a.xyz"],
            "The suffix of a.xyz is not of a supported picture format",
        ),
    ],
)
def test_invalid_files_raise_before_the_analysis(
    arguments, words, here, monkeypatch, capfd
):
    before = sorted(here.iterdir())
    monkeypatch.setattr("sb_memeff.cli.analyse", None)
    refuse(["profile", *SHORT, *arguments], words, capfd)
    assert sorted(here.iterdir()) == before


def test_no_permission(here, monkeypatch, capfd):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    refuse(["profile", *SHORT, "--json=a"], "No permission to write", capfd)


@pytest.mark.usefixtures("shallow")
def test_a_file_that_cannot_be_written_after_all(here, monkeypatch, capfd):
    monkeypatch.setattr("sb_memeff.cli._check_writable", lambda path: None)
    assert main(["profile", *SHORT, "--json=folder.yaml"]) == 2
    assert capfd.readouterr().err.startswith("sb-memeff: [Errno 21] ")


def test_without_matplotlib(here, monkeypatch, capfd):
    # What an import finds then.
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for option in ("--plot=a.png", "--timeline=a.png"):
        arguments = ["profile", *SHORT, option]
        refuse(arguments, "pip install 'sb_memeff[plot]'", capfd)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--budget=much"], "not 'much'"),
        (["--budget=11"], "not '11'"),
        (["--budget=400MB"], "400 MB leaves nothing besides 500 MB"),
        (["--budget=1GB", "--margin=2GB"], "besides a margin of 2.00 GB"),
        (["--budget=1GB", "--margin=some"], "not 'some'"),
        (["--budget=1GB", "--batch=2", "--preset=5"], "no preset 5; it has "),
    ],
)
def test_bad_budgets(arguments, words, capfd):
    refuse(["fit", *SMALL_RESNET, "--seconds=0.5", *arguments], words, capfd)


def test_fit_of_the_deepest_preset_without_one(here, capfd):
    both = ["--budget=1GB", "--batch=2", "--seconds=0.5"]
    for path in ("preset.yaml", "positional.yaml"):
        refuse(["fit", path, *both], f"{path} has no preset to choose", capfd)
