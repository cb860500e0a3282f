"""The README's diffs of SpeechBrain's recipes, applied to stand-ins of these.

Authors
 * The sb_memeff authors 2026
"""

import runpy
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hyperpyyaml import load_hyperpyyaml
from speechbrain.dataio.batch import PaddedBatch

from sb_memeff.core import MemEffBrain
from sb_memeff.lobes.models.RevResNet import RevResNet
from sb_memeff.nnet.recompute import store_blocks
from sb_memeff.nnet.transducer import TransducerJointLoss
from sb_memeff.ops.blocks_8bit import Quantized8bit
from sb_memeff.utils.checkpoints import AtomicCheckpointer
from tests.integration.runs import ROOT

UPSTREAM = ROOT / "tests/data/upstream"
RESNET = "VoxCeleb/SpeakerRec/hparams/train_resnet.yaml"
CONFORMER = "LibriSpeech/ASR/transducer/hparams/conformer_transducer.yaml"


def readmes_diffs():
    """The diffs by the bold words before them."""
    text = (ROOT / "README.md").read_text()
    section = text.split("\n## Keep your recipe\n")[1].split("\n## ")[0]
    return {
        part.split("**")[0]: part.split("```diff\n")[1].split("```")[0]
        for part in section.split("\n**")[1:]
    }


DIFFS = readmes_diffs()


def recipes_with(tmp_path, *names):
    """A copy of the stand-ins, with some of the diffs applied."""
    place = tmp_path / "-".join(("recipes", *names)).replace(" ", "_")
    shutil.copytree(UPSTREAM, place)
    for name in names:
        subprocess.run(
            ["git", "apply", "-"],
            input=DIFFS[name],
            cwd=place,
            text=True,
            check=True,
        )
    return place / "recipes"


def utterances(speakers):
    """Four utterances: two batches."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for samples, label in ((3200, 0), (2400, 1), (4800, 2), (4000, 3)):
        item = {"sig": torch.randn(samples, generator=generator)}
        if speakers:
            item["spk_id_encoded"] = torch.tensor([label])
        else:
            tokens = torch.tensor([3, 1, 4][: 3 - label % 2])
            item["tokens"] = tokens
            item["tokens_bos"] = torch.cat([torch.tensor([0]), tokens])
        found.append(item)
    return found


def two_steps(recipes, hparams, folder, epochs=1):
    """Trains as the script does; gives the Brain."""
    path = recipes / hparams
    overrides = {"output_folder": str(folder), "number_of_epochs": epochs}
    with open(path, encoding="utf-8") as f:
        loaded = load_hyperpyyaml(f, overrides)
    speakers = hparams == RESNET
    script = "train_speaker_embeddings.py" if speakers else "train.py"
    found = runpy.run_path(str(path.parents[1] / script))
    brain = found["SpeakerBrain" if speakers else "ASR"](
        loaded["modules"],
        loaded["opt_class"],
        loaded,
        {"device": "cpu", "noprogressbar": True},
        loaded["checkpointer"],
    )
    data = utterances(speakers)
    options = {"batch_size": 2, "collate_fn": PaddedBatch}
    epochs = brain.hparams.epoch_counter
    brain.fit(epochs, data, data[:2], False, options, options)
    assert brain.optimizer_step == 2 * epochs.limit
    brain.checkpointer.save_checkpoint()
    return brain


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
    brain = two_steps(recipes, RESNET, tmp_path / "run")
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
    brain = two_steps(recipes, RESNET, tmp_path)
    states = [state["exp_avg"] for state in brain.optimizer.state.values()]
    assert any(isinstance(state, Quantized8bit) for state in states)


def test_brain(tmp_path):
    recipes = recipes_with(tmp_path, "MemEffBrain")
    brain = two_steps(recipes, RESNET, tmp_path)
    assert isinstance(brain, MemEffBrain)
    assert isinstance(brain.checkpointer, AtomicCheckpointer)
    checkpoint = brain.checkpointer.find_checkpoint().path
    assert (Path(checkpoint) / "random_state.ckpt").exists()


def weights(brain):
    return brain.hparams.model.state_dict()


@pytest.fixture(scope="module")
def logits_run(tmp_path_factory):
    """SpeechBrain's transducer, with the loss on logits that needs no GPU."""
    folder = tmp_path_factory.mktemp("logits")
    recipes = recipes_with(folder, "Transducer loss on logits")
    brain = two_steps(recipes, CONFORMER, folder / "run")
    return (
        recipes,
        folder / "run",
        {name: value.clone() for name, value in weights(brain).items()},
    )


def test_recomputation(tmp_path, logits_run):
    names = "Transducer loss on logits", "Recomputation"
    brain = two_steps(recipes_with(tmp_path, *names), CONFORMER, tmp_path)
    layers = [f"transformer.encoder.layers.{n}" for n in range(2)]
    assert store_blocks(brain.modules.enc) == layers
    for name, value in weights(brain).items():
        assert torch.equal(value, logits_run[2][name]), name


def test_joint_loss_resumes_the_run_of_logits(tmp_path, logits_run):
    recipes, folder, _ = logits_run
    shutil.copytree(folder, tmp_path / "ours")
    shutil.copytree(folder, tmp_path / "theirs")
    theirs = two_steps(recipes, CONFORMER, tmp_path / "theirs", 2)
    recipes = recipes_with(tmp_path, "TransducerJointLoss")
    ours = two_steps(recipes, CONFORMER, tmp_path / "ours", 2)
    assert isinstance(ours.modules.transducer_loss, TransducerJointLoss)
    found, expected = weights(ours), weights(theirs)
    assert list(found) == list(expected)
    moved = 0.0
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
        moved += float((value - logits_run[2][name]).abs().max())
    assert moved > 0.01


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
        two_steps(recipes, CONFORMER, tmp_path / "run", 2)
