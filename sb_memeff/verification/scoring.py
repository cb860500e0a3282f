"""Scores of trials, and their normalization with a cohort.

Authors
 * The sb_memeff authors 2026
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

__all__ = [
    "SCORE_NORMS",
    "CohortStatistics",
    "cosine_scores",
    "normalize_scores",
    "speaker_means",
]

SCORE_NORMS = ("z-norm", "t-norm", "s-norm")
# Trials, and rows of the product with the cohort, computed at a time. They bound
# the memory.
TRIALS = 16384
ROWS = 1024


def cosine_scores(
    embeddings: torch.Tensor, enrol: torch.Tensor, test: torch.Tensor
) -> torch.Tensor:
    """Computes the cosine of each trial.

    Arguments
    ---------
    embeddings : torch.Tensor
        [utterances, dimensions].
    enrol : torch.Tensor
        Row of each trial's first utterance.
    test : torch.Tensor
        Row of its second.

    Returns
    -------
    torch.Tensor
        [trials].

    Example
    -------
    >>> embeddings = torch.tensor([[2.0, 0.0], [3.0, 4.0]])
    >>> cosine_scores(embeddings, torch.tensor([0]), torch.tensor([1]))
    tensor([0.6000])
    """
    embeddings = F.normalize(embeddings, dim=1)
    return torch.cat(
        [
            torch.einsum("nd,nd->n", embeddings[a], embeddings[b])
            for a, b in zip(enrol.split(TRIALS), test.split(TRIALS))
        ]
    )


def speaker_means(
    embeddings: torch.Tensor, speakers: torch.Tensor
) -> torch.Tensor:
    """Mean of each speaker's embeddings of norm 1.

    Arguments
    ---------
    embeddings : torch.Tensor
        [utterances, dimensions].
    speakers : torch.Tensor
        Number of each utterance's speaker, from 0, without gaps.

    Returns
    -------
    torch.Tensor
        [speakers, dimensions].

    Example
    -------
    >>> embeddings = torch.tensor([[2.0, 0.0], [0.0, 5.0], [0.0, 3.0]])
    >>> speaker_means(embeddings, torch.tensor([0, 0, 1]))
    tensor([[0.5000, 0.5000],
            [0.0000, 1.0000]])
    """
    embeddings = F.normalize(embeddings, dim=1)
    counts = torch.bincount(speakers)
    sums = embeddings.new_zeros(len(counts), embeddings.shape[1])
    return sums.index_add_(0, speakers, embeddings) / counts[:, None]


@dataclass
class CohortStatistics:
    """Mean and deviation of each embedding's scores against a cohort.

    Arguments
    ---------
    mean : torch.Tensor
        [utterances].
    deviation : torch.Tensor
        [utterances].
    """

    mean: torch.Tensor
    deviation: torch.Tensor

    @classmethod
    def of(
        cls,
        embeddings: torch.Tensor,
        cohort: torch.Tensor,
        cohort_size: int | None = None,
        own: torch.Tensor | None = None,
    ) -> "CohortStatistics":
        """Computes them.

        Arguments
        ---------
        embeddings : torch.Tensor
            [utterances, dimensions].
        cohort : torch.Tensor
            Embeddings of impostors, [impostors, dimensions].
        cohort_size : int, optional
            Number of highest scores to use (adaptive normalization). By
            default all.
        own : torch.Tensor, optional
            For utterances of the cohort's own speakers: the row of each
            utterance's speaker in the cohort, which is no impostor to it.

        Returns
        -------
        CohortStatistics
            Of float32.
        """
        embeddings = F.normalize(embeddings, dim=1)
        cohort = F.normalize(cohort, dim=1).T.contiguous()
        impostors = cohort.shape[1] - (own is not None)
        size = min(cohort_size or impostors, impostors)
        means, deviations = [], []
        for start in range(0, len(embeddings), ROWS):
            rows = slice(start, start + ROWS)
            scores = embeddings[rows] @ cohort
            if own is not None:
                scores.scatter_(1, own[rows, None], -torch.inf)
            if size < scores.shape[1]:
                scores = scores.topk(size, dim=1, sorted=False).values
            means.append(scores.mean(1))
            deviations.append(scores.std(1))
        return cls(torch.cat(means), torch.cat(deviations))


def normalize_scores(
    scores: torch.Tensor,
    enrol: torch.Tensor,
    test: torch.Tensor,
    statistics: CohortStatistics,
    score_norm: str = "s-norm",
) -> torch.Tensor:
    """Normalizes the scores of all trials.

    Arguments
    ---------
    scores : torch.Tensor
        [trials].
    enrol : torch.Tensor
        Row of each trial's first utterance.
    test : torch.Tensor
        Row of its second.
    statistics : CohortStatistics
        Of all utterances.
    score_norm : str
        z-norm, t-norm or s-norm. With a cohort_size, s-norm is AS-Norm.

    Returns
    -------
    torch.Tensor
        [trials].
    """
    z, t = (
        (scores - statistics.mean[side]) / statistics.deviation[side]
        for side in (enrol, test)
    )
    return {"z-norm": z, "t-norm": t, "s-norm": (z + t) / 2}[score_norm]
