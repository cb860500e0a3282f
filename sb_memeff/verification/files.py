"""Embeddings and scores of audio files, with a pretrained model of SpeechBrain.

Authors
 * The sb_memeff authors 2026
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch

from sb_memeff.verification.scoring import (
    CohortStatistics,
    cosine_scores,
    normalize_scores,
)

if TYPE_CHECKING:
    from speechbrain.inference.classifiers import EncoderClassifier

__all__ = ["embed_files", "score_files"]


@torch.inference_mode()
def embed_files(
    model: "EncoderClassifier", files: Iterable[str]
) -> torch.Tensor:
    """Computes the embeddings of files.

    Arguments
    ---------
    model : EncoderClassifier
        SpeechBrain's ``SpeakerRecognition`` or ``EncoderClassifier``.
    files : iterable of str
        Audio files, of any sample rate.

    Returns
    -------
    torch.Tensor
        [files, dimensions], on the CPU.

    Example
    -------
    >>> from speechbrain.inference.speaker import SpeakerRecognition
    >>> model = SpeakerRecognition.from_hparams("my_model")  # doctest: +SKIP
    >>> embed_files(model, ["a.wav", "b.wav"]).shape  # doctest: +SKIP
    torch.Size([2, 256])
    """
    return torch.cat(
        [
            model.encode_batch(model.load_audio(str(file))[None])
            .reshape(1, -1)
            .float()
            .cpu()
            for file in files
        ]
    )


def score_files(
    model: "EncoderClassifier",
    trials: Sequence[tuple[str, str]],
    cohort: torch.Tensor | None = None,
    cohort_size: int | None = 300,
) -> torch.Tensor:
    """Computes the score of each pair of files. Embeds each file once.

    Arguments
    ---------
    model : EncoderClassifier
        As in ``embed_files``.
    trials : list of tuple
        Pairs of files.
    cohort : torch.Tensor, optional
        Embeddings of other speakers [impostors, dimensions], such as those of
        ``embed_files``; ``speaker_means`` gives one for each speaker. Scores are
        then normalized (AS-Norm).
    cohort_size : int, optional
        Number of nearest impostors; None for all.

    Returns
    -------
    torch.Tensor
        [trials]; cosines without a cohort.

    Example
    -------
    >>> from speechbrain.inference.speaker import SpeakerRecognition
    >>> model = SpeakerRecognition.from_hparams("my_model")  # doctest: +SKIP
    >>> cohort = embed_files(model, ["c.wav", "d.wav"])  # doctest: +SKIP
    >>> score_files(model, [("a.wav", "b.wav")], cohort)  # doctest: +SKIP
    tensor([5.1])
    """
    files = list(dict.fromkeys(file for trial in trials for file in trial))
    embeddings = embed_files(model, files)
    rows = {file: row for row, file in enumerate(files)}
    enrol, test = torch.tensor([[rows[a], rows[b]] for a, b in trials]).T
    scores = cosine_scores(embeddings, enrol, test)
    if cohort is None:
        return scores
    statistics = CohortStatistics.of(embeddings, cohort, cohort_size)
    return normalize_scores(scores, enrol, test, statistics)
