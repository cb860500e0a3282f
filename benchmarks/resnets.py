"""The networks that the benchmarks compare: stored, checkpointed, reversible.

Authors
 * The sb_memeff authors 2026
"""

import torch
from torch.utils.checkpoint import checkpoint

from sb_memeff.analysis.families.speaker import RESNETS, reversible_twin


class Checkpointed(torch.nn.Module):
    """A residual block in torch.utils.checkpoint, as a user would wrap it."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, *args):
        """Calls the block, which backward recomputes."""
        # Fake tensors draw no random numbers, and the blocks have no dropout.
        return checkpoint(
            self.block, *args, use_reentrant=False, preserve_rng_state=False
        )


def checkpointed(net):
    """The vanilla network with every residual block checkpointed."""
    for blocks in net.stages:
        for i, block in enumerate(blocks):
            blocks[i] = Checkpointed(block)
    return net


def networks(name, **options):
    """Returns the four compared networks of one depth.

    Arguments
    ---------
    name : str
        Preset of the vanilla network, e.g. ResNet34 or DFResNet56.
    **options : dict
        Overrides of the presets.

    Returns
    -------
    dict
        Maps names to functions that build the networks.
    """
    vanilla, reversible = next(f for f in RESNETS if name in f[0].PRESETS)
    ours = reversible_twin(name)
    return {
        "stored": lambda: vanilla.from_preset(name, **options),
        "checkpoint": lambda: checkpointed(
            vanilla.from_preset(name, **options)
        ),
        "type_1": lambda: reversible.from_preset(
            ours, downsampling="strided", **options
        ),
        "type_2": lambda: reversible.from_preset(
            ours, downsampling="invertible", **options
        ),
    }
