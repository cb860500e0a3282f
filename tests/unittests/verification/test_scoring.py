"""Scores of trials and their normalization.

Authors
 * The sb_memeff authors 2026
"""

import pytest
import torch
from torch.nn.functional import cosine_similarity, normalize

from sb_memeff.verification import scoring
from sb_memeff.verification.scoring import (
    SCORE_NORMS,
    CohortStatistics,
    cosine_scores,
    normalize_scores,
    speaker_means,
)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks, the last incomplete."""
    monkeypatch.setattr(scoring, "ROWS", 4)
    monkeypatch.setattr(scoring, "TRIALS", 2)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("cohort_size", [7, None, 1000])
def test_score_norm_is_that_of_a_loop(cohort_size, own):
    torch.manual_seed(0)
    embeddings, cohort = torch.randn(6, 8), torch.randn(20, 8)
    speakers = torch.tensor([3, 0, 3, 19, 7, 8]) if own else None
    if own:
        # The own speaker is near, so that it would count.
        embeddings += 3 * cohort[speakers]
    enrol, test = torch.tensor([0, 1, 2, 5, 4]), torch.tensor([3, 4, 5, 0, 4])
    statistics = CohortStatistics.of(embeddings, cohort, cohort_size, speakers)
    scores = cosine_scores(embeddings, enrol, test)
    for norm in SCORE_NORMS:
        found = normalize_scores(scores, enrol, test, statistics, norm)
        for n in range(5):
            rows = int(enrol[n]), int(test[n])
            score = cosine_similarity(*embeddings[[*rows]], dim=0)
            parts = []
            for row in rows:
                impostors = cosine_similarity(embeddings[row], cohort)
                if own:
                    others = torch.arange(20) != speakers[row]
                    impostors = impostors[others]
                best = impostors.sort().values[-(cohort_size or 20) :]
                parts.append((score - best.mean()) / best.std())
            expected = {
                "z-norm": parts[0],
                "t-norm": parts[1],
                "s-norm": sum(parts) / 2,
            }[norm]
            assert scores[n] == pytest.approx(score.item(), rel=1e-4)
            assert found[n] == pytest.approx(expected.item(), rel=1e-3)


def test_speaker_means_are_those_of_a_loop():
    torch.manual_seed(0)
    embeddings = torch.randn(9, 4)
    speakers = torch.tensor([2, 0, 1, 2, 2, 0, 1, 1, 2])
    for number, mean in enumerate(speaker_means(embeddings, speakers)):
        own = normalize(embeddings[speakers == number], dim=1)
        torch.testing.assert_close(mean, own.mean(0))
