"""What the benchmarks share: the networks compared, and result files.

Authors
 * The sb_memeff authors 2026
"""

import datetime
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint

import sb_memeff
from sb_memeff.lobes.models.ResNet import ResNet
from sb_memeff.lobes.models.RevResNet import RevResNet

RESULTS = Path(__file__).parent / "results"


def machine():
    """Machine, versions and date of a run.

    Returns
    -------
    dict
        Processor, GPU, threads, versions and date.
    """
    gpu = torch.cuda.is_available()
    return {
        "date": datetime.date.today().isoformat(),
        "processor": f"{platform.machine()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if gpu else None,
        "python": platform.python_version(),
        **{
            name: version(name)
            for name in ("torch", "speechbrain", "bitsandbytes")
        },
        "sb_memeff": sb_memeff.__version__,
    }


def write_results(script, results):
    """Writes results/<script>.json next to the benchmarks.

    Arguments
    ---------
    script : str
        ``__file__`` of the benchmark.
    results : list or dict
        What it found.
    """
    path = RESULTS / f"{Path(script).stem}.json"
    path.write_text(
        json.dumps({"machine": machine(), "results": results}, indent=2) + "\n"
    )
    print(f"written to {path}")


class Checkpointed(torch.nn.Module):
    """A residual block as a user would wrap it."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, *args):
        """Calls the block, to be computed again in backward."""
        # Fake tensors draw no random numbers, and the blocks have no dropout.
        return checkpoint(
            self.block, *args, use_reentrant=False, preserve_rng_state=False
        )


def checkpointed_resnet(name, **options):
    """The vanilla preset with every residual block checkpointed."""
    net = ResNet.from_preset(name, **options)
    for blocks in net.stages:
        for i, block in enumerate(blocks):
            blocks[i] = Checkpointed(block)
    return net


def networks(depth, **options):
    """The four networks of one depth that the benchmarks compare.

    Arguments
    ---------
    depth : int
        34, 101, 152, 221 or 293.
    **options : dict
        Overrides of the presets.

    Returns
    -------
    dict
        Functions that build them.
    """
    vanilla, ours = f"ResNet{depth}", f"RevNet{depth}"
    return {
        "stored": lambda: ResNet.from_preset(vanilla, **options),
        "checkpoint": lambda: checkpointed_resnet(vanilla, **options),
        "type_1": lambda: RevResNet.from_preset(
            ours, downsampling="strided", **options
        ),
        "type_2": lambda: RevResNet.from_preset(
            ours, downsampling="invertible", **options
        ),
    }
