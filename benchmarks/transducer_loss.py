"""Memory and time of the transducer loss, with and without stored logits.

Compares torchaudio's rnnt_loss on batched logits with TransducerJointLoss:
samplewise, tiled without skipping a cell, and tiled. Forward and backward to
encoder, predictor and weights run one after the other in one process. Memory is the
peak beyond the inputs and their gradients, counted by storage. Errors are relative
to the gradient in float64.

    python benchmarks/transducer_loss.py [--shapes librispeech_shape_info.pt]

--shapes is a file with a tensor [N, 2] of frames and targets, from which batches of
30 are drawn. The last table lists the memory of growing batches.

Authors
 * The sb_memeff authors 2026
"""

import argparse
import copy

import torch
from result_file import write_results
from speechbrain.nnet.transducer.transducer_joint import Transducer_joint
from table import print_head, print_row
from timing import seconds
from torch import nn
from torchaudio_loss import TorchaudioJointLoss

from sb_memeff.memory.tracker import StorageTracker
from sb_memeff.nnet.transducer_loss.joint_loss import TransducerJointLoss

METHODS = {
    "torchaudio, batched": (TorchaudioJointLoss, {}),
    "samplewise": (TransducerJointLoss, {"method": "samplewise"}),
    "tiled, floor 0": (TransducerJointLoss, {"occupancy_floor": 0.0}),
    "tiled": (TransducerJointLoss, {}),
}


class Batch:
    """Inputs, modules and lengths of one measurement.

    Arguments
    ---------
    frames : list of int
        Frames of each sample.
    targets : list of int
        Targets of each sample.
    hidden : int
        Joint dimension.
    vocabulary : int
        Number of symbols.
    peaked : bool
        Whether scores are like a trained model's, with one path far likelier
        than all others.
    """

    def __init__(self, frames, targets, hidden, vocabulary, peaked):
        torch.manual_seed(0)
        self.frames, self.counts = torch.tensor(frames), torch.tensor(targets)
        self.joint = Transducer_joint(nonlinearity=nn.GELU)
        self.classifier = nn.Linear(hidden, vocabulary)
        shape = len(frames), max(targets)
        self.targets = torch.randint(1, vocabulary, shape)
        self.enc = torch.randn(len(frames), max(frames), hidden)
        self.pred = torch.randn(len(frames), max(targets) + 1, hidden)
        if peaked:
            self._align()
        self.inputs = [
            self.enc.requires_grad_(),
            self.pred.requires_grad_(),
            *self.classifier.parameters(),
        ]

    def _align(self):
        # A frame's row points to the symbol emitted in this frame.
        rows = self.classifier.weight.detach()
        rows = rows / rows.norm(dim=1, keepdim=True)
        self.pred *= 0.01
        for b, (t, u) in enumerate(zip(self.frames, self.counts)):
            symbols = torch.zeros(int(t), dtype=torch.long)
            at = (torch.arange(int(u)) + 0.5) * t / u
            symbols[at.long()] = self.targets[b, :u]
            self.enc[b, :t] = 30 * rows[symbols]

    def loss(self, kind, **options):
        """Computes the value of a loss module."""
        loss = kind(self.joint, self.classifier, reduction="nll_sum", **options)
        return loss(
            self.enc,
            self.pred,
            self.targets,
            self.frames / self.enc.shape[1],
            self.counts / self.targets.shape[1],
        )

    def exact(self):
        """Computes gradients in float64."""
        wide = copy.copy(self)
        wide.enc, wide.pred = (
            x.detach().double().requires_grad_() for x in (self.enc, self.pred)
        )
        wide.classifier = copy.deepcopy(self.classifier).double()
        value = wide.loss(TransducerJointLoss, method="samplewise")
        return torch.autograd.grad(
            value, [wide.enc, wide.pred, *wide.classifier.parameters()]
        )

    def measure(self, kind, exact=None, rounds=1, **options):
        """Measures peak memory in bytes, seconds, and the largest gradient error.

        The seconds are those of the fastest round.
        """

        def step():
            return torch.autograd.grad(self.loss(kind, **options), self.inputs)

        with StorageTracker(exclude=[*self.inputs, self.targets]) as tracker:
            gradients = step()
        extra = tracker.peak - sum(g.nbytes for g in gradients)
        if exact is None:
            return extra
        error = max(
            ((a - b).norm() / b.norm()).item() for a, b in zip(gradients, exact)
        )
        del gradients
        return extra, min(seconds(step) for _ in range(rounds)), error


def compare(name, batch):
    """Measures all methods on a batch; prints lines of a Markdown table.

    Arguments
    ---------
    name : str
        Name of the batch.
    batch : Batch
        The batch.

    Returns
    -------
    list
        A dict for each method.
    """
    rows = []
    exact = batch.exact()
    for method, (kind, options) in METHODS.items():
        extra, step_s, error = batch.measure(kind, exact, **options)
        if not rows:
            reference = extra, step_s
        rows.append(
            {
                "batch": name,
                "method": method,
                "extra_bytes": extra,
                "seconds": step_s,
                "gradient_error": error,
            }
        )
        print_row(
            name,
            method,
            f"{extra / 1e6:.0f} MB (1/{reference[0] / extra:.1f})",
            f"{step_s:.2f} s ({reference[1] / step_s:.1f}x)",
            f"{error:.0e}",
        )
    return rows


def grow():
    """Measures the memory of growing batches; prints a table.

    Returns
    -------
    list
        A dict for each batch.
    """
    rows = []
    print()
    print_head(
        "batch of 100 x 21, H 256, V 500",
        "enc, pred, their gradients",
        *METHODS,
    )
    for size in (1, 8, 64, 512):
        batch = Batch([100] * size, [20] * size, 256, 500, False)
        given = 2 * (batch.enc.nbytes + batch.pred.nbytes)
        row = {"samples": size, "given_bytes": given}
        for method, (kind, options) in METHODS.items():
            row[method] = batch.measure(kind, **options)
        rows.append(row)
        figures = (given, *(row[method] for method in METHODS))
        print_row(size, *(f"{figure / 1e6:.0f} MB" for figure in figures))
    return rows


def main():
    """Measures, prints a Markdown table and writes the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes")
    parser.add_argument("--batches", type=int, default=1)
    arguments = parser.parse_args()
    print_head("batch", "method", "memory", "time (faster)", "gradient error")
    rows = []
    for peaked in (False, True):
        name = "4 x 250 x 51, " + ("trained-like" if peaked else "untrained")
        rows += compare(name, Batch([250] * 4, [50] * 4, 640, 1000, peaked))
    if arguments.shapes:
        shapes = torch.load(arguments.shapes).long()
        order = torch.randperm(
            len(shapes), generator=torch.Generator().manual_seed(0)
        )
        for number in range(arguments.batches):
            some = shapes[order[30 * number : 30 * number + 30]]
            for peaked in (False, True):
                name = f"30 of LibriSpeech, no. {number}, " + (
                    "trained-like" if peaked else "untrained"
                )
                batch = Batch(*some.T.tolist(), 512, 500, peaked)
                rows += compare(name, batch)
    write_results(__file__, {"comparison": rows, "growth": grow()})


if __name__ == "__main__":
    main()
