"""The cheapest recomputation that a memory budget allows.

Authors
 * The sb_memeff authors 2026
"""

import dataclasses
import functools
import io
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ruamel.yaml
import torch
from speechbrain.utils.autocast import AMPConfig
from speechbrain.utils.logger import get_logger
from torch import nn

from sb_memeff.memory.fake import without_data
from sb_memeff.memory.leftovers import no_leftovers
from sb_memeff.memory.search import DoesNotFit
from sb_memeff.memory.step import training_step_memory
from sb_memeff.memory.units import format_bytes, parse_bytes
from sb_memeff.nnet.recompute.blocks import apply_to_blocks, recompute_blocks
from sb_memeff.nnet.recompute.outputs import DroppedOutputError
from sb_memeff.nnet.recompute.pieces import SplitError
from sb_memeff.nnet.recompute.selection import find_segments, refuse_nested

__all__ = ["Recomputation", "cheapest_recomputation", "fit_recompute"]

logger = get_logger(__name__)

# Numbers of pieces to try.
SPLITS = (2, 4, 8, 16, 32)


@dataclasses.dataclass(frozen=True)
class Recomputation:
    """Options of ``recompute_blocks``.

    Arguments
    ---------
    every : float
        See ``recompute_blocks``.
    first_output_only : bool
        Likewise.
    split : int
        Likewise.

    Example
    -------
    >>> print(Recomputation(split=8).yaml(["CNN", "enc.layers.*"]))
    blocks: [CNN, enc.layers.*], split: 8
    >>> print(Recomputation(every=2).yaml("*", segment_length=3))
    blocks: '*', every: 2, segment_length: 3
    """

    every: float = 1
    first_output_only: bool = False
    split: int = 1

    def options(self) -> dict[str, Any]:
        """Lists the options that are not the default.

        Returns
        -------
        dict
            Keyword arguments of ``recompute_blocks``.
        """
        default = dataclasses.asdict(Recomputation())
        return {
            key: value
            for key, value in dataclasses.asdict(self).items()
            if value != default[key]
        }

    def yaml(self, blocks: str | Sequence[str], segment_length: int = 1) -> str:
        """Writes the keys for a yaml file on one line.

        Arguments
        ---------
        blocks : str or list of str
            Names of the blocks.
        segment_length : int
            See ``recompute_blocks``.

        Returns
        -------
        str
            Pairs of key and value, without braces.
        """
        options = {"blocks": _flow_style(blocks), **self.options()}
        if segment_length > 1:
            options["segment_length"] = segment_length
        return ", ".join(f"{key}: {value}" for key, value in options.items())


def _flow_style(names: str | Sequence[str]) -> str:
    """Writes names as yaml, with quotes where it needs them."""
    alone = isinstance(names, str)
    writer = ruamel.yaml.YAML(typ="safe", pure=True)
    writer.default_flow_style = True
    writer.width = sys.maxsize
    stream = io.StringIO()
    # A name within brackets needs more quotes than outside.
    writer.dump([names] if alone else list(names), stream)
    text = stream.getvalue().strip()
    return text[1:-1] if alone else text


def cheapest_recomputation(
    peak: Callable[[Recomputation | None], int],
    segments: int,
    limit: int,
    may_split: bool = True,
) -> Recomputation | None:
    """Finds the recomputation that takes the least time and fits.

    In this order: nothing; as few segments as fit; all of them in as few pieces
    as fit. Further outputs, which take no time to drop, are dropped only where
    this is needed.

    Arguments
    ---------
    peak : callable
        Returns the peak of a step in bytes, given a Recomputation or None.
    segments : int
        Number of segments.
    limit : int
        Limit in bytes.
    may_split : bool
        Whether to try pieces.

    Returns
    -------
    Recomputation or None
        None if nothing needs to be recomputed.

    Raises
    ------
    DoesNotFit
        If nothing fits.

    Example
    -------
    >>> def peak(how):
    ...     stored = 10 if how is None else 10 - 9 / how.every
    ...     return stored if how is None else stored + 4 / how.split
    >>> cheapest_recomputation(peak, 3, 8)
    Recomputation(every=1.5, first_output_only=False, split=1)
    >>> cheapest_recomputation(peak, 3, 2)
    Recomputation(every=1, first_output_only=False, split=4)
    """
    peak = functools.lru_cache(maxsize=None)(peak)
    if peak(None) <= limit:
        return None
    whole = Recomputation(first_output_only=True)
    try:
        peak(whole)
    except DroppedOutputError:
        # The step uses them.
        whole = Recomputation()
    if peak(whole) <= limit:
        found = _fewest_segments(peak, segments, limit, whole)
    else:
        found = _fewest_pieces(peak, limit, whole, may_split)
    keeping = dataclasses.replace(found, first_output_only=False)
    return keeping if peak(keeping) <= limit else found


def _fewest_segments(
    peak: Callable[[Recomputation | None], int],
    segments: int,
    limit: int,
    whole: Recomputation,
) -> Recomputation:
    def recomputing(number: int) -> Recomputation:
        return dataclasses.replace(whole, every=segments / number)

    # The more are recomputed, the less memory a step takes.
    too_few, enough = 0, segments
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        if peak(recomputing(middle)) <= limit:
            enough = middle
        else:
            too_few = middle
    return recomputing(enough)


def _fewest_pieces(
    peak: Callable[[Recomputation | None], int],
    limit: int,
    whole: Recomputation,
    may_split: bool,
) -> Recomputation:
    least = peak(whole)
    for split in SPLITS if may_split else ():
        found = dataclasses.replace(whole, split=split)
        try:
            size = peak(found)
        except ValueError as error:
            if isinstance(error, SplitError) or isinstance(
                error.__cause__, SplitError
            ):
                break
            raise
        if size <= limit:
            return found
        if size > 0.99 * least:
            # The peak is elsewhere.
            break
        least = size
    raise DoesNotFit(least)


@no_leftovers()  # Entered once for all analyses.
def fit_recompute(
    module: nn.Module | Mapping[str, nn.Module],
    blocks: str | Sequence[str],
    budget: int | str,
    example: Sequence[int] | Callable[[Any], torch.Tensor],
    segment_length: int = 1,
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
    | None = None,
    precision: str = "fp32",
) -> dict[str, Any] | None:
    """Recomputes blocks in the cheapest way that a memory budget allows.

    In this order: nothing; as few of the blocks as fit; all of them in 2, 4, 8,
    ... pieces of the batch. Where it helps, the blocks' further outputs, such as
    attention weights, are dropped too.

    The peak of a training step (parameters, gradients, activations,
    temporaries and, optionally, optimizer states) is counted on tensors without
    data, without a GPU or arithmetic. Convolution workspaces, the CUDA context
    and memory outside ``module`` (classifier, augmentation) are not counted:
    leave room for them.

    Arguments
    ---------
    module : torch.nn.Module or dict
        See ``recompute_blocks``.
    blocks : str or list of str
        See ``recompute_blocks``.
    budget : int or str
        Bytes, or a size such as "11GB" or "10.5 GiB".
    example : list of int or callable
        Shape of the largest float32 input of a training batch, or a function
        that calls the module, its argument, and returns a tensor, such as
        ``lambda net: net(torch.zeros(16, 250, 640), torch.ones(16))``. (A
        dict becomes a torch.nn.ModuleDict.)
    segment_length : int
        See ``recompute_blocks``; blocks are split only if it is 1.
    optimizer : callable, optional
        ``!ref <opt_class>``, to count its states too.
    precision : str
        fp32, fp16 or bf16, as in SpeechBrain's run options.

    Returns
    -------
    dict
        The chosen options of ``recompute_blocks``, such as ``{"every": 2.0}``
        or ``{"every": 1, "split": 8}``; None if nothing needs to be
        recomputed.

    Raises
    ------
    ValueError
        If the budget is too small (the message gives the smallest), or as
        ``recompute_blocks``. The module is then unchanged.

    Example
    -------
    >>> def block():
    ...     layers = [torch.nn.Linear(64, 64), torch.nn.Tanh()]
    ...     return torch.nn.Sequential(*layers, *layers)
    >>> net = torch.nn.Sequential(*(block() for _ in range(12)))
    >>> fit_recompute(net, "*", budget="5.5MB", example=[1000, 64])
    {'every': 1.5}
    """
    segments = find_segments(module, blocks, segment_length)
    refuse_nested(segments, "fit_recompute")
    limit = parse_bytes(budget)
    autocast = AMPConfig.from_name(precision).dtype
    if autocast == torch.float32:
        autocast = None
    if not callable(example):
        example = tuple(example)
    network_name = type(module).__name__
    if not isinstance(module, nn.Module):
        network_name = ", ".join(module)
        module = nn.ModuleDict(dict(module))

    @functools.lru_cache(maxsize=None)
    def peak(how: Recomputation | None) -> int:
        def build() -> nn.Module:
            network = without_data(module)
            if how is not None:
                options = how.options()
                apply_to_blocks(
                    network, blocks, segment_length=segment_length, **options
                )
            return network

        return training_step_memory(
            build, example, optimizer=optimizer, autocast=autocast
        ).peak_bytes

    try:
        found = cheapest_recomputation(
            peak, len(segments), limit, may_split=segment_length == 1
        )
    except DoesNotFit as error:
        raise ValueError(
            f"fit_recompute: {network_name} does not fit into "
            f"{format_bytes(limit)}. "
            f"With all of {blocks} recomputed a step still takes "
            f"{format_bytes(error.peak)} ({format_bytes(peak(None))} with all "
            f"activations stored). Name more or smaller blocks, or use a "
            f"smaller batch."
        ) from None
    stored = format_bytes(peak(None))
    if found is None:
        logger.info(
            f"{network_name}: a step takes {stored} with all activations "
            f"stored; nothing is recomputed."
        )
        return None
    logger.info(
        f"{network_name}: a step takes {format_bytes(peak(found))} of "
        f"{format_bytes(limit)} ({stored} with all activations stored) with "
        f"!apply:sb_memeff.nnet.recompute.recompute_blocks "
        f"{{{found.yaml(blocks, segment_length)}}}."
    )
    recompute_blocks(
        module, blocks, segment_length=segment_length, **found.options()
    )
    return {"every": found.every, **found.options()}
