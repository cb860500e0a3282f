"""Peak memory and time of a training step with and without recomputed blocks.

Four of SpeechBrain's networks as they are: all activations stored,
torch.utils.checkpoint around named blocks, and recompute_blocks on the same
names. Memory: fake tensors at the batch of a recipe, float32, Adam;
deterministic, no GPU needed. Time: real steps on a smaller batch, taking
turns, on the GPU if there is one; on a CPU the process's own time.

    python benchmarks/peak_memory_recompute.py [--rounds 0]

Authors
 * The sb_memeff authors 2026
"""

import argparse
import time
from dataclasses import dataclass
from functools import partial

import torch
from result_file import write_results
from speechbrain.lobes.models.ECAPA_TDNN import ECAPA_TDNN
from speechbrain.lobes.models.ResNet import ResNet
from speechbrain.lobes.models.transformer.TransformerASR import (
    EncoderWrapper,
    TransformerASR,
)
from speechbrain.lobes.models.Xvector import Xvector
from table import print_head, print_row
from timing import median_seconds, training_step
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.checkpoint import checkpoint

from sb_memeff.memory.step import training_step_memory
from sb_memeff.nnet.recompute import recompute_blocks, store_blocks


def ecapa():
    """The network of SpeechBrain's VoxCeleb recipe."""
    return ECAPA_TDNN(80, channels=[1024] * 4 + [3072])


def resnet():
    """The network of SpeechBrain's VoxCeleb recipe."""
    return ResNet(80)


def xvector():
    """The network of SpeechBrain's VoxCeleb recipe."""
    return Xvector(in_channels=24)


def conformer():
    """The encoder of the LibriSpeech transducer recipe."""
    return EncoderWrapper(
        TransformerASR(
            tgt_vocab=1000,
            input_size=640,
            d_model=512,
            nhead=8,
            num_encoder_layers=12,
            num_decoder_layers=0,
            d_ffn=2048,
            dropout=0.1,
            encoder_module="conformer",
            attention_type="RelPosMHAXL",
            normalize_before=True,
            causal=False,
        )
    )


LAYERS = "transformer.encoder.layers.*"
OUTER = ["blocks.*", "mfa", "asp"]


@dataclass
class Case:
    """A network, its batch, and the options to compare."""

    build: object
    shape: tuple
    timed_shape: tuple
    # The first is compared with torch.utils.checkpoint on the same blocks.
    options: dict
    torch_can: bool = True


CASES = {
    "ECAPA-TDNN, C=1024": Case(
        ecapa,
        (32, 300, 80),
        (2, 200, 80),
        {
            "blocks": {"blocks": OUTER},
            "blocks, and blocks inside": {
                "blocks": [*OUTER, "blocks.*.*", "asp.*"]
            },
            "every 2": {"blocks": OUTER, "every": 2},
        },
    ),
    "ResNet": Case(
        resnet,
        (64, 200, 80),
        (2, 50, 80),
        {
            "blocks": {"blocks": "layer?.*"},
            "every 2": {"blocks": "layer?.*", "every": 2},
        },
    ),
    "Xvector": Case(
        xvector,
        (256, 300, 24),
        (8, 200, 24),
        {"segments of 3": {"blocks": "blocks.*", "segment_length": 3}},
        # It retries a layer after a TypeError, which torch's checkpoint cannot.
        torch_can=False,
    ),
    "Conformer encoder, 12 layers": Case(
        conformer,
        (16, 250, 640),
        (1, 150, 640),
        {
            "layers": {"blocks": LAYERS},
            "every 1.5": {"blocks": LAYERS, "every": 1.5},
            "every 2": {"blocks": LAYERS, "every": 2},
        },
    ),
}


def variants(case):
    """Returns functions that build the compared networks.

    Arguments
    ---------
    case : Case
        The case.

    Returns
    -------
    dict
        Maps names to functions.
    """

    def checkpointed():
        net = case.build()
        names = recompute_blocks(net, **next(iter(case.options.values())))
        store_blocks(net)
        # Not a wrapper module, because ECAPA_TDNN checks the blocks' class.
        fake = isinstance(next(net.parameters()), FakeTensor)
        for block in map(net.get_submodule, names):
            block.forward = partial(
                checkpoint,
                block.forward,
                use_reentrant=False,
                # Fake tensors cannot hold a random state.
                preserve_rng_state=not fake,
            )
        return net

    def recomputed(options):
        net = case.build()
        recompute_blocks(net, **options)
        return net

    built = {"stored": case.build}
    if case.torch_can:
        built["torch.utils.checkpoint"] = checkpointed
    for name, options in case.options.items():
        built[name] = lambda options=options: recomputed(options)
    return built


def measure_memory(case):
    """Counts bytes between forward and backward, and at the peak."""
    rows = {}
    for name, build in variants(case).items():
        memory = training_step_memory(
            build, case.shape, optimizer=torch.optim.Adam
        )
        rows[name] = {
            "parameters": memory.parameters,
            "saved_bytes": memory.saved_bytes,
            "peak_bytes": memory.peak_bytes,
        }
    return rows


def measure_seconds(case, rounds, device):
    """Median seconds of a step."""
    x = torch.randn(case.timed_shape, device=device)
    steps = {
        name: training_step(build().to(device), x)
        for name, build in variants(case).items()
    }
    clock = time.perf_counter if x.is_cuda else time.process_time
    return median_seconds(steps, rounds, clock)


def main():
    """Measures, prints a Markdown table and writes the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--rounds", type=int, default=5, help="timed steps; 0 for none"
    )
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    results = []
    print_head("network", "", "peak", "", "between the passes", "time")
    for network, case in CASES.items():
        rows = measure_memory(case)
        seconds = {}
        if arguments.rounds:
            seconds = measure_seconds(case, arguments.rounds, device)
        for name, row in rows.items():
            row["seconds"] = seconds.get(name)
        results.append(
            {
                "network": network,
                "input_shape": case.shape,
                "timed_shape": case.timed_shape,
                "rows": rows,
            }
        )
        for name, row in rows.items():
            print_row(network, name, *cells(row, rows["stored"]))
    write_results(__file__, results)


def cells(row, stored):
    """What the table says about a variant."""
    peak, saved = row["peak_bytes"], row["saved_bytes"]
    return (
        f"{peak / 1e9:.2f} GB",
        f"1/{stored['peak_bytes'] / peak:.1f}",
        f"{saved / 1e9:.2f} GB",
        f"{row['seconds'] / stored['seconds']:.2f}x" if row["seconds"] else "",
    )


if __name__ == "__main__":
    main()
