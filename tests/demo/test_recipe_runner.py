"""How the demo runs a recipe.

Authors
 * The sb_memeff authors 2026
"""

import pytest
from recipe_runner import DemoError, epoch_line, run_recipe

EPOCH = (
    "speechbrain.utils.train_logger - epoch: 3, lr: 1.40e-03, steps: 309, "
    "optimizer: AdamW - train loss: 16.35 - valid loss: 1.31e-01, "
    "valid CER: 45.70, valid WER: 1.00e+02"
)
SHOWN = {
    "train loss": "loss {:5.2f}".format,
    "valid WER": "WER {:5.1f} %".format,
}
# Output as SpeechBrain and tqdm write it: a bar of carriage returns, colours.
SCRIPT = f"""
import os, sys
print("threads:", os.environ.get("OMP_NUM_THREADS"))
print("arguments:", *sys.argv[1:])
print("\\r 50%|#####     |\\r100%|##########|", end="\\r", file=sys.stderr)
print("\\x1b[32m{EPOCH}\\x1b[0m", file=sys.stderr)
sys.exit("--fail=1" in sys.argv and "out of luck")
"""


@pytest.fixture
def script(tmp_path):
    """A recipe's script."""
    path = tmp_path / "recipe" / "train.py"
    path.parent.mkdir()
    path.write_text(SCRIPT)
    return path


def test_an_epochs_line_in_the_demos_words():
    assert epoch_line(EPOCH, SHOWN) == "epoch  3   loss 16.35   WER 100.0 %"
    shown = {"steps": "{:.0f} steps".format, "valid loss": "{:.3f}".format}
    assert epoch_line(EPOCH, shown) == "epoch  3   309 steps   0.131"
    other = "speechbrain.utils.epoch_loop - Going into epoch 3"
    assert epoch_line(other, SHOWN) == ""


def test_what_a_recipe_does_not_log_is_left_out():
    line = EPOCH.replace("valid WER", "valid EER")
    assert epoch_line(line, SHOWN) == "epoch  3   loss 16.35"


def test_epochs_on_the_screen_and_everything_in_the_log(
    script, tmp_path, capsys
):
    log = tmp_path / "logs" / "output.txt"
    run_recipe("Training", script, "a.yaml", {"lr": 0.1}, log, SHOWN)
    assert capsys.readouterr().out == "epoch  3   loss 16.35   WER 100.0 %\n"
    text = log.read_text()
    assert "arguments: a.yaml --lr=0.1\n" in text and f"{EPOCH}\n" in text
    assert "%|" not in text


def test_bars_on_a_terminal(script, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "41")
    run_recipe("Training", script, "a.yaml", {}, tmp_path / "log", SHOWN)
    first, *overwritten, last = capsys.readouterr().out.split("\r")
    assert first == last == ""
    assert {len(line.rstrip("\n")) for line in overwritten} == {40}
    assert [line.strip() for line in overwritten] == [
        "50%|#####     |",
        "100%|##########|",
        "epoch  3   loss 16.35   WER 100.0 %",
        "",
    ]


@pytest.mark.parametrize("users, threads", [(None, "1"), ("4", "4")])
def test_the_users_environment_wins(
    script, tmp_path, monkeypatch, users, threads
):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if users:
        monkeypatch.setenv("OMP_NUM_THREADS", users)
    log = tmp_path / "output.txt"
    environment = {"OMP_NUM_THREADS": "1"}
    run_recipe("Training", script, "a.yaml", {}, log, None, environment)
    assert f"threads: {threads}\n" in log.read_text()


def test_a_failure_is_named_after_its_last_lines(script, tmp_path, capsys):
    log = tmp_path / "output.txt"
    with pytest.raises(DemoError, match=f"Training failed.*{log}"):
        run_recipe("Training", script, "a.yaml", {"fail": 1}, log)
    out, err = capsys.readouterr()
    assert out == "" and err.endswith("out of luck\n")
