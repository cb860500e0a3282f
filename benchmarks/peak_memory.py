"""Peak memory of a training step of every vanilla and reversible preset.

Compares four networks of equal depth and nearly equal parameters: all activations
stored, torch.utils.checkpoint around each residual block, Type I and Type II.
Memory is counted on fake tensors, deterministically and without a GPU.

    python benchmarks/peak_memory.py [--batch 64] [--frames 200]

Authors
 * The sb_memeff authors 2026
"""

import argparse
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import torch
from resnets import RESNETS, networks
from result_file import write_results
from table import print_head, print_row
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from sb_memeff.memory.step import training_step_memory

KINDS = ("stored", "checkpoint", "type_1", "type_2")


def sgd(parameters):
    """The recipe's optimizer, to count its state."""
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True)


def multiply_accumulates(build, frames, mels):
    """Counts the multiply-accumulates for one utterance's embedding.

    Arguments
    ---------
    build : callable
        Returns the network.
    frames : int
        Length of the utterance.
    mels : int
        Features per frame.

    Returns
    -------
    int
        Half the floating-point operations of convolutions and products.
    """
    with FakeTensorMode(), torch.no_grad():
        net = build().eval()
        x = torch.zeros(1, frames, mels)
        with FlopCounterMode(display=False) as counter:
            net(x)
    return counter.get_total_flops() // 2


def main():
    """Measures, prints a Markdown table and writes the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--frames", type=int, default=200)
    parser.add_argument("--mels", type=int, default=80)
    arguments = parser.parse_args()
    shape = (arguments.batch, arguments.frames, arguments.mels)
    names = [name for vanilla, _ in RESNETS for name in vanilla.PRESETS]
    rows = []
    print_head(
        "network",
        "parameters (vanilla, I, II)",
        "MACs",
        "stored",
        "checkpoint per block",
        "Type I",
        "Type II",
        "Type II is smaller by",
    )
    # One process for each core: nothing is timed.
    with ProcessPoolExecutor() as processes:
        for row in processes.map(partial(measure, shape), names):
            rows.append(row)
            print_row(*cells(row))
    write_results(__file__, rows)


def measure(shape, name):
    """The four networks of one depth."""
    torch.set_num_threads(1)
    row = {"network": name, "input_shape": shape}
    for kind, build in networks(name).items():
        memory = training_step_memory(build, shape, optimizer=sgd)
        row[kind] = {
            "parameters": memory.parameters,
            "macs": multiply_accumulates(build, *shape[1:]),
            "saved_bytes": memory.saved_bytes,
            "peak_bytes": memory.peak_bytes,
        }
    return row


def cells(row):
    """A row of the README's table."""
    plain = ("stored", "type_1", "type_2")
    peaks = {kind: row[kind]["peak_bytes"] / 1e9 for kind in KINDS}
    return (
        row["network"],
        ", ".join(f"{row[k]['parameters'] / 1e6:.1f}" for k in plain) + " M",
        ", ".join(f"{row[k]['macs'] / 1e9:.1f}" for k in plain) + " G",
        *(f"{value:.1f} GB" for value in peaks.values()),
        f"{peaks['stored'] / peaks['type_2']:.0f}x "
        f"(than checkpoint: {peaks['checkpoint'] / peaks['type_2']:.1f}x)",
    )


if __name__ == "__main__":
    main()
