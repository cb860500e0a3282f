"""Errors that 8-bit formats of optimizer states make in training, simulated.

Each step adds a gradient to the states and rounds them to the format. The table gives
the error of the way that the parameters have gone, relative to the way with states in
32 bits, for momentum 0.9 and for Adam:

* gradients of a block have equal scales (0), or scales drawn from a log-normal
  distribution whose logarithm has a standard deviation of 1 or 2; 400 steps;
* drift: equal scales at first, which become those of 1 in 3,000 steps;
* end: as 1, and 200 further steps without gradient, in which the first moment decays;
* small: momenta of about 0.005 of their block's largest, in 40 steps without gradient.

Most formats round to the nearest number. Corrected ones do what the package's
optimizers do. The parameters move at once by what the first moment loses in rounding:
as far as this part of it would have moved them in all further steps. The second moment
is dithered.

    python benchmarks/state_formats.py

Authors
 * The sb_memeff authors 2026
"""

import argparse
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from result_file import write_results
from table import print_head, print_row

from sb_memeff.ops.blocks_8bit import (
    R2,
    VALUES,
    Codebook,
    Quantized8bit,
    dither_phase,
)

# Blocks of 256 values.
BLOCKS = 16
# Of the first moment.
DECAY = 0.9


@dataclass(frozen=True)
class Task:
    """How gradients differ.

    Arguments
    ---------
    sigma : float
        Of the logarithm of the gradients' scales in a block.
    drift : float
        The same, of what the scales are multiplied by in the end.
    steps : int
        Number of steps.
    further : int
        Steps without gradient after them.
    """

    sigma: float
    drift: float = 0
    steps: int = 400
    further: int = 0


TASKS = {
    "0": Task(0),
    "1": Task(1),
    "2": Task(2),
    "drift": Task(0, drift=1, steps=3000),
    "end": Task(1, further=200),
}


@dataclass(frozen=True)
class Format:
    """Rounds a first and a second moment.

    Arguments
    ---------
    first : callable
        Takes and returns a state, float32.
    second : callable
        The same; and takes the number of the step.
    bytes_per_value : float
        Its size.
    corrects : bool
        Whether the parameters move by the rounding errors of the first moment.
    """

    first: Callable[[torch.Tensor], torch.Tensor]
    second: Callable[[torch.Tensor, int], torch.Tensor]
    bytes_per_value: float
    corrects: bool = False

    def round_first(self, moment: torch.Tensor):
        """A first moment as it is stored, and how far the rest would go."""
        rounded = self.first(moment)
        rest = DECAY / (1 - DECAY) * (moment - rounded)
        return rounded, rest if self.corrects else torch.zeros_like(rest)


def in_blocks(
    values,
    block,
    scale_of,
    scale_dtype=torch.float32,
    smallest=0,
    dithers=False,
):
    """Rounds to one of some numbers times the block's scale."""
    values = torch.as_tensor(values)
    middles = (values[1:] + values[:-1]) / 2
    columns = torch.arange(block, dtype=torch.float64) * R2[0]

    def rounded(x, step=0):
        blocks = x.view(-1, block)
        scale = scale_of(blocks)[:, None].to(scale_dtype).float()
        scaled = blocks / torch.where(scale == 0, 1, scale)
        if dithers:
            above = torch.searchsorted(values, scaled).clamp(1, 255)
            below = values[above - 1]
            dither = (columns + step * R2[1]).frac().float()
            limit = below + (values[above] - below) * dither
            codes = above - 1 + (scaled > limit).long()
        else:
            codes = torch.bucketize(scaled, middles)
        return (values[codes.clamp(min=smallest)] * scale).view(x.shape)

    return rounded


def largest_magnitude(blocks):
    """The scale of bitsandbytes and torchao."""
    return blocks.abs().amax(1)


def signed_extreme(blocks):
    """The value of largest magnitude."""
    lowest, highest = torch.aminmax(blocks, dim=1)
    return torch.where(highest >= -lowest, highest, lowest)


def maps():
    """Numbers for first and second moments, by name.

    The signed ones have 1 but not -1, of which a signed extreme has no need. A
    second moment spans twice as many orders of magnitude as a first one: the root of
    it is mapped.
    """
    signed = (torch.arange(256) - 127) / 128
    unsigned = torch.arange(256) / 255
    return {
        "dynamic tree": (VALUES[True], VALUES[False]),
        "softsign": (
            signed / (2 - signed.abs()),
            (unsigned / (2 - unsigned)) ** 2,
        ),
        "linear": (signed, unsigned**2),
        "square": (signed * signed.abs(), unsigned**4),
        "cube": (signed**3, unsigned**6),
    }


def bitsandbytes_rounded(signed):
    """bitsandbytes' own operators."""
    values = torch.tensor(VALUES[signed])

    def rounded(x, step=0):
        codes, scales = torch.ops.bitsandbytes.quantize_blockwise(
            x, values, 256
        )
        return torch.ops.bitsandbytes.dequantize_blockwise(
            codes, scales, values, 256, x.dtype
        )

    return rounded


def fp8(block=256):
    """torchao's float8: codes in float8_e4m3fn, whose largest number is 448."""

    def rounded(x, step=0):
        blocks = x.view(-1, block)
        scale = largest_magnitude(blocks)[:, None].clamp(min=1e-12) / 448
        codes = (blocks / scale).to(torch.float8_e4m3fn)
        return (codes.float() * scale).view(x.shape)

    return rounded


def ours(signed):
    """The package's format."""
    codebook = Codebook(signed, torch.device("cpu"))

    def rounded(x, step=0):
        packed = Quantized8bit.empty_like(x)
        phase = None if signed else dither_phase(torch.tensor(float(step)))
        codebook.quantize_into(packed, x, phase)
        return codebook.dequantize(packed)

    return rounded


def formats():
    """All formats, by name."""
    tree = VALUES[True], VALUES[False]
    found = {
        "32 bits": Format(lambda x: x, lambda x, step: x, 4.0),
        "sb_memeff": Format(ours(True), ours(False), 1 + 4 / 256, True),
        "bitsandbytes": Format(
            bitsandbytes_rounded(True),
            bitsandbytes_rounded(False),
            1 + 4 / 256,
        ),
        # The same numbers and scales as bitsandbytes, and the nearest code.
        "torchao 8-bit": Format(
            in_blocks(tree[0], 256, largest_magnitude),
            in_blocks(tree[1], 256, largest_magnitude),
            1 + 4 / 256,
        ),
        "torchao fp8": Format(fp8(), fp8(), 1 + 4 / 256),
    }
    for (name, (first, second)), block, corrects in itertools.product(
        maps().items(), (32, 64, 128, 256), (False, True)
    ):
        # Scales in float32 would take blocks of 32 to 1.125 bytes.
        dtype = torch.float16 if block == 32 else torch.float32
        found[f"{name}, {block}" + ", corrected" * corrects] = Format(
            in_blocks(first, block, signed_extreme, dtype),
            in_blocks(
                second,
                block,
                largest_magnitude,
                dtype,
                smallest=1,
                dithers=corrects,
            ),
            1 + dtype.itemsize / block,
            corrects,
        )
    return found


def displacements(form, task):
    """The way that SGD and Adam take, without learning rate.

    Arguments
    ---------
    form : Format
        Format of the states.
    task : Task
        The gradients.

    Returns
    -------
    tuple of torch.Tensor
        Sum of momenta; sum of Adam's steps.
    """
    g = torch.Generator().manual_seed(0)
    scale, mean, drift = torch.randn(3, 256 * BLOCKS, generator=g)
    # Most of a gradient is noise.
    mean *= 0.1
    momentum, first, second, sgd, adam = torch.zeros(5, len(scale))
    for step in range(1, task.steps + task.further + 1):
        size = task.sigma * scale + task.drift * step / task.steps * drift
        noise = torch.randn(len(scale), generator=g)
        gradient = size.exp() * (mean + noise) * (step <= task.steps)
        momentum = DECAY * momentum + gradient
        sgd += momentum
        momentum, rest = form.round_first(momentum)
        sgd += rest
        first = torch.lerp(first, gradient, 1 - DECAY)
        second = 0.999 * second + 0.001 * gradient**2
        root = (second / (1 - 0.999**step)).sqrt() + 1e-8
        adam += first / (1 - DECAY**step) / root
        first, rest = form.round_first(first)
        adam += rest / root
        second = form.second(second, step)
    return sgd, adam


def way_without_gradient(form, steps=40):
    """The sum of small momenta that decay, while others in their blocks do not."""
    momentum = torch.empty(256 * BLOCKS)
    momentum.uniform_(0.04, 0.06, generator=torch.Generator().manual_seed(0))
    gradient = torch.zeros_like(momentum)
    # The largest of each 32 values stays.
    momentum[::32], gradient[::32] = 10, 1
    way = torch.zeros_like(momentum)
    for _ in range(steps):
        momentum = DECAY * momentum + gradient
        way += momentum
        momentum, rest = form.round_first(momentum)
        way += rest
    return way[gradient == 0]


def relative_errors(ways, exact_ways):
    """Of several ways, each relative to the exact one."""
    return [
        ((way - exact).norm() / exact.norm()).item()
        for way, exact in zip(ways, exact_ways)
    ]


def main():
    """Simulates, prints a Markdown table and writes the result file."""
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    all_formats = formats()
    exact = all_formats["32 bits"]
    exact_ways = [displacements(exact, task) for task in TASKS.values()]
    without_gradient = way_without_gradient(exact)
    print_head(
        "format",
        "bytes per value",
        *(f"SGD, {name}" for name in TASKS),
        "SGD, small",
        *(f"Adam, {name}" for name in TASKS),
    )
    rows = []
    for name, form in all_formats.items():
        sgd, adam = zip(
            *(
                relative_errors(displacements(form, task), ways)
                for task, ways in zip(TASKS.values(), exact_ways)
            )
        )
        (small,) = relative_errors(
            [way_without_gradient(form)], [without_gradient]
        )
        rows.append(
            {
                "format": name,
                "bytes_per_value": form.bytes_per_value,
                "sgd_error": {**dict(zip(TASKS, sgd)), "small": small},
                "adam_error": dict(zip(TASKS, adam)),
            }
        )
        print_row(
            name,
            f"{form.bytes_per_value:.3f}",
            *(f"{100 * x:.2f} %" for x in (*sgd, small, *adam)),
        )
    write_results(__file__, rows)


if __name__ == "__main__":
    main()
