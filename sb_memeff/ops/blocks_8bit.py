"""Block-wise dynamic-tree quantization to 8 bits.

A tensor is divided into blocks of 256 values. Each block stores a scale in
float32: its value of largest magnitude, with its sign. Each value stores an 8-bit
code: the index of the nearest of 256 numbers between -1 and 1 (or 0 and 1), which
the scale multiplies. These numbers are denser near 0, so a value keeps one to two
digits over seven orders of magnitude.

Source: Dettmers et al., 8-bit Optimizers via Block-wise Quantization
(arXiv 2110.02861), sections 2.1 and 2.2; the 256 numbers are bitsandbytes'. There
the scale is a magnitude. As the numbers include 1 but not -1, a negative momentum
that is the largest of its block then shrinks by 0.7 % at each step.

A second moment changes by 0.1 % at a step, less than the gap between two numbers.
Rounded to the nearest number, most would never change again relative to their
block's largest. They are dithered instead: rounded up or down with probabilities that
leave the mean as it is. The random numbers are those of a low-discrepancy sequence,
M. Roberts' R2, whose errors average out sooner than those of independent numbers, and
which depends on nothing but the step and the position in the block.

Authors
 * The sb_memeff authors 2026
"""

import logging
from dataclasses import dataclass

import torch

from sb_memeff.ops.dispatch import runs_fused

# On import, bitsandbytes warns that a 4-bit kernel is missing, which is not used
# here.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
import bitsandbytes.functional as bnb  # noqa: E402

__all__ = ["BLOCK", "Codebook", "Quantized8bit", "dither_phase"]

BLOCK = 256
# Number of values quantized at a time on the CPU, so that they stay in its cache.
SLICE = 1 << 17
# Keys: signed or not. As numbers, so that a codebook can have fake tensors.
VALUES = {
    signed: bnb.create_dynamic_map(signed=signed).tolist()
    for signed in (True, False)
}
# The multiples of these two numbers, without their integer parts, fill the unit square
# evenly: powers of 1 / 1.3247..., the root of x^3 = x + 1.
R2 = 0.7548776662466927, 0.5698402909980532


def dither_phase(step: torch.Tensor) -> torch.Tensor:
    """Returns the part of a step's random numbers that all values share.

    Arguments
    ---------
    step : torch.Tensor
        Number of the step, any shape.

    Returns
    -------
    torch.Tensor
        float32, from 0 to 1.
    """
    return (step.double() * R2[1]).frac().float()


@dataclass(frozen=True)
class Quantized8bit:
    """A tensor in 8 bits.

    Arguments
    ---------
    codes : torch.Tensor
        Index of each value in the codebook, uint8, in the tensor's shape.
    scales : torch.Tensor
        Value of largest magnitude of each block of 256 values (in the order of
        a contiguous tensor), float32. Checkpoints of bitsandbytes and of
        earlier versions have its magnitude.
    """

    codes: torch.Tensor
    scales: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Number of bytes."""
        return self.codes.nbytes + self.scales.nbytes

    @classmethod
    def empty_like(cls, x: torch.Tensor) -> "Quantized8bit":
        """Allocates codes and scales.

        Arguments
        ---------
        x : torch.Tensor
            Determines shape and device.

        Returns
        -------
        Quantized8bit
            Not initialised.

        Raises
        ------
        ValueError
            If there are at least 2^31 values.
        """
        if x.numel() >= 1 << 31:
            raise ValueError(
                f"A tensor of {x.numel()} values cannot be quantized: the "
                "limit is 2^31. Keep its states in 32 bits."
            )
        codes = x.new_empty(x.shape, dtype=torch.uint8)
        blocks = -(-x.numel() // BLOCK)
        return cls(codes, x.new_empty(blocks, dtype=torch.float32))

    def part(self, start: int, stop: int) -> "Quantized8bit":
        """Returns some of the values, in the same memory.

        Arguments
        ---------
        start, stop : int
            Range of the values. Start is a multiple of the block size.

        Returns
        -------
        Quantized8bit
            Of shape [stop - start].
        """
        return Quantized8bit(
            self.codes.view(-1)[start:stop],
            self.scales[start // BLOCK : -(-stop // BLOCK)],
        )


class Codebook:
    """The 256 numbers that represent values relative to their block's scale.

    This class searches for the nearest number itself, because bitsandbytes'
    kernels do not always find it. With 0.50.2 about one in ten unsigned codes is
    wrong on the CPU, small ones by many steps, and on CUDA a NaN becomes a
    number. bitsandbytes only dequantizes.

    Arguments
    ---------
    signed : bool
        True for numbers from -0.993 to 1, False for 0 to 1 with twice the
        resolution.
    device : torch.device
        Device of the tensors.

    Example
    -------
    >>> codebook = Codebook(signed=True, device=torch.device("cpu"))
    >>> packed = codebook.quantize(torch.tensor([1.0, 0.0, 0.1, -4.0]))
    >>> packed.codes.dtype, packed.scales
    (torch.uint8, tensor([-4.]))
    >>> codebook.dequantize(packed)
    tensor([ 0.9906, -0.0000,  0.1019, -4.0000])
    """

    def __init__(self, signed: bool, device: torch.device):
        # Whatever torch.set_default_dtype says.
        values = torch.tensor(VALUES[signed], dtype=torch.float32)
        middles = (values[1:] + values[:-1]) / 2
        self.signed = signed
        self.values = values.to(device)
        # Sign, exponent and 7 bits of the mantissa leave at most two candidates.
        # A table gives the lower one; one comparison decides between them.
        high_bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32)
        ends = torch.stack([high_bits << 16, (high_bits << 16) | 0xFFFF])
        lowest = ends.view(torch.float32).amin(0)
        self.lower = torch.bucketize(lowest, middles).to(
            device=device, dtype=torch.uint8
        )
        self.middles = torch.cat([middles, middles.new_tensor([torch.inf])])
        self.middles = self.middles.to(device)
        # The same for the code below a value, the next one and the gap to it.
        self.below = torch.bucketize(lowest, values[1:], right=True).to(
            device=device, dtype=torch.uint8
        )
        following = torch.cat([values[1:], values.new_tensor([torch.inf])])
        self.following = following.to(device)
        self.gaps = values.diff(append=values[-1:]).to(device)
        columns = torch.arange(BLOCK, dtype=torch.float64) * R2[0]
        self.columns = columns.frac().float().to(device)

    def quantize(self, x: torch.Tensor) -> Quantized8bit:
        """Rounds each value to the nearest number with a code.

        Arguments
        ---------
        x : torch.Tensor
            Any shape and floating-point dtype; the arithmetic is float32.
            Values must not be negative if the codebook is unsigned.

        Returns
        -------
        Quantized8bit
            Codes and scales. In an unsigned codebook no value becomes 0: the
            smallest is 3e-7 of its block's scale.

        Raises
        ------
        ValueError
            If there are at least 2^31 values.
        """
        packed = Quantized8bit.empty_like(x)
        self.quantize_into(packed, x)
        return packed

    def quantize_into(
        self,
        packed: Quantized8bit,
        x: torch.Tensor,
        phase: torch.Tensor | None = None,
    ) -> None:
        """Replaces codes and scales by those of other values.

        Arguments
        ---------
        packed : Quantized8bit
            Is written to; its tensors are contiguous.
        x : torch.Tensor
            The values; see ``quantize``. As many as there are codes.
        phase : torch.Tensor, optional
            Scalar of ``dither_phase``: rounds up or down so that the mean over
            many steps is right, instead of to the nearest number.
        """
        flat = x.detach().to(torch.float32).reshape(-1)
        codes = packed.codes.view(-1)
        if phase is None and flat.numel() and runs_fused(flat):
            from sb_memeff.ops.triton.blocks_8bit import quantize

            quantize(flat, codes, packed.scales, self.middles, self.signed)
            return
        _block_scales(flat, packed.scales)
        self._search(flat, packed.scales, codes, phase)
        if not self.signed:
            # Adam divides by the root of the second moment.
            codes.clamp_(min=1)

    def requantize(
        self, x: torch.Tensor, scales: torch.Tensor
    ) -> Quantized8bit:
        """Recovers the codes of dequantized values.

        Arguments
        ---------
        x : torch.Tensor
            Result of ``dequantize``.
        scales : torch.Tensor
            The original scales. (Those of bitsandbytes and of earlier versions
            cannot be recovered from the values if the extreme is negative.)

        Returns
        -------
        Quantized8bit
            The argument of ``dequantize``, bit for bit.
        """
        flat = x.detach().to(torch.float32).reshape(-1)
        # A copy, because the caller may change its tensor.
        scales = scales.to(flat.device, torch.float32, copy=True)
        codes = torch.empty_like(flat, dtype=torch.uint8)
        self._search(flat, scales, codes)
        if not self.signed:
            # The least code of quantize(). bitsandbytes' 0 stays in other blocks.
            is_zero = (scales == 0).repeat_interleave(BLOCK)[: len(codes)]
            codes.masked_fill_(is_zero, 1)
        return Quantized8bit(codes.view(x.shape), scales)

    def dequantize(self, packed: Quantized8bit) -> torch.Tensor:
        """Restores the values.

        Arguments
        ---------
        packed : Quantized8bit
            As returned by ``quantize``.

        Returns
        -------
        torch.Tensor
            float32, contiguous, of the shape of the codes.
        """
        return torch.ops.bitsandbytes.dequantize_blockwise(
            packed.codes, packed.scales, self.values, BLOCK, torch.float32
        )

    def dither(self, phase: torch.Tensor) -> torch.Tensor:
        """Returns the random numbers of a block's values.

        Arguments
        ---------
        phase : torch.Tensor
            Scalar of ``dither_phase``.

        Returns
        -------
        torch.Tensor
            [256], from 0 to 1.
        """
        return (self.columns + phase) % 1

    def _search(
        self,
        flat: torch.Tensor,
        scales: torch.Tensor,
        codes: torch.Tensor,
        phase: torch.Tensor | None = None,
    ) -> None:
        for start in range(0, flat.numel(), SLICE):
            part = flat[start : start + SLICE]
            found = codes[start : start + SLICE]
            first = start // BLOCK
            scale = scales[first : first + -(-part.numel() // BLOCK)]
            # A block of zeros has no scale.
            scale = torch.where(scale == 0, 1, scale)
            scaled = torch.empty_like(part)
            blocks = _in_blocks(part)
            for block, of_block, out in zip(
                blocks, scale.split([*map(len, blocks)]), _in_blocks(scaled)
            ):
                torch.div(block, of_block[:, None], out=out)
            high_bits = (scaled.view(torch.int32) >> 16).add_(1 << 15)
            if phase is None:
                code = self.lower.index_select(0, high_bits)
                limit = self.middles.index_select(0, code.to(torch.int32))
            else:
                code = self.below.index_select(0, high_bits)
                limit = self.following.index_select(0, code.to(torch.int32))
                code += scaled >= limit
                index = code.to(torch.int32)
                limit = self.values.index_select(0, index)
                dither = self.dither(phase)
                limit.addcmul_(
                    self.gaps.index_select(0, index),
                    dither.repeat(len(scale))[: part.numel()],
                )
            torch.add(code, (scaled > limit).view(torch.uint8), out=found)


def _in_blocks(flat: torch.Tensor) -> list[torch.Tensor]:
    """[blocks, 256]; and [1, values] if a shorter block is left."""
    whole = flat.numel() // BLOCK * BLOCK
    parts = [flat[:whole].view(-1, BLOCK)]
    if whole < flat.numel():
        parts.append(flat[whole:].view(1, -1))
    return parts


def _block_scales(flat: torch.Tensor, scales: torch.Tensor) -> None:
    blocks = _in_blocks(flat)
    for block, found in zip(blocks, scales.split([*map(len, blocks)])):
        _extremes(block, found)


def _extremes(blocks: torch.Tensor, scales: torch.Tensor) -> None:
    """Values of largest magnitude; NaN if there is one."""
    # torch.aminmax along a dimension is not vectorized.
    lowest, highest = blocks.amin(1), blocks.amax(1)
    torch.where(highest >= -lowest, highest, lowest, out=scales)
