"""The gradient of encoder or predictor, in float32 for one group of samples.

Authors
 * The sb_memeff authors 2026
"""

import contextlib
from collections.abc import Generator

import torch

from sb_memeff.ops.dispatch import has_values
from sb_memeff.ops.logit_rows import scale_into_float16, wide_dtype

__all__ = ["InputGradient"]


class InputGradient:
    """Accumulates a gradient in float32, one group of samples at a time.

    For a half-precision input only the sums of the current group are float32;
    float32 sums of all samples would take three times the input's memory. A
    complete group is rounded to the input's dtype. In float16, where the loss
    scale is not known yet, each sample is scaled by a power of two that puts its
    largest magnitude between 8 and 16.

    Arguments
    ---------
    x : torch.Tensor
        [B, T, H], the input; any strides.

    Attributes
    ----------
    sum : torch.Tensor
        Within ``group``: the sums of the group's samples, contiguous, float32
        (float64 for a float64 input).

    Example
    -------
    >>> gradient = InputGradient(torch.zeros(2, 1, 3).half())
    >>> with gradient.group(range(1, 2)):
    ...     gradient.sum += 1e-6
    >>> gradient.total(torch.tensor(2.0**16))[1]
    tensor([[0.0656, 0.0656, 0.0656]], dtype=torch.float16)
    """

    def __init__(self, x: torch.Tensor):
        # Contiguous, whatever the strides of the input.
        self._total = x.new_zeros(x.shape)
        self._is_wide = x.dtype == wide_dtype(x.dtype)
        self._scales: torch.Tensor | None = None
        if x.dtype == torch.float16:
            self._scales = x.new_ones(len(x), 1, 1, dtype=torch.float32)
        self.sum: torch.Tensor

    @contextlib.contextmanager
    def group(self, samples: range) -> Generator[None, None, None]:
        """Provides ``sum`` for a group of samples within the context.

        Arguments
        ---------
        samples : range
            The group. Each sample is in one group.

        Yields
        ------
        None
        """
        chosen = slice(samples.start, samples.stop)
        part = self._total[chosen]
        if self._is_wide:
            self.sum = part
            yield
        else:
            self.sum = torch.zeros_like(part, dtype=torch.float32)
            yield
            if self._scales is not None:
                largest = torch.linalg.vector_norm(
                    self.sum, torch.inf, dim=(1, 2), keepdim=True
                )
                scale = scale_into_float16(largest)
                self._scales[chosen] = scale
                self.sum *= scale
            part.copy_(self.sum)
        del self.sum

    def total(self, scale: torch.Tensor | None = None) -> torch.Tensor:
        """The gradient of all samples, in the input's dtype. Call it once.

        Arguments
        ---------
        scale : torch.Tensor, optional
            A scalar to multiply it by.

        Returns
        -------
        torch.Tensor
            [B, T, H], contiguous.
        """
        total, self._total = self._total, torch.empty(0)
        if self._is_wide:
            return total if scale is None else total.mul_(scale.to(total.dtype))
        if self._scales is not None:
            factors = self._scales.reciprocal()
            factors = factors if scale is None else factors * scale.float()
        elif scale is not None:
            # Not a scalar: torch would round it to half precision.
            factors = scale.float().expand(len(total), 1, 1)
        else:
            return total
        if total.is_cuda or not has_values(total):
            total *= factors
        else:
            # The CPU makes float32 copies: sample by sample they are small.
            for row, factor in zip(total, factors):
                row *= factor
        return total
