"""Selects the blocks of a network by patterns of names.

Authors
 * The sb_memeff authors 2026
"""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import nn

from sb_memeff.utils.settings import check_integer

__all__ = ["find_segments", "refuse_nested"]


def find_segments(
    module: nn.Module | Mapping[str, nn.Module],
    blocks: str | Sequence[str],
    length: int,
) -> list[list[tuple[str, nn.Module]]]:
    """Groups the named blocks into segments.

    Arguments
    ---------
    module : torch.nn.Module or dict
        The network, or networks by name.
    blocks : str or list of str
        Names with wildcards, see ``recompute_blocks``.
    length : int
        Number of blocks in a segment.

    Returns
    -------
    list of list of tuple
        (name, module) of each block, in the network's order.

    Raises
    ------
    TypeError
        If module is neither a torch.nn.Module nor a dict of them.
    ValueError
        If a name matches nothing, or a module that cannot be recomputed, or
        if blocks are nested and length is not 1.

    Example
    -------
    >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    >>> [[name for name, _ in s] for s in find_segments(net, "*", 2)]
    [['0', '1'], ['2']]
    """
    if isinstance(module, Mapping) and all(
        isinstance(part, nn.Module) for part in module.values()
    ):
        module = nn.ModuleDict(dict(module))
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"recompute_blocks: module must be a torch.nn.Module or a dict of "
            f"them, got {type(module).__name__}."
        )
    check_integer("segment_length", length, 1)
    found = _named_blocks(module, blocks)
    segments = [found[i : i + length] for i in range(0, len(found), length)]
    if length > 1:
        refuse_nested(segments, f"segment_length={length}")
    return segments


def _named_blocks(
    module: nn.Module, patterns: str | Sequence[str]
) -> list[tuple[str, nn.Module]]:
    if isinstance(patterns, str):
        patterns = [patterns]
    if not isinstance(patterns, (list, tuple)) or not all(
        isinstance(pattern, str) for pattern in patterns
    ):
        raise ValueError(
            f"recompute_blocks: blocks must be a name or a list of names, got "
            f"{patterns!r}."
        )
    if not patterns:
        raise ValueError("recompute_blocks: blocks names no module.")
    named = list(module.named_modules(remove_duplicate=False))
    found = {}
    for pattern in patterns:
        matches = [
            (name, part)
            for name, part in named
            if _fits(_parts(name), _parts(pattern))
        ]
        if not matches:
            raise ValueError(
                f"recompute_blocks: nothing in {type(module).__name__} is "
                f"named {pattern!r}. There are: {_candidates(named)}."
            )
        callables = [m for m in matches if _is_callable(m[1])]
        if not callables:
            name, part = matches[0]
            raise ValueError(
                f"recompute_blocks: {name} is a {type(part).__name__}, which "
                f"is never called. Name its contents: '{name}.*'."
            )
        found.update((part, name) for name, part in reversed(callables))
    for block, name in found.items():
        _check_block(name, block)
    # In the network's order, not that of the patterns. A module with several
    # names has its first name.
    order = list(module.modules())
    return [(found[part], part) for part in order if part in found]


_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def _is_callable(module: nn.Module) -> bool:
    # SpeechBrain's Sequential is a ModuleDict with a forward of its own.
    return (
        not isinstance(module, _CONTAINERS)
        or type(module).forward is not nn.Module.forward
    )


def _parts(name: str) -> list[str]:
    # The module itself is named "".
    return name.split(".") if name else []


def _fits(name: list[str], pattern: list[str]) -> bool:
    if not pattern:
        return not name
    if pattern[0] == "**":
        return any(_fits(name[i:], pattern[1:]) for i in range(len(name) + 1))
    return (
        bool(name)
        and fnmatchcase(name[0], pattern[0])
        and _fits(name[1:], pattern[1:])
    )


def _candidates(named: list[tuple[str, nn.Module]], limit: int = 30) -> str:
    """Possible names of blocks, numbers as ``*``, the outermost first."""
    names = {}
    for name, part in named:
        parts = ["*" if p.isdigit() else p for p in _parts(name)]
        if parts and _is_callable(part):
            names[tuple(parts)] = None
    names = [".".join(parts) for parts in sorted(names, key=len)]
    if len(names) > limit:
        names[limit:] = ["..."]
    return ", ".join(names) or "no modules inside it"


def _check_block(name: str, block: nn.Module) -> None:
    if isinstance(block, torch.jit.ScriptModule):
        raise ValueError(
            f"recompute_blocks: {name} is compiled by torch.jit; call "
            f"recompute_blocks first, or name only its neighbours."
        )
    if "forward" in vars(block):
        raise ValueError(
            f"recompute_blocks: forward of the instance {name} "
            f"({type(block).__name__}) has been replaced, which would hide "
            f"the recomputing forward. Call recompute_blocks first."
        )


def refuse_nested(
    segments: list[list[tuple[str, nn.Module]]], option: str
) -> None:
    """Raises if blocks are nested.

    Arguments
    ---------
    segments : list of list of tuple
        As returned by ``find_segments``.
    option : str
        The option that does not allow nesting, for the message.

    Raises
    ------
    ValueError
        If a block is inside another block.
    """
    names = [name for segment in segments for name, _ in segment]
    for outer in names:
        for inner in names:
            # The network itself is named "".
            if inner.startswith(f"{outer}." if outer else "") and (
                inner != outer
            ):
                raise ValueError(
                    f"recompute_blocks: {inner} is inside "
                    f"{outer or 'the network itself'}; nested blocks need "
                    f"every=1 and segment_length=1, not "
                    f"{option}. Call recompute_blocks once for each."
                )
