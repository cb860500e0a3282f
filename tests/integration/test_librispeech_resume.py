"""Runs of SpeechBrain's transducer recipe that ours resumes, and the reverse.

Authors
 * The sb_memeff authors 2026
"""

import shutil

import pytest

from tests.integration.runs import ROOT
from tests.integration.stand_ins import (
    CONFORMER,
    assert_same_weights,
    recipes_with,
    two_steps,
    weights,
)

OURS = ROOT / "recipes" / CONFORMER.replace("transducer/", "transducer_memeff/")
# The stand-in's settings.
SMALL = {
    "data_folder": "none",
    "precision": "fp32",
    "grad_accumulation_factor": 1,
    "streaming": False,
    "n_fft": 400,
    "win_length": 25,
    "warmup_steps": 5,
    "d_model": 16,
    "joint_dim": 12,
    "nhead": 2,
    "num_encoder_layers": 2,
    "d_ffn": 32,
    "transformer_dropout": 0.0,
    "dec_emb_dropout": 0.0,
    "dec_dropout": 0.0,
    "output_neurons": 7,
    "dec_dim": 8,
    "lm_model": {"embedding_dim": 4, "rnn_neurons": 4, "dnn_neurons": 4},
    "opt_class": {"eps": 1e-3},
}


def with_optimizer(path, optimizer):
    """The yaml file, changed to another optimizer."""
    text = path.read_text()
    assert "!name:torch.optim.AdamW\n" in text
    path.write_text(text.replace("torch.optim.AdamW\n", f"{optimizer}\n"))
    return path


@pytest.mark.parametrize(
    "loss", ["Transducer loss on logits", "TransducerJointLoss"]
)
@pytest.mark.parametrize(
    "optimizer", ["torch.optim.AdamW", "sb_memeff.optim.AdamW8bit"]
)
def test_either_recipe_resumes_the_other(tmp_path, optimizer, loss):
    # Rounding errors decide which of two 8-bit codes is the nearer: up to 6e-5 on
    # one processor, 1.7e-4 on another.
    atol = 2e-4 if "8bit" in optimizer else 1e-6
    theirs = with_optimizer(recipes_with(tmp_path, loss) / CONFORMER, optimizer)
    folder = tmp_path / "recipe"
    shutil.copytree(OURS.parents[1], folder)
    ours = with_optimizer(folder / "hparams" / OURS.name, optimizer)
    for name, first, second in (
        ("theirs", (theirs, None), (ours, SMALL)),
        ("ours", (ours, SMALL), (theirs, None)),
    ):
        run, resumed = tmp_path / name / "run", tmp_path / name / "resumed"
        path, changes = first
        before = weights(two_steps(path, run, 1, changes))
        shutil.copytree(run, resumed)
        straight = two_steps(path, run, 4, changes)
        path, changes = second
        other = two_steps(path, resumed, 4, changes)
        assert_same_weights(other, straight, before, atol)
