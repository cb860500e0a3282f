"""The command sb-memeff."""

import subprocess
import sys
from contextlib import nullcontext

import pytest

from sb_memeff.cli import main, parse_overrides
from sb_memeff.nnet import replay
from tests.unittests.analysis.yaml_files import speaker_yaml


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


def test_without_a_command_it_says_what_there_is(capsys):
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


def test_check_passes(capsys):
    assert main(["check", *SMALL_REVNET, "--precision", "bf16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("train_revnet.yaml: 2 x 0.5 s, bf16, cpu; ")
    assert all(line.endswith(": ok") for line in lines[1:-1])
    assert lines[-1] == "passed"


def test_check_fails(monkeypatch, capsys):
    # Batch norms count twice.
    monkeypatch.setattr(replay, "without_trace", lambda *_: nullcontext())
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
