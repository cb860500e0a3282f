"""Joins the processes that torchrun has started.

Authors
 * The sb_memeff authors 2026
"""

from typing import Any

import speechbrain as sb
import torch

__all__ = ["init_processes"]


def init_processes(run_opts: dict[str, Any]) -> None:
    """Calls SpeechBrain's ddp_init_group, if torchrun has started this process.

    Arguments
    ---------
    run_opts : dict
        Options of the command line; ``distributed_backend`` counts.

    Raises
    ------
    ValueError
        If a process has no GPU but its backend needs one.

    Example
    -------
    >>> init_processes({"distributed_backend": "nccl"})
    """
    process = sb.utils.distributed.get_local_rank()
    if process is None:
        return
    backend, gpus = run_opts["distributed_backend"], torch.cuda.device_count()
    if backend != "gloo" and process >= gpus:
        raise ValueError(
            f"distributed_backend={backend} needs a GPU for each process, but "
            f"there are {gpus} for process {process}: lower --nproc_per_node, or "
            f"add --device=cpu --distributed_backend=gloo."
        )
    sb.utils.distributed.ddp_init_group(run_opts)
