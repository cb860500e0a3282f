"""The recipes' Brains, and batches for them.

Authors
 * The sb_memeff authors 2026
"""

import importlib.util
import sys

from hyperpyyaml import load_hyperpyyaml


def script(folder, name, monkeypatch):
    """A recipe's script as a module, though others may be called so too."""
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    spec = importlib.util.spec_from_file_location(
        f"{folder.name}_{name}", folder / f"{name}.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_brain(cls, path, overrides, place):
    """The recipe's Brain, in its first epoch."""
    data = {"data_folder": "none", "output_folder": str(place / "run")}
    with open(path, encoding="utf-8") as f:
        hparams = load_hyperpyyaml(f, {**overrides, **data})
    brain = cls(
        hparams["modules"],
        hparams["opt_class"],
        hparams,
        {"device": "cpu", "noprogressbar": True},
        hparams["checkpointer"],
    )
    hparams["epoch_counter"].current = 1
    brain.modules.train()
    return brain


class Batch:
    """The part of a PaddedBatch that Brains read: names with (data, lengths)."""

    def __init__(self, **items):
        self.__dict__.update(items)

    def to(self, device):
        return self


def transducer_batches(step, batch=2, seconds=1.0, tokens=4):
    """A batch for the step, and the same for the Brain."""
    arguments = step.batch(batch, seconds, tokens)
    wavs, lens, tokens_bos, tokens, token_lens, tokens_eos, eos_lens = arguments
    batch = Batch(
        sig=(wavs, lens),
        tokens_bos=(tokens_bos, eos_lens),
        tokens=(tokens, token_lens),
        tokens_eos=(tokens_eos, eos_lens),
    )
    return arguments, batch
