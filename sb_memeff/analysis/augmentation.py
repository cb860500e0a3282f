"""How many rows an Augmenter makes of one, found without making it.

Noises and echoes want csv files of recordings; for the size of a batch their
number is enough.

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
    """The most by which speechbrain.augment.augmenter.Augmenter grows a batch.

    Arguments are the Augmenter's. Start and end indices, which exclude some
    rows, do not count here: the figure is for whole batches. Neither does
    what changes the length: speed perturbation at 95 % makes audio 1/0.95 as
    long.

    Arguments
    ---------
    augmentations : int
        How many augmentations the list has.
    enable_augmentations : list of bool, optional
        Which of them are on.
    parallel_augment : bool
        One batch for each augmentation.
    parallel_augment_fixed_bs : bool
        These take a part of the batch each.
    concat_original : bool
        The batch itself comes first.
    min_augmentations : int, optional
        At least so many augmentations are drawn; 1 by default.
    max_augmentations : int, optional
        At most so many are drawn; all by default.
    repeat_augment : int
        All that so many times.
    augment_prob : float
        How often there is any augmentation.
    **others : dict
        Arguments that change no size.

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
    # The Augmenter limits both to its list, switches off what is not enabled
    # and takes what is left.
    least = min(least, augmentations)
    most = min(max(min(most, augmentations), least), enabled)
    if most == 0 or repeat_augment == 0 or augment_prob == 0:
        return 1
    batches = most if parallel_augment and not parallel_augment_fixed_bs else 1
    return repeat_augment * batches + bool(concat_original)
