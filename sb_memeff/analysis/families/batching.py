"""Dynamic batches: as many utterances as fit into a length.

Authors
 * The sb_memeff authors 2026
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["DynamicBatching", "dynamic_batching", "sampler_options"]

# SpeechBrain's recipes name the length of a batch differently.
LENGTHS = ("max_batch_len", "max_batch_length_train", "max_batch_length")


@dataclass(frozen=True)
class DynamicBatching:
    """The length of a recipe's dynamic batches.

    Arguments
    ---------
    key : str
        Its key in the yaml file.
    unit : float
        Seconds of one unit of this length.
    most : float
        Largest number of utterances.
    """

    key: str
    unit: float = 1.0
    most: float = math.inf

    def override(self, seconds: int) -> dict[str, int]:
        """Makes the override for a length.

        Arguments
        ---------
        seconds : int
            Length of a batch.

        Returns
        -------
        dict
            Key to value.

        Example
        -------
        >>> DynamicBatching("max_batch_length", unit=0.01).override(150)
        {'max_batch_length': 15000}
        """
        return {self.key: round(seconds / self.unit)}


def dynamic_batching(settings: Mapping[str, Any]) -> DynamicBatching | None:
    """Finds out how a recipe makes its batches.

    Arguments
    ---------
    settings : dict
        Plain values of the yaml file.

    Returns
    -------
    DynamicBatching or None
        None if each batch has ``batch_size`` utterances.

    Example
    -------
    >>> dynamic_batching({"dynamic_batching": True, "max_batch_len": 150})
    DynamicBatching(key='max_batch_len', unit=1.0, most=inf)
    >>> dynamic_batching({"batch_size": 8, "max_batch_len": 150})
    """
    key = next((key for key in LENGTHS if key in settings), None)
    # PeoplesSpeech has a length, but no switch and no size.
    only_length = key is not None and "batch_size" not in settings
    if not settings.get("dynamic_batching", only_length):
        return None
    return DynamicBatching(
        key or LENGTHS[0],
        # Recipes that state the hop count its frames.
        settings.get("feats_hop_size", 1.0),
        sampler_options(settings).get("max_batch_ex") or math.inf,
    )


def sampler_options(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options of the sampler of dynamic batches.

    Arguments
    ---------
    settings : dict
        Plain values of the yaml file.

    Returns
    -------
    dict
        Such as the number of buckets.

    Example
    -------
    >>> sampler_options({"dynamic_batch_sampler": {"num_buckets": 20}})
    {'num_buckets': 20}
    """
    for key in ("dynamic_batch_sampler_train", "dynamic_batch_sampler"):
        if key in settings:
            return settings[key]
    return {}
