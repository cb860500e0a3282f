"""The transducer loss with and without logits, side by side.

Authors
 * The sb_memeff authors 2026
"""

from table import aligned
from transducer_loss import Batch

from sb_memeff.memory.units import format_bytes
from sb_memeff.nnet.transducer_loss.joint_loss import TransducerJointLoss

# Batch, frames of 40 ms, tokens, joint dimension, vocabulary.
SHAPE = (4, 250, 50, 640, 1000)
# Method to what it holds the logits of.
METHODS = {
    "batched": "the batch",
    "samplewise": "an utterance",
    "tiled": "a tile",
}


def compare():
    """Measures forward and backward of each method."""
    size, frames, tokens, hidden, vocabulary = SHAPE
    batch = Batch([frames] * size, [tokens] * size, hidden, vocabulary, False)
    exact = batch.exact()
    names = ("method", "extra_bytes", "step_s", "gradient_error")
    rows = []
    for method in METHODS:
        # One step alone may meet another program on the cores.
        figures = batch.measure(
            TransducerJointLoss, exact, rounds=3, method=method
        )
        rows.append(dict(zip(names, (method, *figures))))
    return rows


def print_comparison(rows):
    """Prints the comparison, each method against the first."""
    size, frames, tokens, hidden, vocabulary = SHAPE
    print(
        f"\nbatch {size} x {frames} frames x {tokens} tokens, "
        f"joint network {hidden}, vocabulary {vocabulary}"
    )
    head = ("method", "logits of", "extra memory", "", "s/step")
    table = [
        (
            row["method"],
            METHODS[row["method"]],
            format_bytes(row["extra_bytes"]),
            f"1/{rows[0]['extra_bytes'] / row['extra_bytes']:.1f}",
            f"{row['step_s']:.2f}",
            f"{row['gradient_error']:.0e}",
        )
        for row in rows
    ]
    print(*aligned([(*head, "gradient error"), *table], left=2), sep="\n")
    print(
        "\nExtra: the peak of forward and backward beyond inputs and their "
        "gradients.\nError: relative, against float64. Seconds: this machine. "
        "The training above used\ntiled, the recipe's default."
    )
