"""The README's diffs of SpeechBrain's recipes, applied to stand-ins of these.

Authors
 * The sb_memeff authors 2026
"""

import shutil
from pathlib import Path

import pytest
import torch
from hyperpyyaml import load_hyperpyyaml

from sb_memeff.brain import MemEffBrain
from sb_memeff.lobes.models.RevResNet import RevResNet
from sb_memeff.nnet.recompute import store_blocks
from sb_memeff.nnet.transducer_loss import TransducerJointLoss
from sb_memeff.ops.blocks_8bit import Quantized8bit
from sb_memeff.utils.atomic_checkpoints import AtomicCheckpointer
from tests.integration.stand_ins import (
    CONFORMER,
    DIFFS,
    RESNET,
    assert_same_weights,
    recipes_with,
    two_steps,
    weights,
)


def test_readme_has_them():
    assert list(DIFFS) == [
        "VoxCeleb network",
        "8-bit optimizer",
        "Recomputation",
        "Transducer loss on logits",
        "TransducerJointLoss",
        "MemEffBrain",
    ]


def test_network(tmp_path):
    recipes = recipes_with(tmp_path, "VoxCeleb network")
    brain = two_steps(recipes / RESNET, tmp_path / "run")
    assert isinstance(brain.modules.embedding_model, RevResNet)
    path = recipes / RESNET.replace("train", "verification")
    checkpoint = brain.checkpointer.find_checkpoint().path
    with open(path, encoding="utf-8") as f:
        overrides = {
            "pretrain_path": str(checkpoint),
            "save_folder": str(tmp_path / "verification"),
        }
        verification = load_hyperpyyaml(f, overrides)
    verification["pretrainer"].collect_files()
    verification["pretrainer"].load_collected()
    trained = brain.modules.embedding_model.state_dict()
    loaded = verification["embedding_model"].state_dict()
    assert trained.keys() == loaded.keys()
    for name, value in trained.items():
        assert torch.equal(value, loaded[name])


def test_8bit_optimizer(tmp_path):
    recipes = recipes_with(tmp_path, "8-bit optimizer")
    brain = two_steps(recipes / RESNET, tmp_path)
    states = [state["exp_avg"] for state in brain.optimizer.state.values()]
    assert any(isinstance(state, Quantized8bit) for state in states)


def test_brain(tmp_path):
    recipes = recipes_with(tmp_path, "MemEffBrain")
    brain = two_steps(recipes / RESNET, tmp_path)
    assert isinstance(brain, MemEffBrain)
    assert isinstance(brain.checkpointer, AtomicCheckpointer)
    checkpoint = brain.checkpointer.find_checkpoint().path
    assert (Path(checkpoint) / "random_state.ckpt").exists()


@pytest.fixture(scope="module")
def logits_run(tmp_path_factory):
    """SpeechBrain's transducer, with the loss on logits that needs no GPU."""
    folder = tmp_path_factory.mktemp("logits")
    recipes = recipes_with(folder, "Transducer loss on logits")
    brain = two_steps(recipes / CONFORMER, folder / "run")
    return recipes, folder / "run", weights(brain)


def test_recomputation(tmp_path, logits_run):
    names = "Transducer loss on logits", "Recomputation"
    brain = two_steps(recipes_with(tmp_path, *names) / CONFORMER, tmp_path)
    layers = [f"transformer.encoder.layers.{n}" for n in range(2)]
    assert store_blocks(brain.modules.enc) == layers
    for name, value in weights(brain).items():
        assert torch.equal(value, logits_run[2][name]), name


def test_joint_loss_resumes_the_run_of_logits(tmp_path, logits_run):
    recipes, folder, before = logits_run
    shutil.copytree(folder, tmp_path / "ours")
    shutil.copytree(folder, tmp_path / "theirs")
    theirs = two_steps(recipes / CONFORMER, tmp_path / "theirs", 2)
    recipes = recipes_with(tmp_path, "TransducerJointLoss")
    ours = two_steps(recipes / CONFORMER, tmp_path / "ours", 2)
    assert isinstance(ours.modules.transducer_loss, TransducerJointLoss)
    assert_same_weights(ours, theirs, before)


def test_joint_loss_elsewhere_does_not_resume(tmp_path, logits_run):
    """Where README's diff puts it, the parameters keep their numbers."""
    recipes = recipes_with(tmp_path, "TransducerJointLoss")
    path = recipes / CONFORMER
    line = "   transducer_loss: !ref <transducer_loss>\n"
    text = path.read_text()
    last = "   proj_enc: !ref <proj_enc>\n"
    path.write_text(text.replace(line, "").replace(last, last + line))
    shutil.copytree(logits_run[1], tmp_path / "run")
    with pytest.raises(RuntimeError, match="must match the size"):
        two_steps(recipes / CONFORMER, tmp_path / "run", 2)
