"""Calls a block piece by piece over the batch.

Backward then holds the activations of one piece at a time. The sum is that of the
whole batch, up to rounding, if no sample depends on another one.

Authors
 * The sb_memeff authors 2026
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from sb_memeff.nnet.recompute.independence import (
    OutputRowsError,
    dependent_input,
)
from sb_memeff.nnet.recompute.outputs import DroppedOutput
from sb_memeff.ops.dispatch import has_values

__all__ = ["BatchPieces", "SplitError", "batch_statistics", "check_shared"]

# Names of arguments in SpeechBrain's and torch's layers. The sequences and their
# padding, for each sample:
PER_SAMPLE = frozenset(
    ["x", "src", "tgt", "memory", "query", "key", "value"]
    + ["lengths", "wav_len", "wav_lens", "key_padding_mask"]
    + ["src_key_padding_mask", "tgt_key_padding_mask"]
    + ["memory_key_padding_mask"]
)
# Positions, the same for all samples:
SHARED = frozenset(["pos_embs", "pos_embs_src", "pos_embs_tgt"])
# [T, S] for all samples, or [B * heads, T, S]:
ATTENTION_MASKS = frozenset(
    ["attn_mask", "src_mask", "tgt_mask", "memory_mask"]
)


class SplitError(ValueError):
    """Raised if a block cannot be called in pieces of the batch."""


class PieceCall(Protocol):
    """Calls a block for a piece of the batch."""

    def __call__(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, list[tuple[nn.Module, str]]]:
        """Returns the result, and the state that the call has changed."""
        ...


@dataclass
class _Argument:
    """A leaf of the arguments."""

    name: str
    value: Any
    # Rows of the first dimension that belong to one sample; 0 if it is shared.
    rows: int = 0


class BatchPieces:
    """Calls a block piece by piece over the batch.

    Arguments
    ---------
    name : str
        Name of the block, for messages.
    count : int
        Number of pieces.
    shared : list of str, optional
        Arguments of the block's forward that all samples share.

    Example
    -------
    >>> pieces = BatchPieces("linear", 4)
    >>> linear = torch.nn.Linear(2, 3)
    >>> def call(args, kwargs):
    ...     print(args[0].shape)
    ...     return linear(*args, **kwargs), []
    >>> pieces.call(
    ...     linear,
    ...     linear.forward,
    ...     linear.forward,
    ...     call,
    ...     (torch.rand(9, 2),),
    ...     {},
    ... ).shape
    torch.Size([3, 2])
    torch.Size([3, 2])
    torch.Size([3, 2])
    torch.Size([9, 3])
    """

    def __init__(
        self, name: str, count: int, shared: Sequence[str] | None = None
    ):
        self.name = name
        self.count = count
        self.shared = None if shared is None else frozenset(shared)
        # Modes of the block, training or not.
        self._independent: set[bool] = set()

    def call(
        self,
        block: nn.Module,
        forward: Callable[..., Any],
        function: Callable[..., Any],
        call_piece: PieceCall,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Calls the block.

        Arguments
        ---------
        block : torch.nn.Module
            The block.
        forward : callable
            Its forward.
        function : callable
            The same, perhaps without further outputs.
        call_piece : callable
            Calls it for a piece.
        args : tuple
            Arguments of the whole batch.
        kwargs : dict
            Its keyword arguments.

        Returns
        -------
        any
            The result for the whole batch.

        Raises
        ------
        SplitError
            If the block cannot be called in pieces.
        """
        self._check_shared(forward, kwargs)
        arguments = list(_named(forward, args, kwargs))
        first = self._first_sequence(forward, arguments)
        if first is None or len(first.value) < 2:
            return call_piece(args, kwargs)[0]
        batch = len(first.value)
        statistics = batch_statistics(block)
        if statistics:
            self._refuse(f"{statistics} takes statistics over the batch")
        for argument in arguments:
            argument.rows = self._rows_per_sample(argument, first, block)
        _, structure = tree_flatten((args, kwargs))
        self._check_independence(block, function, arguments, structure)
        # As few pieces as have this size.
        size = -(-batch // self.count)
        sizes = [min(size, batch - i) for i in range(0, batch, size)]
        if set(sizes) == {2}:
            # An output with 2 rows for any batch, such as the state of an LSTM
            # of two layers, passes the check on two samples.
            sizes[-1:] = [1, 1]
        results = []
        for number, leaves in enumerate(_cut(arguments, sizes)):
            args, kwargs = tree_unflatten(leaves, structure)
            result, changed = call_piece(args, kwargs)
            # The first call may create a table, for example.
            if number and changed:
                self._refuse_changes(block, *changed[0])
            results.append(result)
        return self._joined(results, sizes)

    def _check_shared(
        self, forward: Callable[..., Any], kwargs: dict[str, Any]
    ) -> None:
        """Raises if a name in shared may be meant for another argument.

        A forward with ``**kwargs`` shows its arguments only when it is called.
        """
        parameters = inspect.signature(forward).parameters
        shared = self.shared or frozenset()
        absent = shared - parameters.keys() - kwargs.keys()
        known = PER_SAMPLE | SHARED | ATTENTION_MASKS | shared
        others = kwargs.keys() - parameters.keys() - known
        if absent and others:
            raise SplitError(
                f"{self.name}: shared names {', '.join(sorted(absent))}, but "
                f"the call passes {', '.join(sorted(others))}."
            )

    def _first_sequence(
        self, function: Callable[..., Any], arguments: list[_Argument]
    ) -> _Argument | None:
        """The first tensor of each sample, in the order of the signature."""
        order = list(inspect.signature(function).parameters)
        candidates = [
            (order.index(a.name) if a.name in order else len(order), i)
            for i, a in enumerate(arguments)
            if isinstance(a.value, torch.Tensor)
            and a.value.dim()
            and a.name not in SHARED | ATTENTION_MASKS | (self.shared or set())
        ]
        return arguments[min(candidates)[1]] if candidates else None

    def _rows_per_sample(
        self, argument: _Argument, first: _Argument, block: nn.Module
    ) -> int:
        name, value, batch = argument.name, argument.value, len(first.value)
        if not isinstance(value, torch.Tensor) or not value.dim():
            return 0
        if name in SHARED or name in (self.shared or ()):
            return 0
        if name in ATTENTION_MASKS and value.dim() == 2:
            return 0
        if name in ATTENTION_MASKS and value.dim() == 3:
            for part in block.modules():
                heads = getattr(part, "num_heads", None)
                if isinstance(heads, int) and len(value) == batch * heads:
                    return heads
            self._refuse(
                f"its {name} has the shape {list(value.shape)}, which is not "
                f"[B * heads, T, S]"
            )
        # The size alone says nothing: a [T, T] mask of all samples has as many
        # rows as there are samples if T happens to equal B.
        if (
            argument is not first
            and self.shared is None
            and name not in PER_SAMPLE
        ):
            raise SplitError(
                f"{self.name}: split={self.count} needs to know whether its "
                f"argument {name}, of shape {list(value.shape)}, holds one "
                f"item for each sample. Add shared: [{name}] to "
                f"recompute_blocks if all samples share it, otherwise "
                f"shared: []."
            )
        if len(value) != batch:
            raise SplitError(
                f"{self.name}: split={self.count} expects {batch} samples in "
                f"each argument, as in {first.name}, but {name} has the shape "
                f"{list(value.shape)}. If all samples share it, add "
                f"shared: [{name}] to recompute_blocks."
            )
        return 1

    def _check_independence(
        self,
        block: nn.Module,
        function: Callable[..., Any],
        arguments: list[_Argument],
        structure: Any,
    ) -> None:
        """Raises if samples depend on each other; once a mode, on two."""
        tensors = [a.value for a in arguments if a.rows]
        if block.training in self._independent or not all(
            map(has_values, tensors)
        ):
            return
        leaves = next(_cut(arguments, [2]))
        try:
            found = dependent_input(
                block,
                function,
                leaves,
                [bool(a.rows) for a in arguments],
                structure,
            )
        except OutputRowsError as error:
            self._refuse_output(2, error.shape)
        if found is not None:
            name = arguments[found].name
            self._refuse(
                f"its output for one sample depends on another sample of "
                f"{name}, or the first dimension of {name} is not the batch"
            )
        self._independent.add(block.training)

    def _joined(self, results: list[Any], sizes: list[int]) -> Any:
        leaves, structures = zip(*map(tree_flatten, results))
        if any(one != structures[0] for one in structures):
            self._refuse("its outputs differ in their structure")
        whole = []
        for parts in zip(*leaves):
            first = parts[0]
            if isinstance(first, torch.Tensor):
                for part, size in zip(parts, sizes):
                    if not part.dim() or len(part) != size:
                        self._refuse_output(size, part.shape)
                    if part.shape[1:] != first.shape[1:]:
                        self._refuse(
                            f"its output has the shape {list(first.shape)} for "
                            f"one piece and {list(part.shape)} for another one"
                        )
                first = torch.cat(parts)
            elif not isinstance(first, DroppedOutput) and any(
                part != first for part in parts
            ):
                self._refuse(f"it returns a {type(first).__name__} that varies")
            whole.append(first)
        return tree_unflatten(whole, structures[0])

    def _refuse_output(self, samples: int, shape: torch.Size) -> NoReturn:
        self._refuse(
            f"for {samples} samples it returns a tensor of shape "
            f"{list(shape)}; if nobody uses it, set first_output_only=True"
        )

    def _refuse_changes(
        self, block: nn.Module, module: nn.Module, name: str
    ) -> NoReturn:
        path = next(n for n, m in block.named_modules() if m is module)
        self._refuse(
            f"each call changes {f'{path}.{name}'.lstrip('.')}, which would "
            f"then change once for each piece"
        )

    def _refuse(self, reason: str) -> NoReturn:
        raise SplitError(
            f"{self.name} cannot be called with split={self.count}: {reason}. "
            f"Set split=1 for this block."
        )


def check_shared(shared: Sequence[str], blocks: Sequence[nn.Module]) -> None:
    """Checks names of arguments that all samples share.

    Arguments
    ---------
    shared : list of str
        The names.
    blocks : list of torch.nn.Module
        The blocks.

    Raises
    ------
    ValueError
        If it is not a list of names, or if no block takes one of them.

    Example
    -------
    >>> check_shared(["input"], [torch.nn.Tanh()])
    """
    if isinstance(shared, str) or not _are_names(shared):
        raise ValueError(
            f"recompute_blocks: shared must be a list of names, got {shared!r}."
        )
    known: dict[str, None] = {}
    for block in blocks:
        parameters = inspect.signature(block.forward).parameters
        if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            return
        known.update(dict.fromkeys(parameters))
    unknown = [name for name in shared if name not in known]
    if unknown:
        raise ValueError(
            f"recompute_blocks: shared names {', '.join(unknown)}, but the "
            f"arguments of the blocks are {', '.join(known)}."
        )


def _are_names(names: object) -> bool:
    return isinstance(names, (list, tuple, set, frozenset)) and all(
        isinstance(name, str) for name in names
    )


def batch_statistics(block: nn.Module) -> str | None:
    """Finds a norm that takes statistics over the batch.

    Arguments
    ---------
    block : torch.nn.Module
        The block.

    Returns
    -------
    str or None
        Its name and class, if there is one.

    Example
    -------
    >>> norm = torch.nn.BatchNorm1d(3)
    >>> batch_statistics(torch.nn.Sequential(norm))
    '0 (BatchNorm1d)'
    >>> batch_statistics(norm.eval()) is None
    True
    """
    for name, part in block.named_modules():
        if isinstance(part, _BatchNorm):
            takes = part.training or part.running_mean is None
        else:
            # Normalises each sample, but averages the statistics that it keeps.
            takes = (
                isinstance(part, _InstanceNorm)
                and part.training
                and part.running_mean is not None
            )
        if takes:
            return f"{name or 'it'} ({type(part).__name__})"
    return None


def _named(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Iterator[_Argument]:
    """The leaves of the arguments, in their order."""
    parameters = list(inspect.signature(function).parameters.values())
    names = []
    for parameter in parameters:
        if parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_KEYWORD):
            break
        names.append(parameter.name)
    # The others are items of *args, the last one.
    names += names[-1:] * (len(args) - len(names))
    for name, value in (*zip(names, args), *kwargs.items()):
        for leaf in tree_leaves(value):
            yield _Argument(name, leaf)


def _cut(arguments: list[_Argument], sizes: list[int]) -> Iterator[list[Any]]:
    """The leaves for pieces of the given numbers of samples."""
    # A tensor passed twice must be one object in each piece: attention tests
    # whether query and key are the same object.
    parts = {}
    for a in arguments:
        if a.rows and id(a.value) not in parts:
            rows = [a.rows * size for size in sizes]
            value = a.value[: sum(rows)]
            parts[id(a.value)] = value.split(rows)
    for number in range(len(sizes)):
        yield [
            parts[id(a.value)][number] if a.rows else a.value for a in arguments
        ]
