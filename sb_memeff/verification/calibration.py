"""Calibration of scores with quality measures of the utterances (QMF).

Thienpondt, Desplanques, Demuynck, "The IDLab VoxSRC-20 Submission: Large Margin
Fine-Tuning and Quality-Aware Score Calibration in DNN Based Speaker
Verification" (2021).

Authors
 * The sb_memeff authors 2026
"""

from typing import Any

import torch

__all__ = [
    "Calibration",
    "calibration_trials",
    "check_scikit_learn",
    "quality_measures",
]


def check_scikit_learn() -> None:
    """Checks that scikit-learn is installed.

    Raises
    ------
    ImportError
        If it is not; the message names the command.
    """
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "Calibration needs scikit-learn: pip install "
            "'sb_memeff[calibration]'."
        ) from error


def calibration_trials(
    speakers: torch.Tensor, number: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draws trials, half of them with one speaker.

    Arguments
    ---------
    speakers : torch.Tensor
        Number of each utterance's speaker, from 0, without gaps.
    number : int
        Number of trials.
    seed : int
        Seed of the draw.

    Returns
    -------
    tuple of torch.Tensor
        Label, row of the first and of the second utterance, [number] each.

    Raises
    ------
    ValueError
        If there are not two speakers, one with two utterances.

    Example
    -------
    >>> speakers = torch.tensor([0, 1, 1])
    >>> labels, enrol, test = calibration_trials(speakers, 100, seed=0)
    >>> bool((labels == (speakers[enrol] == speakers[test])).all())
    True
    """
    generator = torch.Generator().manual_seed(seed)
    # Utterances speaker by speaker, and where each speaker's begin.
    order = speakers.argsort(stable=True)
    counts = torch.bincount(speakers)
    starts = counts.cumsum(0) - counts

    def draw(limits: torch.Tensor) -> torch.Tensor:
        """Numbers below limits."""
        share = torch.rand(
            len(limits), generator=generator, dtype=torch.float64
        )
        return (share * limits).long()

    repeated = (counts > 1).nonzero()[:, 0]
    if len(counts) < 2 or not len(repeated):
        raise ValueError(
            f"{len(speakers)} utterances of {len(counts)} training speakers are "
            f"too few for trials: raise n_train_snts or set "
            f"calibration_trials to 0."
        )
    one = number // 2
    speaker = repeated[draw(torch.full((one,), len(repeated)))]
    first = draw(counts[speaker])
    # Another utterance of the same speaker.
    second = (first + 1 + draw(counts[speaker] - 1)) % counts[speaker]
    positive = starts[speaker] + first, starts[speaker] + second

    two = number - one
    a = draw(torch.full((two,), len(counts)))
    b = (a + 1 + draw(torch.full((two,), len(counts) - 1))) % len(counts)
    negative = starts[a] + draw(counts[a]), starts[b] + draw(counts[b])
    enrol, test = (order[torch.cat(pair)] for pair in zip(positive, negative))
    labels = torch.cat([torch.ones(one), torch.zeros(two)]).long()
    return labels, enrol, test


def quality_measures(
    scores: torch.Tensor,
    enrol: torch.Tensor,
    test: torch.Tensor,
    seconds: torch.Tensor,
    magnitudes: torch.Tensor,
    cohort_means: torch.Tensor,
) -> torch.Tensor:
    """The inputs of a calibration.

    They do not depend on which utterance of a trial is the first.

    Arguments
    ---------
    scores : torch.Tensor
        Normalized score of each trial.
    enrol : torch.Tensor
        Row of each trial's first utterance.
    test : torch.Tensor
        Row of its second.
    seconds : torch.Tensor
        Duration of each utterance.
    magnitudes : torch.Tensor
        Norm of each embedding.
    cohort_means : torch.Tensor
        Mean score of each utterance against the cohort.

    Returns
    -------
    torch.Tensor
        [trials, 7] in float64: the score, then the lower and the higher log
        duration, magnitude and cohort mean of both utterances.
    """
    columns = [scores]
    for measure in (seconds.log(), magnitudes, cohort_means):
        a, b = measure[enrol], measure[test]
        columns += [torch.minimum(a, b), torch.maximum(a, b)]
    return torch.stack([column.double() for column in columns], 1)


class Calibration:
    """Maps quality measures to log likelihood ratios.

    Logistic regression on standardised measures; both kinds of trials weigh the
    same, so that its log odds are log likelihood ratios.

    Arguments
    ---------
    measures : torch.Tensor
        Result of ``quality_measures`` for calibration trials.
    labels : torch.Tensor
        1 for one speaker, 0 for two.

    Raises
    ------
    ImportError
        If scikit-learn is not installed.

    Example
    -------
    >>> measures = torch.tensor([[-1.0], [2.0], [1.0], [-2.0], [-3.0]])
    >>> calibrate = Calibration(measures, torch.tensor([1, 1, 1, 0, 0]))
    >>> bool(calibrate(measures)[1] > 0)
    True
    """

    def __init__(self, measures: torch.Tensor, labels: torch.Tensor):
        check_scikit_learn()
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        self.model: Any = make_pipeline(
            StandardScaler(),
            LogisticRegression(class_weight="balanced", max_iter=1000),
        )
        self.model.fit(measures.numpy(), labels.numpy())

    def __call__(self, measures: torch.Tensor) -> torch.Tensor:
        """Computes the log likelihood ratio of each trial.

        Arguments
        ---------
        measures : torch.Tensor
            [trials, measures].

        Returns
        -------
        torch.Tensor
            [trials].
        """
        return torch.from_numpy(self.model.decision_function(measures.numpy()))
