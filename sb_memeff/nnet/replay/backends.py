"""Make torch pick the same algorithms in forward and in backward.

cuDNN's benchmark times the algorithms of a convolution and keeps the fastest.
Its cache is per thread, and backward runs in a thread of its own: forward and
replay may pick different algorithms, which round differently. Without
benchmark, cuDNN picks by the shapes.

Authors
 * The sb_memeff authors 2026
"""

import contextlib
import functools
from collections.abc import Generator
from typing import Any

import torch

__all__ = ["BackendFlags"]


# Names within torch.backends.
_FLAGS = [
    "cudnn.enabled",
    "cudnn.benchmark",
    "cudnn.deterministic",
    "mkldnn.enabled",
    "mkldnn.deterministic",
    "cuda.matmul.allow_fp16_reduced_precision_reduction",
    "cuda.matmul.allow_bf16_reduced_precision_reduction",
]
# The switches for TF32 have two interfaces, of which torch 2.8 has the older
# alone. Reading the older one raises an error where the newer one was used.
_OLDER_TF32 = ["cudnn.allow_tf32"]
_TF32 = [
    "cuda.matmul.fp32_precision",
    "cudnn.conv.fp32_precision",
    "cudnn.rnn.fp32_precision",
    "mkldnn.matmul.fp32_precision",
    "mkldnn.conv.fp32_precision",
    "mkldnn.rnn.fp32_precision",
]
_MATMUL = "float32_matmul_precision"


class BackendFlags:
    """Flags of torch's backends that change how results are rounded.

    They are read when the object is made, in forward.

    Example
    -------
    >>> torch.backends.cudnn.benchmark = True
    >>> flags = BackendFlags()
    >>> with flags.applied():
    ...     torch.backends.cudnn.benchmark
    False
    >>> torch.backends.cudnn.benchmark
    True
    >>> torch.backends.cudnn.benchmark = False
    """

    def __init__(self):
        self._wanted = {**_read_all(), "cudnn.benchmark": False}

    @contextlib.contextmanager
    def applied(self) -> Generator[None, None, None]:
        """Sets the flags of forward, with cuDNN's benchmark off."""
        now = _read_all()
        others = {
            name: now.get(name)
            for name, value in self._wanted.items()
            if now.get(name) != value
        }
        _write({name: self._wanted[name] for name in others})
        try:
            yield
        finally:
            _write(others)


# A compiler cannot trace it, and need not.
@torch.compiler.disable
def _read_all() -> dict[str, Any]:
    values = {name: _read(name) for name in _known_flags()}
    return {name: value for name, value in values.items() if value is not None}


def _read(name: str) -> Any:
    try:
        if name == _MATMUL:
            return torch.get_float32_matmul_precision()
        return getattr(*_locate(name))
    except RuntimeError:
        return None


def _write(wanted: dict[str, Any]) -> None:
    for name, value in wanted.items():
        # Not without need: writing to one interface may spoil the other.
        if value is None or _read(name) == value:
            continue
        if name == _MATMUL:
            torch.set_float32_matmul_precision(value)
        else:
            setattr(*_locate(name), value)


@functools.cache
def _known_flags() -> list[str]:
    # The older interface first: it changes what the newer one says.
    others = [name for name in _FLAGS + _TF32 if hasattr(*_locate(name))]
    return [_MATMUL, *_OLDER_TF32, *others]


@functools.cache
def _locate(name: str) -> tuple[Any, str]:
    """The object in torch.backends that has a flag, and the flag's name."""
    *path, flag = name.split(".")
    return functools.reduce(getattr, path, torch.backends), flag
