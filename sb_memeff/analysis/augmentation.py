"""Computes by how much an Augmenter multiplies a batch, without building it.

Building it needs csv files of noises and impulse responses; the size of a batch
follows from the number of augmentations.

Authors
 * The sb_memeff authors 2026
"""

from collections.abc import Sequence

__all__ = ["largest_copies"]


def largest_copies(
    augmentations: int,
    enable_augmentations: Sequence[bool] | None = None,
    parallel_augment: bool = False,
    parallel_augment_fixed_bs: bool = False,
    concat_original: bool = False,
    min_augmentations: int | None = None,
    max_augmentations: int | None = None,
    repeat_augment: int = 1,
    augment_prob: float = 1.0,
    **others: object,
) -> int:
    """Computes the largest factor by which SpeechBrain's Augmenter grows a batch.

    Arguments are those of speechbrain.augment.augmenter.Augmenter. Start and
    end indices, which exclude some rows, are ignored: the result is for whole
    batches. Changes of length are ignored too (speed perturbation at 95 % makes
    audio 1/0.95 times as long).

    Arguments
    ---------
    augmentations : int
        Number of augmentations in the list.
    enable_augmentations : list of bool, optional
        Which of them are enabled.
    parallel_augment : bool
        Whether each augmentation makes a batch of its own.
    parallel_augment_fixed_bs : bool
        Whether each augmentation gets a part of the batch instead.
    concat_original : bool
        Whether the original batch comes first.
    min_augmentations : int, optional
        Minimum number of augmentations; 1 by default.
    max_augmentations : int, optional
        Maximum number; all by default.
    repeat_augment : int
        Number of repetitions.
    augment_prob : float
        Probability of augmentation.
    **others : dict
        Arguments without effect on the size.

    Returns
    -------
    int
        Rows of the largest batch, relative to the loader's.

    Example
    -------
    >>> largest_copies(4, parallel_augment=True, concat_original=True)
    5
    >>> largest_copies(2, max_augmentations=1)
    1
    """
    enabled = augmentations
    if enable_augmentations is not None:
        enabled = sum(map(bool, enable_augmentations))
    least = 1 if min_augmentations is None else max(min_augmentations, 0)
    most = augmentations if max_augmentations is None else max_augmentations
    # The Augmenter limits both numbers to its list, then drops augmentations
    # that are not enabled.
    least = min(least, augmentations)
    most = min(max(min(most, augmentations), least), enabled)
    if most == 0 or repeat_augment == 0 or augment_prob == 0:
        return 1
    batches = most if parallel_augment and not parallel_augment_fixed_bs else 1
    return repeat_augment * batches + bool(concat_original)
