"""Finds the largest batch, or another maximum, that fits into a GPU's memory.

Authors
 * The sb_memeff authors 2026
"""

import math
import pydoc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from sb_memeff.analysis.families.batching import DynamicBatching
from sb_memeff.analysis.families.step import (
    Variant,
    recomputed_variant,
    require_positive,
)
from sb_memeff.analysis.profile import Profile, profile
from sb_memeff.analysis.recipe import Recipe, read_recipe
from sb_memeff.lobes.presets import Presets
from sb_memeff.memory.fake import fake_tensors
from sb_memeff.memory.leftovers import no_leftovers
from sb_memeff.memory.search import DoesNotFit, largest
from sb_memeff.memory.units import format_bytes, parse_bytes
from sb_memeff.nnet.recompute.fit import Recomputation, cheapest_recomputation
from sb_memeff.nnet.recompute.selection import find_segments

__all__ = ["Fit", "fit", "usable", "yaml_line"]

# Memory besides the step's tensors: CUDA's context with the kernels of torch and
# cuDNN (bytes), fragmentation of the allocator and workspaces (share).
CONTEXT = 500_000_000
SHARE = 0.05
# In seconds. A few of LibriSpeech's training utterances are longer.
LONGEST = 25
# Utterances in the first analysis. More would not take longer. With fewer, memory
# that does not depend on them, such as weights in half precision, counts more.
SOME = 4
# Kinds of memory that do not depend on the batch.
FIXED = ("parameters", "buffers", "gradients", "optimizer states")
# The memory of an utterance grows with about this power of its length. Attention
# and a transducer's logits grow with the square, everything else linearly.
GROWTH = 1.25


@dataclass
class Fit:
    """Result of ``fit``.

    Arguments
    ---------
    profile : Profile
        The largest step that fits.
    limit : int
        Bytes that it may take.
    overrides : dict
        Keys of the yaml file to set for this step.
    yaml : str, optional
        A line to add to the yaml file for this step, after its modules.
    """

    profile: Profile
    limit: int
    overrides: dict[str, Any]
    yaml: str | None = None


def usable(budget: int | str, margin: int | str | None = None) -> int:
    """Computes how many bytes of a budget tensors may take.

    Arguments
    ---------
    budget : int or str
        Memory of the GPU; see ``parse_bytes``.
    margin : int or str, optional
        Memory to leave free. By default 500 MB for CUDA's context and 5 % of
        the rest for fragmentation and workspaces.

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
        rest = int((total - CONTEXT) * (1 - SHARE))
        reserve = f"{format_bytes(CONTEXT)} for CUDA's context"
    else:
        rest = total - parse_bytes(margin)
        reserve = f"a margin of {format_bytes(parse_bytes(margin))}"
    if rest <= 0:
        raise ValueError(
            f"A budget of {format_bytes(total)} leaves nothing besides {reserve}: "
            f"give a larger --budget."
        )
    return rest


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

    Without ``batch`` it finds the largest batch or, for a recipe with dynamic
    batching, the largest length of a batch (max_batch_len) for utterances of any
    length up to ``seconds``. With only ``batch`` it finds the longest
    utterances. With ``batch`` and ``seconds`` it finds the deepest preset or,
    for a transducer or a transformer, the recomputation that takes the least
    time.

    Arguments
    ---------
    path : str or Path
        The yaml file.
    overrides : dict
        Values of its keys.
    limit : int
        Limit in bytes.
    batch : int, optional
        Utterances in a batch of the loader.
    seconds : float, optional
        Their length.
    tokens : int, optional
        Length of each transcript.
    precision : str, optional
        fp32, bf16 or fp16.
    progress : callable, optional
        Called with each Profile.
    variant : Variant, optional
        Replaces the recipe's network or loss.

    Returns
    -------
    Fit
        The step.

    Raises
    ------
    ValueError
        If nothing fits, or the recipe lacks the quantity to maximise.
    """
    require_positive(batch=batch, seconds=seconds, tokens=tokens)
    recipe = read_recipe(path, overrides)
    if batch is not None and recipe.dynamic_batching:
        recipe.number("batch_size", "omit --batch")
    profiles: dict[tuple[Any, ...], Profile] = {}

    def measure(
        batch: int,
        seconds: float | None,
        recipe: Recipe = recipe,
        variant: Variant | None = variant,
    ) -> Profile:
        key = batch, seconds, recipe, variant and variant.label
        if key not in profiles:
            profiles[key] = profile(
                recipe, batch, seconds, tokens, precision, variant
            )
            if progress:
                progress(profiles[key])
        return profiles[key]

    try:
        # Entered once for all profiles.
        with no_leftovers():
            if batch is None and recipe.dynamic_batching:
                longest = LONGEST if seconds is None else seconds
                return _longest_batch(
                    recipe.dynamic_batching, limit, longest, measure
                )
            if batch is None:
                return _largest_batch(recipe, limit, seconds, measure)
            if seconds is None:
                return _longest_utterance(limit, batch, recipe, measure)
            if recipe.step_class.recomputable:
                variant = variant or recipe.own_variant()
                return _cheapest(
                    recipe, variant, limit, batch, seconds, measure
                )
            return _deepest(
                path, overrides, recipe, limit, batch, seconds, measure
            )
    except DoesNotFit as error:
        raise ValueError(
            _too_small(recipe, profiles, error.peak, limit)
        ) from None


def _largest_batch(
    recipe: Recipe,
    limit: int,
    seconds: float | None,
    measure: Callable[..., Profile],
) -> Fit:
    _, seconds = recipe.default_batch(seconds)
    some = measure(SOME, seconds)
    batch, _ = largest(
        lambda n: measure(n, seconds).memory.peak_bytes,
        limit,
        recipe.step_class.min_batch,
        about={0: _fixed(some), SOME: some.memory.peak_bytes},
    )
    return Fit(
        measure(batch, seconds),
        limit,
        {"batch_size": batch, **_length(recipe, seconds)},
    )


def _longest_batch(
    batching: DynamicBatching,
    limit: int,
    longest: float,
    measure: Callable[..., Profile],
) -> Fit:
    def peak(count: int) -> int:
        return measure(count, longest).memory.peak_bytes

    def worst(length: int) -> Profile:
        # Either as many of the longest utterances as fit, or one more
        # utterance, which fills the batch.
        count = max(int(length // longest), 1)
        return max(
            measure(count, longest),
            measure(count + 1, round(length / (count + 1), 3)),
            key=lambda one: one.memory.peak_bytes,
        )

    # Memory is linear in the number of the longest utterances.
    fixed = _fixed(measure(SOME, longest))
    each = max(peak(SOME) - fixed, 1) / SOME
    count = max(int((limit - fixed) / each), 1)
    if count == 1 and peak(1) > limit:
        raise DoesNotFit(peak(1))
    each = max(peak(count) - fixed, 1) / count
    more = int((limit - fixed) / each) + 1
    # One utterance too many: estimate the length at which they all fit.
    share = (limit - fixed) / (more * each)
    total = more * longest
    about = {
        int(total * share ** (1 / GROWTH)): limit,
        total: fixed + more * each,
    }
    length, _ = largest(
        lambda n: worst(n).memory.peak_bytes,
        limit,
        math.ceil(longest),
        about=about,
    )
    return Fit(worst(length), limit, batching.override(length))


def _fixed(result: Profile) -> int:
    """Bytes that do not depend on the batch."""
    kinds = result.memory.by_kind
    return sum(kinds[kind] for kind in FIXED)


def _longest_utterance(
    limit: int, batch: int, recipe: Recipe, measure: Callable[..., Profile]
) -> Fit:
    # Search in tenths of a second.
    tenths, _ = largest(
        lambda n: measure(batch, n / 10).memory.peak_bytes, limit, first=5
    )
    result = measure(batch, tenths / 10)
    return Fit(result, limit, _this_batch(recipe, batch, result.seconds))


def _cheapest(
    recipe: Recipe,
    variant: Variant,
    limit: int,
    batch: int,
    seconds: float,
    measure: Callable[..., Profile],
) -> Fit:
    blocks = recipe.step_class.recomputable
    with no_leftovers(), fake_tensors():
        segments = len(find_segments(recipe.build(), blocks, 1))

    def recomputing(how: Recomputation | None) -> Variant:
        if how is None:
            return variant
        return recomputed_variant(variant, blocks, how, how.yaml(blocks))

    def peak(how: Recomputation | None) -> int:
        result = measure(batch, seconds, variant=recomputing(how))
        return result.memory.peak_bytes

    how = cheapest_recomputation(peak, segments, limit)
    result = measure(batch, seconds, variant=recomputing(how))
    line = None if how is None else yaml_line(how, blocks)
    return Fit(result, limit, _this_batch(recipe, batch, seconds), line)


def yaml_line(how: Recomputation, blocks: Sequence[str]) -> str:
    """Writes a recomputation for a yaml file.

    Arguments
    ---------
    how : Recomputation
        The options.
    blocks : list of str
        Names of blocks among the yaml file's modules.

    Returns
    -------
    str
        One line, for the place after the modules.

    Example
    -------
    >>> yaml_line(Recomputation(split=8), ["CNN"])
    '__recompute: !apply:sb_memeff.nnet.recompute.recompute_blocks \
{module: !ref <modules>, blocks: [CNN], split: 8}'
    """
    return (
        "__recompute: !apply:sb_memeff.nnet.recompute.recompute_blocks "
        f"{{module: !ref <modules>, {how.yaml(blocks)}}}"
    )


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
        result = measure(batch, seconds, deeper)
        if result.memory.peak_bytes <= limit:
            return Fit(
                result,
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
        # There is at least the recipe's own preset.
        # pyrefly: ignore[unbound-name]
        f"{format_bytes(result.memory.peak_bytes)}."
    )


def _presets(recipe: Recipe) -> list[str]:
    """The presets of the recipe's family, the shallowest first."""
    network, method = "", ""
    if recipe.family == "speaker":
        network, _, method = recipe.callee("embedding_model").rpartition(".")
    if method != "from_preset" or "preset" not in recipe.settings:
        raise ValueError(
            f"{recipe.path} has no preset to choose, and batch and seconds are "
            f"both given: omit one of them to maximise it."
        )
    # Raises if there is no such network or preset.
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


def _this_batch(recipe: Recipe, batch: int, seconds: float) -> dict[str, Any]:
    """The overrides for a batch."""
    overrides: dict[str, Any] = {
        "batch_size": batch,
        **_length(recipe, seconds),
    }
    if recipe.settings.get("dynamic_batching"):
        # Dynamic batching would choose other batches.
        overrides["dynamic_batching"] = False
    return overrides


def _length(recipe: Recipe, seconds: float) -> dict[str, float]:
    """The override for the length of utterances."""
    if "sentence_len" in recipe.settings:
        return {"sentence_len": seconds}
    return {}


def _too_small(
    recipe: Recipe, profiles: dict[Any, Profile], peak: int, limit: int
) -> str:
    result = min(
        profiles.values(), key=lambda p: abs(p.memory.peak_bytes - peak)
    )
    return (
        f"{recipe.path}: {result.label} does not fit into "
        f"{format_bytes(limit)}: a batch of {result.batch} x "
        f"{result.seconds:g} s takes {format_bytes(peak)}, of which "
        f"{format_bytes(_fixed(result))} are parameters, buffers, "
        f"gradients and optimizer states."
    )
