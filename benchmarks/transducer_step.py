"""Peak memory of the whole training step of a conformer transducer, and time.

The LibriSpeech recipe's step with 80 utterances of 12.5 s, AdamW, float32,
RelPosMHAXL (whose attention weights are outputs), and what recompute_blocks saves
in it: counted on fake tensors, no GPU needed. Time:
forward and backward of its CNN and two of its layers, 8 x 12.5 s, variants taking
turns; on a CPU the process's own time, on one thread.

    python benchmarks/transducer_step.py [--rounds 0]

Authors
 * The sb_memeff authors 2026
"""

import argparse
import time

import torch
from fit_11gb import TRANSDUCER
from result_file import write_results
from table import print_head, print_row
from timing import median_seconds

from sb_memeff.analysis.families.step import recomputed_variant
from sb_memeff.analysis.families.transducer import ENCODER_LAYERS
from sb_memeff.analysis.profile import profile
from sb_memeff.analysis.recipe import read_recipe
from sb_memeff.memory.leftovers import no_leftovers
from sb_memeff.nnet.recompute import recompute_blocks
from sb_memeff.nnet.recompute.fit import Recomputation

BLOCKS = ("CNN", ENCODER_LAYERS)
DROPPED = Recomputation(first_output_only=True)
SPLIT = Recomputation(first_output_only=True, split=8)
SETTINGS = {"attention_type": "RelPosMHAXL", "precision": "fp32"}
# Overrides of the recipe, blocks, and how they are recomputed.
ROWS = {
    "encoder layers recomputed": ({}, (ENCODER_LAYERS,), Recomputation()),
    "and attention weights dropped": ({}, (ENCODER_LAYERS,), DROPPED),
    "and CNN recomputed": ({}, BLOCKS, DROPPED),
    "all in 8 pieces": ({}, BLOCKS, SPLIT),
    "and 2048 rows of logits": ({"max_rows": 2048}, BLOCKS, SPLIT),
}
TIMED = {
    "stored": None,
    "recomputed": Recomputation(),
    "attention weights dropped": DROPPED,
    "8 pieces": SPLIT,
}


def count_memory(batch=80, seconds=12.5):
    """Counts the peak of each row.

    Arguments
    ---------
    batch : int
        Utterances.
    seconds : float
        Length of each.

    Returns
    -------
    list of dict
        Label, peak and batch.
    """
    rows = []
    for label, (overrides, blocks, how) in ROWS.items():
        recipe = read_recipe(TRANSDUCER, {**SETTINGS, **overrides})
        variant = recomputed_variant(recipe.own_variant(), blocks, how, label)
        found = profile(recipe, batch, seconds, variant=variant)
        memory = found.memory
        rows.append(
            {
                "label": label,
                "peak_bytes": memory.peak_bytes,
                "peak_phase": memory.peak_phase,
                "peak_module": memory.peak_module,
                "batch": found.batch_text,
                "optimizer": found.optimizer,
            }
        )
        print_row(label, f"{memory.peak_bytes / 1e9:.2f} GB")
    return rows


def encoder(how):
    """The recipe's CNN and encoder with two layers."""
    torch.manual_seed(0)
    recipe = read_recipe(TRANSDUCER, {**SETTINGS, "num_encoder_layers": 2})
    step = recipe.build()
    net = torch.nn.ModuleDict({"CNN": step.CNN, "enc": step.enc})
    if how is not None:
        recompute_blocks(net, BLOCKS, **how.options())
    return net


def measure_seconds(rounds, device):
    """Median seconds of forward and backward.

    Arguments
    ---------
    rounds : int
        Timed steps of each variant.
    device : str
        Where to run.

    Returns
    -------
    dict
        Maps variants to seconds.
    """
    torch.set_num_threads(1)
    x = torch.randn(8, 1252, 80, device=device)
    lengths = torch.ones(8, device=device)

    def step(net):
        y = net["enc"](net["CNN"](x), lengths, pad_idx=0)
        y.square().mean().backward()

    nets = {label: encoder(how).to(device) for label, how in TIMED.items()}
    clock = time.perf_counter if x.is_cuda else time.process_time
    return median_seconds(
        {label: lambda net=net: step(net) for label, net in nets.items()},
        rounds,
        clock,
    )


def main():
    """Measures, prints Markdown tables and writes the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--rounds", type=int, default=5, help="timed steps; 0 for none"
    )
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print_head("80 x 12.5 s", "peak")
    with no_leftovers():
        memory = count_memory()
    seconds = {}
    if arguments.rounds:
        seconds = measure_seconds(arguments.rounds, device)
        for label, value in seconds.items():
            print(f"{label}: {value / seconds['stored']:.2f} of the time")
    write_results(__file__, {"memory": memory, "seconds": seconds})


if __name__ == "__main__":
    main()
