"""A recipe in two processes, and in one that gets the same batches.

Authors
 * The sb_memeff authors 2026
"""

import functools
import pickle

import speechbrain as sb

from sb_memeff.brain import MemEffBrain
from tests.unittests.two_processes import run_in_two_processes


def train_in_two_processes(main, arguments, folder):
    """Trains as torchrun does.

    Arguments
    ---------
    main : callable
        The recipe's, of a module.
    arguments : list of str
        Its command line.
    folder : Path
        An empty one.

    Returns
    -------
    list
        The batches: the first of each process, the second of each, and so on.
    """
    both = run_in_two_processes(
        functools.partial(_train, main, arguments), folder
    )
    return [pickle.loads(batch) for pair in zip(*both) for batch in pair]


def _train(main, arguments, rank):
    # They are a group already.
    sb.utils.distributed.ddp_init_group = lambda run_opts: None
    fit_batch, batches = MemEffBrain.fit_batch, []

    def recorded(self, batch):
        batches.append(pickle.dumps(batch))
        return fit_batch(self, batch)

    MemEffBrain.fit_batch = recorded
    main([*arguments, "--distributed_backend=gloo"])
    return batches


def train_as_one(main, arguments, batches, monkeypatch):
    """Trains one process on batches, two in a step."""
    make_dataloader = MemEffBrain.make_dataloader

    def made(self, dataset, stage, *args, **kwargs):
        if stage == sb.Stage.TRAIN:
            return batches
        return make_dataloader(self, dataset, stage, *args, **kwargs)

    monkeypatch.setattr(MemEffBrain, "make_dataloader", made)
    main([*arguments, "--grad_accumulation_factor=2"])
