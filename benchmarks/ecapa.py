"""Peak memory and time of a training step of ECAPA-TDNN and RevECAPA-TDNN.

Compares four networks, with 3 and with 12 blocks: SpeechBrain's with all
activations stored, the same with torch.utils.checkpoint around each block, ours
with the same weights, and the reversible one. Memory is counted on fake tensors,
deterministically and without a GPU. "Activations" are the peak without parameters
and their gradients. Times are measured on the GPU if there is one, otherwise on
one CPU thread.

    python benchmarks/ecapa.py [--channels 1024] [--batch 32] [--frames 300]

Authors
 * The sb_memeff authors 2026
"""

import argparse
import functools
import itertools

import torch
from resnets import Checkpointed
from result_file import write_results
from speechbrain.lobes.models.ECAPA_TDNN import (
    ECAPA_TDNN as SpeechBrainECAPA_TDNN,
)
from table import print_head, print_row
from timing import median_seconds, training_step

from sb_memeff.lobes.models.RecomputedECAPA_TDNN import ECAPA_TDNN
from sb_memeff.lobes.models.RevECAPA_TDNN import RevECAPA_TDNN
from sb_memeff.memory.step import training_step_memory


class Pooling(torch.nn.Module):
    """Pooling and its batch norm, for one checkpoint."""

    def __init__(self, net):
        super().__init__()
        self.asp, self.norm = net.asp, net.asp_bn

    def forward(self, x, lengths=None):
        """Maps [N, C, T] to [N, 2 * C, 1]."""
        return self.norm(self.asp(x, lengths))


class CheckpointedECAPA_TDNN(SpeechBrainECAPA_TDNN):
    """SpeechBrain's network with each block checkpointed."""

    def forward(self, x, lengths=None):
        """Maps features [N, T, F] to embeddings [N, 1, D]."""
        x = Checkpointed(self.blocks[0])(x.transpose(1, 2))
        taps = []
        for block in self.blocks[1:]:
            x = Checkpointed(block)(x, lengths)
            taps.append(x)
        x = Checkpointed(self.mfa)(torch.cat(taps, dim=1))
        x = Checkpointed(Pooling(self))(x, lengths)
        return self.fc(x).transpose(1, 2)


NETWORKS = {
    "stored": SpeechBrainECAPA_TDNN,
    "checkpoint": CheckpointedECAPA_TDNN,
    "same_weights": ECAPA_TDNN,
    "reversible": RevECAPA_TDNN,
}


def arguments_of(channels, blocks=3, input_size=80):
    """Returns the networks' arguments, with the widths of SpeechBrain's recipe.

    Arguments
    ---------
    channels : int
        Channels of the blocks; the aggregation has three times as many.
    blocks : int
        Number of SE-Res2Net blocks.
    input_size : int
        Features per frame.

    Returns
    -------
    dict
        Keyword arguments.
    """
    return {
        "input_size": input_size,
        "channels": [channels] * (blocks + 1) + [3 * channels],
        "kernel_sizes": [5] + [3] * blocks + [1],
        "dilations": [1] + [2 + i % 3 for i in range(blocks)] + [1],
        "groups": [1] * (blocks + 2),
    }


@functools.cache
def memory_of(
    kind, blocks=3, channels=1024, shape=(32, 300, 80), autocast=None
):
    """Counts the memory of a network's training step.

    Arguments
    ---------
    kind : str
        A key of NETWORKS.
    blocks : int
        Number of SE-Res2Net blocks.
    channels : int
        Width of the network.
    shape : tuple of int
        Shape of the features.
    autocast : torch.dtype, optional
        Dtype of autocast in forward.

    Returns
    -------
    StepMemory
        The counted memory.
    """
    options = arguments_of(channels, blocks, shape[-1])
    return training_step_memory(
        lambda: NETWORKS[kind](**options), shape, autocast=autocast
    )


def times(channels, shape, rounds=6):
    """Median time of forward and backward of each network.

    Arguments
    ---------
    channels : int
        Width of the networks.
    shape : tuple of int
        Shape of the features.
    rounds : int
        Timed steps of each network.

    Returns
    -------
    dict
        Seconds.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)
    x = torch.randn(shape, device=device)
    steps = {
        kind: training_step(network(**arguments_of(channels)).to(device), x)
        for kind, network in NETWORKS.items()
    }
    return median_seconds(steps, rounds)


def main():
    """Measures, prints Markdown tables and writes the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--channels", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--frames", type=int, default=300)
    parser.add_argument("--time-channels", type=int, default=256)
    options = parser.parse_args()
    shape = (options.batch, options.frames, 80)
    memory = []
    print_head(
        "precision",
        "blocks",
        "network",
        "parameters",
        "peak of a step",
        "activations",
        "smaller by",
    )
    for autocast, blocks in itertools.product((None, torch.bfloat16), (3, 12)):
        for kind in NETWORKS:
            found = memory_of(kind, blocks, options.channels, shape, autocast)
            precision = "bf16" if autocast else "fp32"
            memory.append(
                {
                    "precision": precision,
                    "blocks": blocks,
                    "network": kind,
                    "input_shape": shape,
                    "parameters": found.parameters,
                    "activation_bytes": found.activation_bytes,
                    "peak_bytes": found.peak_bytes,
                }
            )
            if kind == "stored":
                stored = found.activation_bytes
            print_row(
                precision,
                blocks,
                kind,
                f"{found.parameters / 1e6:.2f} M",
                f"{found.peak_bytes / 1e6:.0f} MB",
                f"{found.activation_bytes / 1e6:.0f} MB",
                f"{stored / found.activation_bytes:.1f}x",
            )
    seconds = times(options.time_channels, (8, 200, 80))
    for kind, value in seconds.items():
        print(f"{kind}: {value / seconds['stored']:.2f} of the time")
    write_results(__file__, {"memory": memory, "seconds": seconds})


if __name__ == "__main__":
    main()
