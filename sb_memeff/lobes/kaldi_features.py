"""Kaldi's log mel filterbanks, which WeSpeaker's networks were trained on.

Authors
 * The sb_memeff authors 2026
"""

import torch
from torchaudio.compliance import kaldi

__all__ = ["KaldiFbank"]


class KaldiFbank(torch.nn.Module):
    """Log mel filterbanks of Kaldi, called like SpeechBrain's Fbank.

    Windows of 25 ms every 10 ms; a window has to fit into the utterance.

    Arguments
    ---------
    sample_rate : int
        Samples per second.
    n_mels : int
        Number of bands.

    Example
    -------
    >>> KaldiFbank()(torch.rand(2, 16000)).shape
    torch.Size([2, 98, 80])
    """

    def __init__(self, sample_rate: int = 16000, n_mels: int = 80):
        super().__init__()
        self.sample_rate = sample_rate
        self.n_mels = n_mels

    def forward(self, wav: torch.Tensor) -> torch.Tensor:
        """Computes the features.

        Arguments
        ---------
        wav : torch.Tensor
            Waveforms [N, samples], from -1 to 1.

        Returns
        -------
        torch.Tensor
            [N, T, n_mels].
        """
        # Kaldi's samples are 16-bit integers, and it takes one utterance.
        features = [
            kaldi.fbank(
                one[None] * 2**15,
                num_mel_bins=self.n_mels,
                sample_frequency=float(self.sample_rate),
                window_type="hamming",
            )
            for one in wav
        ]
        return torch.stack(features)
