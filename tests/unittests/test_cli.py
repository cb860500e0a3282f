"""The command sb-memeff."""

import subprocess
import sys

import pytest

from sb_memeff.cli import main


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
