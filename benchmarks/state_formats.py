"""Errors that 8-bit formats of optimizer states make in training, simulated.

Each step adds a gradient to the states and rounds them to the format. Values of a
block have gradients of equal scales, or of scales drawn from a log-normal
distribution. The table gives the error of the way that the parameters have gone,
relative to the way with states in 32 bits:

* after 400 steps, for momentum 0.9 and for Adam;
* after 40 steps without gradient, for momenta of about 0.005 of their block's largest.

Where rounding errors are repaid, the parameters move at once by what the first
moment loses in rounding: as far as this part of it would have moved them in all
further steps. The package's optimizers do so.

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

from sb_memeff.ops.blocks_8bit import VALUES, Codebook

# Blocks of 256 values; steps.
BLOCKS, STEPS = 16, 400
SIGMAS = (0, 1, 2)
# Of the first moment.
DECAY = 0.9


@dataclass(frozen=True)
class Format:
    """Rounds a first and a second moment.

    Arguments
    ---------
    first, second : callable
        Takes and returns a state, float32.
    bytes_per_value : float
        Its size.
    repays : bool
        Whether the parameters move by the rounding errors of the first moment.
    """

    first: Callable[[torch.Tensor], torch.Tensor]
    second: Callable[[torch.Tensor], torch.Tensor]
    bytes_per_value: float
    repays: bool = False

    def round_first(self, moment: torch.Tensor):
        """A first moment as it is stored, and how far the rest would go."""
        rounded = self.first(moment)
        rest = DECAY / (1 - DECAY) * (moment - rounded)
        return rounded, rest if self.repays else torch.zeros_like(rest)


def in_blocks(values, block, scale_of, scale_dtype=torch.float32, smallest=0):
    """Rounds to the nearest of some numbers times the block's scale."""
    values = torch.as_tensor(values)
    middles = (values[1:] + values[:-1]) / 2

    def rounded(x):
        blocks = x.view(-1, block)
        scale = scale_of(blocks)[:, None].to(scale_dtype).float()
        divisor = torch.where(scale == 0, 1, scale)
        codes = torch.bucketize(blocks / divisor, middles)
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

    def rounded(x):
        codes, scales = torch.ops.bitsandbytes.quantize_blockwise(
            x, values, 256
        )
        return torch.ops.bitsandbytes.dequantize_blockwise(
            codes, scales, values, 256, x.dtype
        )

    return rounded


def fp8(block=256):
    """torchao's float8: codes in float8_e4m3fn, whose largest number is 448."""

    def rounded(x):
        blocks = x.view(-1, block)
        scale = largest_magnitude(blocks)[:, None].clamp(min=1e-12) / 448
        codes = (blocks / scale).to(torch.float8_e4m3fn)
        return (codes.float() * scale).view(x.shape)

    return rounded


def ours(signed):
    """The package's format."""
    codebook = Codebook(signed, torch.device("cpu"))
    return lambda x: codebook.dequantize(codebook.quantize(x))


def formats():
    """All formats, by name."""
    tree = VALUES[True], VALUES[False]
    found = {
        "32 bits": Format(lambda x: x, lambda x: x, 4.0),
        "sb_memeff": Format(ours(True), ours(False), 1 + 4 / 256, repays=True),
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
    for (name, (first, second)), block, repays in itertools.product(
        maps().items(), (32, 64, 128, 256), (False, True)
    ):
        # Scales in float32 would take blocks of 32 to 1.125 bytes.
        dtype = torch.float16 if block == 32 else torch.float32
        found[f"{name}, {block}" + ", repaid" * repays] = Format(
            in_blocks(first, block, signed_extreme, dtype),
            in_blocks(second, block, largest_magnitude, dtype, smallest=1),
            1 + dtype.itemsize / block,
            repays,
        )
    return found


def displacements(form, sigma, steps=STEPS):
    """The way that SGD and Adam take, without learning rate.

    Arguments
    ---------
    form : Format
        Format of the states.
    sigma : float
        Of the logarithm of the gradients' scales in a block.
    steps : int
        Number of steps.

    Returns
    -------
    tuple of torch.Tensor
        Sum of momenta; sum of Adam's steps.
    """
    g = torch.Generator().manual_seed(0)
    scale, mean = torch.randn(2, 256 * BLOCKS, generator=g)
    scale = (sigma * scale).exp()
    # Most of a gradient is noise.
    mean *= 0.1
    momentum, first, second, sgd, adam = torch.zeros(5, len(scale))
    for step in range(1, steps + 1):
        gradient = scale * (mean + torch.randn(len(scale), generator=g))
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
        second = form.second(second)
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
    exact_ways = {s: displacements(exact, s) for s in SIGMAS}
    without_gradient = way_without_gradient(exact)
    print_head(
        "format",
        "bytes per value",
        *(f"SGD, {s}" for s in SIGMAS),
        *(f"Adam, {s}" for s in SIGMAS),
        "without gradient",
    )
    rows = []
    for name, form in all_formats.items():
        sgd, adam = zip(
            *(
                relative_errors(displacements(form, s), exact_ways[s])
                for s in SIGMAS
            )
        )
        (small,) = relative_errors(
            [way_without_gradient(form)], [without_gradient]
        )
        rows.append(
            {
                "format": name,
                "bytes_per_value": form.bytes_per_value,
                "sgd_error": dict(zip(SIGMAS, sgd)),
                "adam_error": dict(zip(SIGMAS, adam)),
                "error_without_gradient": small,
            }
        )
        print_row(
            name,
            f"{form.bytes_per_value:.3f}",
            *(f"{100 * x:.2f} %" for x in (*sgd, *adam, small)),
        )
    write_results(__file__, rows)


if __name__ == "__main__":
    main()
