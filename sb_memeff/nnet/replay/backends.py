"""Makes torch use the same algorithms in forward and backward.

cuDNN's benchmark times the algorithms of a convolution and caches the fastest.
The cache is per thread, and backward runs in its own thread. Forward and replay
may therefore use different algorithms, which round differently. Without
benchmark, cuDNN chooses by shape.

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
# The flags for TF32 have two interfaces; torch 2.8 has only the older one. Reading
# the older one raises an error if the newer one was used.
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
    """Flags of torch's backends that affect rounding.

    The constructor reads them, in forward.

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


# A compiler cannot trace this, and need not.
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


def _write(flags: dict[str, Any]) -> None:
    for name, value in flags.items():
        # Only if needed: writing to one interface may invalidate the other.
        if value is None or _read(name) == value:
            continue
        if name == _MATMUL:
            torch.set_float32_matmul_precision(value)
        else:
            setattr(*_locate(name), value)


@functools.lru_cache(maxsize=None)
def _known_flags() -> list[str]:
    # The older interface first, because it changes the newer one's values.
    others = filter(_exists, _FLAGS + _TF32)
    return [_MATMUL, *_OLDER_TF32, *others]


def _exists(name: str) -> bool:
    try:
        return hasattr(*_locate(name))
    except AttributeError:
        # torch 2.8 has no torch.backends.cudnn.conv.
        return False


@functools.lru_cache(maxsize=None)
def _locate(name: str) -> tuple[Any, str]:
    """The object in torch.backends that has a flag, and the flag's name."""
    *path, flag = name.split(".")
    return functools.reduce(getattr, path, torch.backends), flag
