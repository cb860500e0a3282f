"""Tensors kept in 8 bits: block-wise dynamic-tree quantization.

A tensor is cut into blocks of 256 values. Of each block the largest magnitude
is kept in float32, and of each value an 8-bit code: the nearest of 256 numbers
between -1 and 1 (or 0 and 1) that lie the closer the smaller they are, so that
a value keeps one to two digits over seven orders of magnitude.

Source: Dettmers et al., 8-bit Optimizers via Block-wise Quantization
(arXiv 2110.02861), sections 2.1 and 2.2; the 256 numbers are bitsandbytes'.

Authors
 * The sb_memeff authors 2026
"""

import logging
from dataclasses import dataclass

import torch

from sb_memeff.ops.dispatch import runs_fused

# bitsandbytes warns at import that a 4-bit kernel, which nobody calls here,
# is missing.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
import bitsandbytes.functional as bnb  # noqa: E402

__all__ = ["BLOCK", "Codebook", "Quantized8bit"]

BLOCK = 256
# Values that are looked up at a time on the CPU: they stay in its cache.
SLICE = 1 << 16
# Signed or not. As numbers, so that a codebook can be made of fake tensors.
VALUES = {
    signed: bnb.create_dynamic_map(signed=signed).tolist()
    for signed in (True, False)
}


@dataclass
class Quantized8bit:
    """A tensor in 8 bits.

    Arguments
    ---------
    codes : torch.Tensor
        Numbers of the values in the codebook, uint8, in the tensor's shape.
    absmax : torch.Tensor
        Largest magnitude of each block of 256 values (counted in the order of
        a contiguous tensor), float32.
    """

    codes: torch.Tensor
    absmax: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return self.codes.nbytes + self.absmax.nbytes


class Codebook:
    """The 256 numbers that an 8-bit value can be, times its block's maximum.

    The search for the nearest number is here. bitsandbytes' kernels do not
    find it everywhere: on the CPU about one in ten of the unsigned codes is
    off, small ones by many places, and on CUDA a NaN becomes a number (seen
    with 0.50.2). It looks the numbers up.

    Arguments
    ---------
    signed : bool
        Numbers from -0.993 to 1, or from 0 to 1 with twice the resolution.
    device : torch.device
        Where the tensors are.

    Example
    -------
    >>> codebook = Codebook(signed=True, device=torch.device("cpu"))
    >>> packed = codebook.quantize(torch.tensor([-1.0, 0.0, 0.1, 4.0]))
    >>> packed.codes.dtype, packed.absmax
    (torch.uint8, tensor([4.]))
    >>> codebook.dequantize(packed)
    tensor([-0.9906,  0.0000,  0.1019,  4.0000])
    """

    def __init__(self, signed: bool, device: torch.device):
        values = torch.tensor(VALUES[signed])
        middles = (values[1:] + values[:-1]) / 2
        self.signed = signed
        self.values = values.to(device)
        # Sign, exponent and 7 bits of the mantissa leave two neighbours at
        # most: the lower one is looked up, one comparison finds the nearer.
        high_bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32)
        ends = torch.stack([high_bits << 16, (high_bits << 16) | 0xFFFF])
        lowest = ends.view(torch.float32).amin(0)
        self._lower = torch.bucketize(lowest, middles).to(
            device=device, dtype=torch.uint8
        )
        self.middles = torch.cat([middles, middles.new_tensor([torch.inf])])
        self.middles = self.middles.to(device)

    def quantize(self, x: torch.Tensor) -> Quantized8bit:
        """Rounds each value to the nearest one that has a code.

        Arguments
        ---------
        x : torch.Tensor
            Of any shape, floating point; the arithmetic is float32. Values
            must not be negative if the codebook is not signed.

        Returns
        -------
        Quantized8bit
            Codes and maxima. Of an unsigned tensor no positive value becomes
            0: it is at least 3e-7 of its block's maximum.

        Raises
        ------
        ValueError
            If there are 2^31 values or more.
        """
        if x.numel() >= 1 << 31:
            raise ValueError(
                f"A tensor of {x.numel()} values cannot be kept in 8 bits: "
                "the limit is 2^31. Keep its states in 32 bits."
            )
        flat = x.detach().to(torch.float32).reshape(-1)
        if flat.numel() and runs_fused(flat):
            from sb_memeff.ops.triton.blocks_8bit import quantize

            codes, absmax = quantize(flat, self.middles, self.signed)
        else:
            absmax = _block_maxima(flat)
            codes = self._nearest(flat, absmax)
            if not self.signed:
                # Adam divides by the root of its second moment.
                codes.clamp_(min=1)
        return Quantized8bit(codes.view(x.shape), absmax)

    def requantize(
        self, x: torch.Tensor, absmax: torch.Tensor
    ) -> Quantized8bit:
        """Finds the codes of values that were in 8 bits before.

        Arguments
        ---------
        x : torch.Tensor
            What ``dequantize`` returned.
        absmax : torch.Tensor
            The maxima that it had. (The negative maximum of a block has no
            code, so they cannot be told from the values.)

        Returns
        -------
        Quantized8bit
            What had been given to ``dequantize``, bit for bit.
        """
        flat = x.detach().to(torch.float32).reshape(-1)
        # Nobody who changes the one given shall change this one.
        absmax = absmax.to(flat.device, torch.float32, copy=True)
        return Quantized8bit(self._nearest(flat, absmax).view(x.shape), absmax)

    def dequantize(self, packed: Quantized8bit) -> torch.Tensor:
        """Restores the values.

        Arguments
        ---------
        packed : Quantized8bit
            As ``quantize`` returned it.

        Returns
        -------
        torch.Tensor
            float32, contiguous, of the shape of the codes.
        """
        return torch.ops.bitsandbytes.dequantize_blockwise(
            packed.codes, packed.absmax, self.values, BLOCK, torch.float32
        )

    def _nearest(
        self, flat: torch.Tensor, absmax: torch.Tensor
    ) -> torch.Tensor:
        codes = torch.empty_like(flat, dtype=torch.uint8)
        for start in range(0, flat.numel(), SLICE):
            part = flat[start : start + SLICE]
            first = start // BLOCK
            scale = absmax[first : first + -(-part.numel() // BLOCK)]
            # A block of zeros has nothing to be scaled by.
            scale = torch.where(scale == 0, 1, scale).repeat_interleave(
                BLOCK, output_size=scale.numel() * BLOCK
            )
            part = part / scale[: part.numel()]
            high_bits = part.view(torch.int32) >> 16
            code = self._lower.index_select(0, high_bits + (1 << 15))
            middle = self.middles.index_select(0, code.to(torch.int32))
            codes[start : start + SLICE] = code.add_(part > middle)
        return codes


def _block_maxima(flat: torch.Tensor) -> torch.Tensor:
    if not flat.numel():
        return flat
    whole = flat.numel() // BLOCK * BLOCK
    maxima = flat[:whole].view(-1, BLOCK).abs().amax(1)
    if whole < flat.numel():
        maxima = torch.cat([maxima, flat[whole:].abs().amax().view(1)])
    return maxima
