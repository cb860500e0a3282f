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
    run_recipe(script, "a.yaml", tmp_path / "out", {"lr": 0.1}, SHOWN)
    assert capsys.readouterr().out == "epoch  3   loss 16.35   WER 100.0 %\n"
    text = (tmp_path / "out_output.txt").read_text()
    arguments = f"a.yaml --output_folder={tmp_path / 'out'} --device=cpu"
    assert f"arguments: {arguments} --lr=0.1\n" in text
    assert f"{EPOCH}\n" in text
    assert "%|" not in text


def test_a_leftover_checkpoint_is_not_resumed(script, tmp_path):
    leftover = tmp_path / "out" / "save" / "CKPT"
    leftover.mkdir(parents=True)
    run_recipe(script, "a.yaml", tmp_path / "out", {})
    assert not leftover.exists()


def test_bars_on_a_terminal(script, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "11")
    run_recipe(script, "a.yaml", tmp_path / "out", {}, SHOWN)
    # Each line begins by wiping the one before.
    wipe = "\r\x1b[K"
    assert capsys.readouterr().out.split(wipe) == [
        "",
        "50%|##### ",
        "100%|#####",
        "epoch  3   loss 16.35   WER 100.0 %\n",
        "",
    ]


@pytest.mark.parametrize("users, threads", [(None, "1"), ("4", "4")])
def test_the_users_environment_wins(
    script, tmp_path, monkeypatch, users, threads
):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if users:
        monkeypatch.setenv("OMP_NUM_THREADS", users)
    environment = {"OMP_NUM_THREADS": "1"}
    run_recipe(script, "a.yaml", tmp_path / "out", {}, {}, environment)
    log = tmp_path / "out_output.txt"
    assert f"threads: {threads}\n" in log.read_text()


def test_a_failure_is_named_after_its_last_lines(script, tmp_path, capsys):
    log = tmp_path / "out_output.txt"
    with pytest.raises(DemoError, match=f"train.py failed.*{log}"):
        run_recipe(script, "a.yaml", tmp_path / "out", {"fail": 1})
    out, err = capsys.readouterr()
    assert out == "" and err.endswith("out of luck\n")
