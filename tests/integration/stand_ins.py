"""Stand-ins of SpeechBrain's recipes, with the README's diffs, trained for two steps.

Authors
 * The sb_memeff authors 2026
"""

import runpy
import shutil
import subprocess

import torch
from hyperpyyaml import load_hyperpyyaml
from speechbrain.dataio.batch import PaddedBatch

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
        item = {
            "id": str(label),
            "sig": torch.randn(samples, generator=generator),
        }
        if speakers:
            item["spk_id_encoded"] = torch.tensor([label])
        else:
            tokens = torch.tensor([3, 1, 4][: 3 - label % 2])
            item["tokens"] = tokens
            item["tokens_eos"] = torch.cat([tokens, torch.tensor([0])])
            item["tokens_bos"] = torch.cat([torch.tensor([0]), tokens])
        found.append(item)
    return found


def two_steps(path, folder, epochs=1, changes=None):
    """Trains two batches an epoch as a recipe's script does.

    Arguments
    ---------
    path : pathlib.Path
        The yaml file of a stand-in or of our recipe.
    folder : pathlib.Path
        The output folder; a run there is resumed.
    epochs : int
        Up to this epoch.
    changes : dict, optional
        Further overrides of the yaml file.

    Returns
    -------
    Brain
        After training, with a checkpoint saved.
    """
    changes = {
        "output_folder": str(folder),
        "number_of_epochs": epochs,
        **(changes or {}),
    }
    with open(path, encoding="utf-8") as f:
        hparams = load_hyperpyyaml(f, changes)
    for name in ("wav_augment", "fea_augment"):
        hparams.pop(name, None)
    # SpeechBrain does not restore the random states.
    for module in hparams["modules"].values():
        for part in module.modules():
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.0
    speakers = path.name == "train_resnet.yaml"
    script = "train_speaker_embeddings.py" if speakers else "train.py"
    found = runpy.run_path(str(path.parents[1] / script))
    brain = found["SpeakerBrain" if speakers else "ASR"](
        hparams["modules"],
        hparams["opt_class"],
        hparams,
        {"device": "cpu", "noprogressbar": True},
        hparams["checkpointer"],
    )
    data = utterances(speakers)
    options = {"batch_size": 2, "collate_fn": PaddedBatch}
    brain.fit(brain.hparams.epoch_counter, data, train_loader_kwargs=options)
    assert brain.optimizer_step == 2 * epochs
    brain.checkpointer.save_checkpoint()
    return brain


def weights(brain):
    """A copy of a transducer's weights."""
    state = brain.hparams.model.state_dict()
    return {name: value.clone() for name, value in state.items()}


def assert_same_weights(brain, other, before, atol=1e-6):
    """That two transducers have the same weights, which are not those before."""
    found, expected = weights(brain), weights(other)
    assert list(found) == list(expected)
    moved = 0.0
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=atol)
        moved = max(moved, float((value - before[name]).abs().max()))
    assert moved > 10 * atol
