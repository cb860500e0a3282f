"""Two processes over gloo, for tests of DistributedDataParallel.

Authors
 * The sb_memeff authors 2026
"""

import os

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_in_two_processes(function, folder):
    """Calls a function of the rank in two processes.

    Arguments
    ---------
    function : callable
        Of a module, not a local one. Its results must be such as torch.load
        takes by default.
    folder : Path
        An empty one.

    Returns
    -------
    list
        What the function returned, for rank 0 and 1.
    """
    # A server imports what takes long once, for all calls of a test session.
    mp.set_forkserver_preload(["speechbrain", "torchaudio", "sb_memeff.brain"])
    mp.start_processes(
        _worker,
        args=(function, str(folder)),
        nprocs=2,
        start_method="forkserver",
    )
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def _worker(rank, function, folder):
    torch.set_num_threads(1)
    # As torchrun does; SpeechBrain reads them.
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    # A file, so that no port can be taken.
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    torch.save(function(rank), f"{folder}/{rank}.pt")
    dist.barrier()
    # Not by way of Python's and torch's teardown: there gloo's threads abort
    # now and then ("terminate called without an active exception"), in a
    # program without a line of ours, too.
    os._exit(0)
