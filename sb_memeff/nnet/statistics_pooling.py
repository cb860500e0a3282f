"""Pooling over time.

Authors
 * The sb_memeff authors 2026
"""

import torch
from torch import nn

from sb_memeff.nnet.padding import mask

__all__ = ["TemporalStatisticsPooling"]


class TemporalStatisticsPooling(nn.Module):
    """Mean and standard deviation over time of every channel and band.

    WeSpeaker calls this TSTP. Padded frames do not count, whatever their
    values.

    Arguments
    ---------
    eps : float
        Added to the variance, so that constant channels have a gradient.
    correction : int
        Subtracted from the number of frames in the variance; 1 makes it
        unbiased.

    Example
    -------
    >>> pooling = TemporalStatisticsPooling()
    >>> pooling(torch.rand(2, 16, 50, 10)).shape
    torch.Size([2, 320])
    """

    def __init__(self, eps: float = 1e-7, correction: int = 0):
        super().__init__()
        self.eps = eps
        self.correction = correction

    def forward(
        self, x: torch.Tensor, padding: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Computes the statistics.

        Arguments
        ---------
        x : torch.Tensor
            [N, C, T, F].
        padding : torch.Tensor, optional
            [N, 1, T, 1], True where a frame is padding.

        Returns
        -------
        torch.Tensor
            [N, 2 * C * F]: all means, then all standard deviations.
        """
        # Sums over hundreds of frames need more than the 8 bits of bf16.
        x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        if padding is None:
            var, mean = torch.var_mean(x, dim=2, correction=self.correction)
        else:
            # masked_fill instead of a product, because 0 * NaN is NaN.
            count = (~padding).sum(dim=2)
            mean = x.masked_fill(padding, 0.0).sum(dim=2) / count
            centred = mask(x - mean.unsqueeze(2), padding)
            var = centred.square().sum(dim=2) / (count - self.correction)
        std = (var + self.eps).sqrt()
        return torch.cat((mean.flatten(1), std.flatten(1)), dim=1)
