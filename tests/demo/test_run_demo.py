"""The demo as a whole, its parts replaced.

Authors
 * The sb_memeff authors 2026
"""

import json
import signal
import sys

import pytest

pytest.importorskip("espeakng_loader", reason="pip install sb_memeff[demo]")
pytest.importorskip("scipy")

import run_demo
from recipe_runner import DemoError


@pytest.fixture
def demo(tmp_path, monkeypatch):
    """Runs the demo with parts that do nothing; returns its exit status."""

    class Part:
        STEPS = 2
        NEXT = "go on"

        def __init__(self, name):
            self.name = name

        def run(self, data, results, epochs, heading):
            heading(f"making {self.name}")
            heading(f"training {self.name}")
            if epochs == 0:
                raise DemoError(f"{self.name} failed")
            return {"epochs": epochs}

        def check(self, summary):
            if self.name == "transducer" and summary["epochs"] < 3:
                raise DemoError("too few epochs")

    parts = {name: Part(name) for name in run_demo.PARTS}
    monkeypatch.setattr(run_demo, "PARTS", parts)
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def run(*flags):
        folders = f"--data={tmp_path / 'data'}", f"--results={tmp_path}"
        return run_demo.main([*folders, *flags])

    return run


def test_both_parts_count_on(demo, tmp_path, capsys):
    assert demo("--epochs=5") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("==")] == [
        "== 1/4 making speakers",
        "== 2/4 training speakers",
        "== 3/4 making transducer",
        "== 4/4 training transducer",
    ]
    for name in ("speakers", "transducer"):
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        assert summary == {"epochs": 5}


def test_one_part_alone(demo, tmp_path, capsys):
    assert demo("--parts", "transducer") == 0
    out = capsys.readouterr().out
    assert "== 1/2 making transducer" in out and "speakers" not in out
    assert (tmp_path / "transducer" / "summary.json").exists()
    assert not (tmp_path / "speakers").exists()


def test_learning_too_little_fails_in_one_line_after_everything(demo, capsys):
    assert demo("--epochs=2") == 1
    out, err = capsys.readouterr()
    assert "Results:" in out and err == "demo: too few epochs\n"


def test_a_failing_part_ends_the_demo(demo, capsys):
    assert demo("--epochs=0") == 1
    out, err = capsys.readouterr()
    assert "transducer" not in out and err == "demo: speakers failed\n"


def test_a_missing_library_is_said_in_one_sentence(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    folders = f"--data={tmp_path / 'data'}", f"--results={tmp_path / 'results'}"
    for part in run_demo.PARTS:
        assert run_demo.main([*folders, "--parts", part]) == 1
        message = capsys.readouterr().err
        assert message.count("\n") == 1
        assert message.startswith("demo: ")
        assert "pip install 'sb_memeff[demo]'" in message
    assert not (tmp_path / "data").exists()
