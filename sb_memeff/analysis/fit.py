"""Finds the largest batch, or another maximum, that fits into a GPU's memory.

Authors
 * The sb_memeff authors 2026
"""

import math
import pydoc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from sb_memeff.analysis.families.step import Variant, require_positive
from sb_memeff.analysis.profile import Profile, profile
from sb_memeff.analysis.recipe import Recipe, read_recipe
from sb_memeff.lobes.presets import Presets
from sb_memeff.memory.fake import fake_tensors
from sb_memeff.memory.leftovers import no_leftovers
from sb_memeff.memory.search import DoesNotFit, largest
from sb_memeff.memory.units import format_bytes, parse_bytes

__all__ = ["Fit", "fit", "usable"]

# What is not a tensor of the step: CUDA's context with the kernels of torch
# and cuDNN (bytes), fragments of the allocator and workspaces (share).
CONTEXT = 500_000_000
SHARE = 0.05
# Seconds; of LibriSpeech's training utterances a few are longer.
LONGEST = 25


@dataclass
class Fit:
    """Result of ``fit``.

    Arguments
    ---------
    found : Profile
        The largest step that fits.
    limit : int
        Bytes that were there for it.
    overrides : dict
        What to change in the yaml file.
    """

    found: Profile
    limit: int
    overrides: dict[str, Any]


def usable(budget: int | str, margin: int | str | None = None) -> int:
    """The bytes of a budget that tensors may take.

    Arguments
    ---------
    budget : int or str
        Memory of the GPU; see ``parse_bytes``.
    margin : int or str, optional
        What to leave. By default 500 MB for CUDA's context and 5 % of the
        rest for fragmentation and workspaces.

    Returns
    -------
    int
        Bytes.

    Raises
    ------
    ValueError
        If nothing is left.

    Example
    -------
    >>> usable("11GB"), usable("11GB", "2GB")
    (9975000000, 9000000000)
    """
    total = parse_bytes(budget)
    if margin is None:
        left = int((total - CONTEXT) * (1 - SHARE))
        what = f"{format_bytes(CONTEXT)} for CUDA's context"
    else:
        left = total - parse_bytes(margin)
        what = f"a margin of {format_bytes(parse_bytes(margin))}"
    if left <= 0:
        raise ValueError(
            f"A budget of {format_bytes(total)} leaves nothing beside {what}: "
            f"give a larger --budget."
        )
    return left


def fit(
    path: str | Path,
    overrides: dict[str, Any],
    limit: int,
    batch: int | None = None,
    seconds: float | None = None,
    tokens: int | None = None,
    precision: str | None = None,
    progress: Callable[[Profile], object] | None = None,
    variant: Variant | None = None,
) -> Fit:
    """Finds the largest training step of a recipe within a limit.

    Neither batch nor seconds given, or only seconds: the largest batch; of a
    recipe with dynamic batching, the largest max_batch_len for utterances of
    any length up to ``seconds``. Only batch: the longest utterances. Both: the
    deepest preset.

    Arguments
    ---------
    path : str or Path
        The yaml file.
    overrides : dict
        Of its keys.
    limit : int
        Bytes.
    batch : int, optional
        Utterances that the loader gives.
    seconds : float, optional
        Their length.
    tokens : int, optional
        Length of each transcript.
    precision : str, optional
        fp32, bf16 or fp16.
    progress : callable, optional
        Is given each Profile when it is there.
    variant : Variant, optional
        What to train instead of the recipe's own network or loss.

    Returns
    -------
    Fit
        The step.

    Raises
    ------
    ValueError
        If nothing fits, or the recipe does not have what is asked for.
    """
    require_positive(batch=batch, seconds=seconds, tokens=tokens)
    recipe = read_recipe(path, overrides)
    known: dict[tuple[Any, ...], Profile] = {}

    def measure(
        batch: int, seconds: float | None, recipe: Recipe = recipe
    ) -> Profile:
        key = batch, seconds, recipe
        if key not in known:
            known[key] = profile(
                recipe, batch, seconds, tokens, precision, variant
            )
            if progress:
                progress(known[key])
        return known[key]

    try:
        # Once for all that are tried.
        with no_leftovers():
            if batch is None and recipe.settings.get("dynamic_batching"):
                longest = LONGEST if seconds is None else seconds
                return _longest_batch(recipe, limit, longest, measure)
            if batch is None:
                return _largest_batch(recipe, limit, seconds, measure)
            if seconds is None:
                return _longest_utterance(limit, batch, recipe, measure)
            return _deepest(
                path, overrides, recipe, limit, batch, seconds, measure
            )
    except DoesNotFit as error:
        raise ValueError(_too_small(recipe, known, error.peak, limit)) from None


def _largest_batch(
    recipe: Recipe,
    limit: int,
    seconds: float | None,
    measure: Callable[..., Profile],
) -> Fit:
    _, seconds = recipe.default_batch(seconds)
    first = recipe.step_class.fewest
    batch, _ = largest(
        lambda n: measure(n, seconds).memory.peak_bytes, limit, first
    )
    return Fit(
        measure(batch, seconds),
        limit,
        {"batch_size": batch, **_length(recipe, seconds)},
    )


def _longest_batch(
    recipe: Recipe,
    limit: int,
    longest: float,
    measure: Callable[..., Profile],
) -> Fit:
    def worst(length: int) -> Profile:
        # The longest utterances; and, where they leave a rest of the length,
        # the longest that fill it.
        count = max(int(length // longest), 1)
        return max(
            measure(count, longest),
            measure(count + 1, round(length / (count + 1), 3)),
            key=lambda found: found.memory.peak_bytes,
        )

    length, _ = largest(
        lambda n: worst(n).memory.peak_bytes, limit, math.ceil(longest)
    )
    return Fit(worst(length), limit, {"max_batch_len": length})


def _longest_utterance(
    limit: int, batch: int, recipe: Recipe, measure: Callable[..., Profile]
) -> Fit:
    # In tenths of a second.
    tenths, _ = largest(
        lambda n: measure(batch, n / 10).memory.peak_bytes, limit, first=5
    )
    found = measure(batch, tenths / 10)
    overrides: dict[str, Any] = {
        "batch_size": batch,
        **_length(recipe, found.seconds),
    }
    if recipe.settings.get("dynamic_batching"):
        # It would choose other batches.
        overrides["dynamic_batching"] = False
    return Fit(found, limit, overrides)


def _deepest(
    path: str | Path,
    overrides: dict[str, Any],
    recipe: Recipe,
    limit: int,
    batch: int,
    seconds: float,
    measure: Callable[..., Profile],
) -> Fit:
    presets = _presets(recipe)
    for preset in reversed(presets):
        deeper = read_recipe(path, {**overrides, "preset": preset})
        found = measure(batch, seconds, deeper)
        if found.memory.peak_bytes <= limit:
            return Fit(
                found,
                limit,
                {
                    "preset": preset,
                    "batch_size": batch,
                    **_length(recipe, seconds),
                },
            )
    raise ValueError(
        f"{path}: no preset fits into {format_bytes(limit)} with a batch of "
        f"{batch} x {seconds:g} s; {presets[0]} takes "
        # The recipe's own preset is one.
        # pyrefly: ignore[unbound-name]
        f"{format_bytes(found.memory.peak_bytes)}."
    )


def _presets(recipe: Recipe) -> list[str]:
    """The recipe's preset and its like, the shallowest first."""
    network, method = "", ""
    if recipe.family == "speaker":
        network, _, method = recipe.callee("embedding_model").rpartition(".")
    if method != "from_preset" or "preset" not in recipe.settings:
        raise ValueError(
            f"{recipe.path} has no preset to choose, and batch and seconds are "
            f"given: leave out one of them to find its largest."
        )
    # Says so if there is no such network or preset.
    _build_without_memory(recipe)
    presets = cast(type[Presets], pydoc.locate(network)).PRESETS
    family = recipe.settings["preset"].rstrip("0123456789")
    return sorted(
        (n for n in presets if n.rstrip("0123456789") == family),
        key=lambda name: int(name.removeprefix(family)),
    )


@no_leftovers()
def _build_without_memory(recipe: Recipe) -> None:
    with fake_tensors():
        recipe.build()


def _length(recipe: Recipe, seconds: float) -> dict[str, float]:
    """The override for the length of utterances."""
    if "sentence_len" in recipe.settings:
        return {"sentence_len": seconds}
    return {}


def _too_small(
    recipe: Recipe, known: dict[Any, Profile], peak: int, limit: int
) -> str:
    found = min(known.values(), key=lambda p: abs(p.memory.peak_bytes - peak))
    kinds = found.memory.by_kind
    fixed = sum(
        kinds[k] for k in ("parameters", "gradients", "optimizer states")
    )
    return (
        f"{recipe.path}: {found.label} does not fit into "
        f"{format_bytes(limit)}: a batch of {found.batch} x "
        f"{found.seconds:g} s takes {format_bytes(peak)}, of which "
        f"{format_bytes(fixed)} are parameters, gradients and optimizer states."
    )
