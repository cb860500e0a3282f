"""Blocks of a network that recompute their activations in backward.

Authors
 * The sb_memeff authors 2026
"""

import copyreg
import functools
import inspect
import math
import types
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, SupportsIndex, cast

import torch
from speechbrain.utils.logger import get_logger
from torch import nn
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from sb_memeff.nnet.recompute.outputs import first_output_of
from sb_memeff.nnet.recompute.pieces import BatchPieces, check_shared
from sb_memeff.nnet.recompute.segment import Segment
from sb_memeff.nnet.recompute.selection import find_segments, refuse_nested
from sb_memeff.utils.settings import (
    check_integer,
    check_number,
    check_switches,
)

__all__ = ["apply_to_blocks", "is_split", "recompute_blocks", "store_blocks"]

logger = get_logger(__name__)


def recompute_blocks(
    module: nn.Module | Mapping[str, nn.Module],
    blocks: str | Sequence[str],
    every: float = 1,
    segment_length: int = 1,
    first_output_only: bool = False,
    split: int = 1,
    shared: Sequence[str] | None = None,
    enabled: bool = True,
) -> list[str]:
    """Makes named blocks recompute their activations in backward.

    The module is changed in place. Its class (by isinstance), names, state_dict
    and all references to it remain valid. The change survives copies, pickles,
    DDP, torch.compile, moves to a device and SyncBatchNorm conversion, except
    for a norm that is itself a block. Without gradients (under no_grad, in
    torch.jit) a block is called normally. A hook on a block runs once a step;
    hooks on modules within it run again in backward.

    The second call of a block draws the same random numbers (of torch, Python
    and numpy, and of generators among its modules' attributes) and sees the
    same buffers and attributes as the first call. Changes to them count once.
    If the outputs differ by a bit, backward raises an error that names the
    block: on a CPU before the block has gradients, on a GPU no later than in
    the next step. Under torch.compile the compiler's own recomputation is used;
    a block that it cannot trace as a whole is not compiled.

    Blocks may be nested: ``[layer?, layer?.*]`` stores the inputs of the outer
    blocks and recomputes the inner ones twice.

    Arguments
    ---------
    module : torch.nn.Module or dict
        The network, or any part of it; or networks by name, such as
        ``!ref <modules>``, whose keys then begin the names of blocks.
    blocks : str or list of str
        Names of modules as in ``module.named_modules()``; ``*``, ``?`` and
        ``[...]`` match characters within one part of a name, ``**`` matches
        any number of parts. A block should need a small part of the
        network's memory, but more than its input does: backward holds the
        activations of one block at a time.
    every : float
        Recompute only every k-th segment: 2 costs half the time and saves
        half the activations; 1.5 recomputes two of three. At least 1. Call
        the function again to add blocks.
    segment_length : int
        Number of consecutive blocks (in the order of ``named_modules``) that
        store one input together. Use it for networks that list single
        layers, such as Xvector: a single convolution would store its input
        and save nothing. Operations between two blocks are not recomputed;
        tensors that they change are stored.
    first_output_only : bool
        In training, keep only the first item of a tuple or list that a block
        returns. SpeechBrain's encoders collect the attention weights of all
        layers, [B, heads, T, T] each, which recipes do not use. Use of
        another output raises an error that names the block. (Under
        torch.compile these outputs are None.)
    split : int
        Call each block for the batch in so many pieces, in forward and in
        backward, which then holds the activations of one piece. The first
        dimension of the input must be the batch, and samples must not depend
        on each other: batch norm in training is refused. Gradients are those
        of the whole batch, up to rounding, but dropout draws other numbers.
        A compiled network calls these blocks outside its graphs.
    shared : list of str, optional
        With split, names of arguments that all samples share. All others
        hold one item for each sample. Those of SpeechBrain's layers (lengths,
        masks and positions) are known; for others, None raises an error that
        asks for it.
    enabled : bool
        False changes nothing: a switch for a yaml file.

    Returns
    -------
    list of str
        The blocks that now recompute.

    Raises
    ------
    TypeError
        If module is neither a torch.nn.Module nor a dict of them, or if
        enabled or first_output_only is neither True nor False.
    ValueError
        If a name matches nothing (the message lists the candidates) or a
        module that cannot be recomputed, if every, segment_length or split is
        below 1, if blocks are nested and every or segment_length is not 1,
        if split and segment_length are both above 1, if no block takes an
        argument in shared, or if a block already recomputes with other
        options. Nothing has changed then. In forward, if a block cannot be
        split.

    Example
    -------
    >>> from speechbrain.lobes.models.ECAPA_TDNN import ECAPA_TDNN
    >>> net = ECAPA_TDNN(80, channels=[16] * 5, lin_neurons=8)
    >>> recompute_blocks(net, ["blocks.*", "mfa"])
    ['blocks.0', 'blocks.1', 'blocks.2', 'blocks.3', 'mfa']
    >>> net(torch.rand(2, 50, 80)).sum().backward()
    """
    check_switches(enabled=enabled, first_output_only=first_output_only)
    if not enabled:
        return []
    names = apply_to_blocks(
        module,
        blocks,
        every,
        segment_length,
        first_output_only,
        split,
        shared,
    )
    pieces = f", in {split} pieces of the batch" if split > 1 else ""
    owner = f"{type(module).__name__}: "
    if isinstance(module, Mapping):
        owner = ""
    logger.info(
        f"{owner}{len(names)} blocks recompute their activations in "
        f"backward{pieces}: {', '.join(names)}."
    )
    return names


def apply_to_blocks(
    module: nn.Module | Mapping[str, nn.Module],
    blocks: str | Sequence[str],
    every: float = 1,
    segment_length: int = 1,
    first_output_only: bool = False,
    split: int = 1,
    shared: Sequence[str] | None = None,
) -> list[str]:
    """``recompute_blocks`` without the log message.

    Arguments
    ---------
    module : torch.nn.Module or dict
        The network, or networks by name.
    blocks : str or list of str
        Names with wildcards.
    every : float
        At least 1.
    segment_length : int
        At least 1.
    first_output_only : bool
        Drop further outputs.
    split : int
        At least 1.
    shared : list of str, optional
        Arguments that are not split.

    Returns
    -------
    list of str
        The blocks that now recompute.
    """
    segments = find_segments(module, blocks, segment_length)
    check_number("every", every, least=1)
    _check_split(split, segment_length)
    if shared is not None:
        check_shared(shared, [block for s in segments for _, block in s])
    if every != 1:
        refuse_nested(segments, f"every={every:g}")
    places = []
    # 1e-9 absorbs rounding: with every = 12 / 7, 7 * every must give 12.
    for i in range(max(1, math.ceil(len(segments) / every - 1e-9))):
        queue = _Queue()
        segment = segments[int(i * every + 1e-9)]
        for position, (name, block) in enumerate(segment):
            pieces = BatchPieces(name, split, shared) if split > 1 else None
            place = _Place(name, queue, position, first_output_only, pieces)
            place.check_before(block)
            places.append((block, place))
    for block, place in places:
        _make_recompute(block, place)
    return [place.name for _, place in places]


def store_blocks(module: nn.Module) -> list[str]:
    """Undoes ``recompute_blocks``: all blocks store their activations.

    Call it before pickling a whole module (not a state_dict) that must load
    without sb_memeff.

    Arguments
    ---------
    module : torch.nn.Module
        The network.

    Returns
    -------
    list of str
        The blocks that recomputed before.

    Example
    -------
    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU())
    >>> recompute_blocks(net, "*", segment_length=2)
    ['0', '1']
    >>> store_blocks(net)
    ['0', '1']
    """
    names = []
    for name, part in module.named_modules():
        if "_recompute_place" in vars(part):
            # Without its place a block stores activations, even if another
            # library has derived a class from ours.
            del part._recompute_place
            _change_class(part, _storing)
            names.append(name)
    return names


def is_split(block: nn.Module) -> bool:
    """Checks whether a block is called in pieces of the batch.

    Arguments
    ---------
    block : torch.nn.Module
        Any module.

    Returns
    -------
    bool
        True if ``recompute_blocks`` named it with ``split`` above 1.

    Example
    -------
    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU())
    >>> names = recompute_blocks(net, "0", split=2)
    >>> [is_split(block) for block in net]
    [True, False]
    """
    place = vars(block).get("_recompute_place")
    return place is not None and place.pieces is not None


def _check_split(split: int, segment_length: int) -> None:
    check_integer("split", split, 1)
    if split > 1 and segment_length > 1:
        raise ValueError(
            f"recompute_blocks: split={split} needs segment_length=1, not "
            f"{segment_length}: each piece stores the input of its block."
        )


class _Queue:
    """Consecutive blocks that share a segment."""

    def __init__(self):
        self._open: weakref.ref[Segment] | None = None

    def segment(self, position: int, leaves: Iterable[object]) -> Segment:
        """Returns the segment of a call.

        A call joins the open segment if it uses one of its outputs. A block
        that is called again, or out of order, starts a new segment.
        """
        segment = self._open() if self._open is not None else None
        if segment is None or not (
            segment.position < position and segment.feeds(leaves)
        ):
            segment = Segment()
            self._open = weakref.ref(segment)
        return segment

    def __getstate__(self) -> dict[str, None]:
        # Copies and pickles have no open segment.
        return {"_open": None}


class _Place:
    """Position of a block among those that recompute."""

    def __init__(
        self,
        name: str,
        queue: _Queue,
        position: int,
        first_output_only: bool,
        pieces: BatchPieces | None,
    ):
        self.name = name
        self.queue = queue
        self.position = position
        self.first_output_only = first_output_only
        self.pieces = pieces

    def check_before(self, block: nn.Module) -> None:
        """Raises if the block already recomputes in another way."""
        place = vars(block).get("_recompute_place")
        if place is None:
            return
        before, now = place.options(), self.options()
        if before != now:
            raise ValueError(
                f"recompute_blocks: {self.name} already recomputes with "
                f"{before}, and would now with {now}. Name it in one call "
                f"only, or call store_blocks first."
            )

    def options(self) -> str:
        """The options of the block's call, for messages."""
        options = [f"first_output_only={bool(self.first_output_only)}"]
        if self.pieces is None:
            options.append("split=1")
        else:
            options.append(f"split={self.pieces.count}")
            shared = self.pieces.shared
            options.append(f"shared={shared and sorted(shared)}")
        return ", ".join(options)

    def call(
        self,
        block: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Calls a block's original forward, with recomputation if needed."""
        function = functools.partial(forward, block)
        if not torch.is_grad_enabled() or torch.jit.is_tracing():
            return function(*args, **kwargs)
        return _recompute(self, block, function, args, kwargs)


def _recompute(
    place: _Place,
    block: nn.Module,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Calls the function in the segment of its block."""
    forward = function
    if place.first_output_only and block.training:
        # Within the call, so that the replay drops them, too.
        function = functools.partial(first_output_of, place.name, function)
    if place.pieces is not None:

        def call_piece(
            args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[Any, list[tuple[nn.Module, str]]]:
            segment = Segment()
            result = segment.call(place.name, block, function, args, kwargs)
            return result, segment.changed_state()

        return place.pieces.call(
            block, forward, function, call_piece, args, kwargs
        )
    segment = place.queue.segment(place.position, tree_leaves((args, kwargs)))
    result = segment.call(place.name, block, function, args, kwargs)
    segment.position = place.position
    return result


def _recompute_in_graph(
    place: _Place,
    block: nn.Module,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Replaces ``_recompute`` in a graph of torch.compile.

    The compiler recomputes in its own way, and counts batch statistics once.
    """
    if place.pieces is not None:
        torch._dynamo.graph_break()
    result: Any = checkpoint(function, *args, use_reentrant=False, **kwargs)
    if place.first_output_only and block.training:
        if type(result) in (tuple, list):
            # A graph returns tensors and None only.
            return type(result)([result[0], *[None for _ in result[1:]]])
    return result


@functools.lru_cache(maxsize=None)
def _prepare_compiler() -> None:
    """Registers how torch.compile treats the call of a block.

    A block that it cannot trace as a whole is not compiled, because torch's
    checkpoint would count its batch statistics twice. This is not done on
    import, because it imports the compiler (as every torch optimizer does).
    """
    global _recompute
    _recompute = torch.compiler.disable(_recompute)
    torch.compiler.substitute_in_graph(_recompute)(_recompute_in_graph)


def _make_recompute(block: nn.Module, place: _Place) -> None:
    if not _recomputes(type(block)):
        _change_class(block, _recomputing)
    # Module accepts attributes of any type.
    block._recompute_place = cast(Any, place)


def _recomputes(cls: type[nn.Module]) -> bool:
    return any("_stores_as" in vars(c) for c in cls.__mro__)


def _change_class(
    block: nn.Module, change: Callable[[type[nn.Module]], type[nn.Module]]
) -> None:
    """Changes the class of a block, below its parametrizations.

    torch.nn.utils.parametrize derives a class for each module that it changes,
    and restores the base of that class when the last parametrization is
    removed.
    """
    cls = type(block)
    if not parametrize.is_parametrized(block) or not any(
        name in vars(cls)
        for name in cast(nn.ModuleDict, block.parametrizations)
    ):
        block.__class__ = change(cls)
        return
    # A new class, because copies of the module share the old one.
    namespace = {
        k: v
        for k, v in vars(cls).items()
        if k not in ("__dict__", "__weakref__")
    }
    base = change(cls.__bases__[0])
    block.__class__ = type(cls)(cls.__name__, (base,), namespace)


@functools.lru_cache(maxsize=None)
def _recomputing(original: type[nn.Module]) -> type[nn.Module]:
    """Derives a class from ``original`` whose forward is recomputed.

    A class also applies to copies, pickles and replicas of the instance. An
    attribute ``forward`` would still call the original module, and forward hooks
    of other libraries would run in between.
    """
    _prepare_compiler()

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self._recompute_place is None:
            return original.forward(self, *args, **kwargs)
        return self._recompute_place.call(self, original.forward, args, kwargs)

    # torch.jit.script compiles the wrapped function, and looks up its names in
    # this scope.
    scope = getattr(inspect.unwrap(original.forward), "__globals__", globals())
    forward = types.FunctionType(
        forward.__code__, scope, closure=forward.__closure__
    )
    functools.update_wrapper(forward, original.forward)
    # SpeechBrain checks whether forward takes lengths, without unwrapping.
    cast(Any, forward).__signature__ = inspect.signature(original.forward)

    def __reduce_ex__(self: Any, protocol: SupportsIndex) -> Any:
        reduced = original.__reduce_ex__(self, protocol)
        if reduced[0] is not cast(
            Any, copyreg
        ).__newobj__ or "_stores_as" not in vars(type(self)):
            return reduced
        return (_new, (original,), *reduced[2:])

    return type(original)(
        original.__name__,
        (original,),
        {
            "__doc__": original.__doc__,
            "__module__": original.__module__,
            "__qualname__": original.__qualname__,
            "__reduce_ex__": __reduce_ex__,
            "_recompute_place": None,
            "_stores_as": original,
            "forward": forward,
        },
    )


def _storing(cls: type[nn.Module]) -> type[nn.Module]:
    return vars(cls).get("_stores_as", cls)


def _new(original: type[nn.Module]) -> nn.Module:
    recomputing = _recomputing(original)
    return recomputing.__new__(recomputing)
