"""Additive angular margin whose size changes during training, and sub-centres.

Authors
 * The sb_memeff authors 2026
"""

import math

import torch
import torch.nn.functional as F
from speechbrain.nnet.losses import AdditiveAngularMargin
from torch import nn

from sb_memeff.utils.settings import check_switches

__all__ = ["InterTopKMargin", "MarginSchedule", "SubCenterClassifier"]


class InterTopKMargin(AdditiveAngularMargin):
    """SpeechBrain's AdditiveAngularMargin, with a margin that can be set.

    Optionally it also raises the scores of the k_top nearest wrong speakers
    (Zhao et al., "Multi-Query Multi-Head Attention Pooling and Inter-TopK
    Penalty for Speaker Verification", 2022).

    Arguments
    ---------
    margin : float
        The largest margin, in radians.
    scale : float
        Factor of the cosines.
    easy_margin : bool
        As in AdditiveAngularMargin.
    k_top : int
        Number of wrong speakers to penalise.
    k_top_margin : float
        Angle by which they come nearer at the largest margin. It shrinks in
        proportion to the margin.

    Example
    -------
    >>> loss = InterTopKMargin(margin=0.2, scale=1.0, k_top=1)
    >>> cosines = torch.tensor([[0.5, 0.4, 0.3]])
    >>> loss(cosines, torch.tensor([[1.0, 0.0, 0.0]]))
    tensor([[0.3180, 0.4542, 0.3000]])
    >>> loss.set_margin(0.0)
    >>> loss(cosines, torch.tensor([[1.0, 0.0, 0.0]]))
    tensor([[0.5000, 0.4000, 0.3000]])
    """

    def __init__(
        self,
        margin: float = 0.2,
        scale: float = 30.0,
        easy_margin: bool = False,
        k_top: int = 0,
        k_top_margin: float = 0.06,
    ):
        check_switches(easy_margin=easy_margin)
        super().__init__(margin, scale, easy_margin)
        self.largest_margin = margin
        self.k_top = k_top
        self.k_top_margin = k_top_margin

    def set_margin(self, margin: float) -> None:
        """Changes the margin.

        Arguments
        ---------
        margin : float
            In radians.
        """
        # SpeechBrain's constructor computes what its forward reads.
        other = AdditiveAngularMargin(margin)
        for name in ("margin", "cos_m", "sin_m", "th", "mm"):
            setattr(self, name, getattr(other, name))

    def forward(
        self, outputs: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        """Applies the margins.

        Arguments
        ---------
        outputs : torch.Tensor
            Cosines [N, C].
        targets : torch.Tensor
            One-hot [N, C].

        Returns
        -------
        torch.Tensor
            Scaled scores [N, C].
        """
        scores = super().forward(outputs, targets)
        if not self.k_top or not self.margin:
            return scores
        nearest = (outputs - 2 * targets).topk(self.k_top, dim=1).indices
        cosine = outputs.float().gather(1, nearest)
        cosine = cosine.clamp(-1 + 1e-7, 1 - 1e-7)
        angle = self.k_top_margin * self.margin / self.largest_margin
        # The cosine of the smaller angle.
        nearer = cosine * math.cos(angle)
        nearer = nearer + (1 - cosine**2).sqrt() * math.sin(angle)
        return scores.scatter(1, nearest, self.scale * nearer)


class MarginSchedule:
    """The margin as a function of the optimizer step.

    It is constant, rises exponentially between two steps, as in WeSpeaker, and
    is constant again. Fast at first, the rise slows down.

    Arguments
    ---------
    loss_fn : InterTopKMargin
        The loss whose margin it sets.
    initial_margin : float
        Margin at first.
    final_margin : float
        Margin at the end.
    start_step : int
        Step at which the rise begins.
    end_step : int
        Step from which on the margin is final_margin.

    Example
    -------
    >>> loss_fn = InterTopKMargin()
    >>> schedule = MarginSchedule(loss_fn, 0.0, 0.2, start_step=10, end_step=20)
    >>> for step in (10, 15, 20):
    ...     schedule(step)
    ...     print(f"{loss_fn.margin:.3f}")
    0.000
    0.194
    0.200
    """

    def __init__(
        self,
        loss_fn: InterTopKMargin,
        initial_margin: float,
        final_margin: float,
        start_step: int,
        end_step: int,
    ):
        self.loss_fn = loss_fn
        self.initial_margin = initial_margin
        self.final_margin = final_margin
        self.start_step = start_step
        self.end_step = end_step

    def __call__(self, step: int) -> None:
        """Sets the margin.

        Arguments
        ---------
        step : int
            Optimizer steps that are done.
        """
        if step >= self.end_step:
            margin = self.final_margin
        else:
            length = self.end_step - self.start_step
            done = max(step - self.start_step, 0) / length
            rise = self.final_margin - self.initial_margin
            margin = self.initial_margin + rise * (1 - 0.001**done)
        self.loss_fn.set_margin(margin)


class SubCenterClassifier(nn.Module):
    """Cosines between embeddings and speakers with several centres each.

    A speaker's score is that of the nearest centre (Deng et al., "Sub-center
    ArcFace", 2020): recordings with a wrong label gather at a centre of their
    own. With one centre it is SpeechBrain's
    ``lobes.models.ECAPA_TDNN.Classifier`` and has its weights.

    Arguments
    ---------
    input_size : int
        Size of an embedding.
    out_neurons : int
        Number of speakers.
    sub_centers : int
        Centres of each speaker.

    Example
    -------
    >>> classifier = SubCenterClassifier(8, out_neurons=5, sub_centers=3)
    >>> classifier(torch.rand(2, 8)).shape
    torch.Size([2, 1, 5])
    """

    def __init__(
        self, input_size: int, out_neurons: int = 1211, sub_centers: int = 1
    ):
        super().__init__()
        self.sub_centers = sub_centers
        # A speaker's centres are neighbours.
        self.weight = nn.Parameter(
            torch.empty(out_neurons * sub_centers, input_size)
        )
        nn.init.xavier_uniform_(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Computes the cosines.

        Arguments
        ---------
        x : torch.Tensor
            Embeddings [N, input_size] or [N, 1, input_size].

        Returns
        -------
        torch.Tensor
            [N, 1, out_neurons].
        """
        x = F.linear(F.normalize(x.squeeze(1)), F.normalize(self.weight))
        if self.sub_centers > 1:
            x = x.unflatten(1, (-1, self.sub_centers)).max(2).values
        return x.unsqueeze(1)
