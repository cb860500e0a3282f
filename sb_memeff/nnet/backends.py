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
from collections.abc import Iterator

import torch

__all__ = ["BackendFlags"]


# Names within torch.backends. The switches for TF32 have two interfaces, and
# torch raises an error if the older one is read after the newer one was used;
# torch 2.8 has the older one alone.
_TF32 = [
    "cuda.matmul.fp32_precision",
    "cudnn.conv.fp32_precision",
    "cudnn.rnn.fp32_precision",
    "mkldnn.matmul.fp32_precision",
    "mkldnn.conv.fp32_precision",
    "mkldnn.rnn.fp32_precision",
]
_OLDER_TF32 = ["cuda.matmul.allow_tf32", "cudnn.allow_tf32"]
_FLAGS = [
    "cudnn.enabled",
    "cudnn.benchmark",
    "cudnn.deterministic",
    "mkldnn.enabled",
    "cuda.matmul.allow_fp16_reduced_precision_reduction",
    "cuda.matmul.allow_bf16_reduced_precision_reduction",
]


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
        self._wanted = {**_read(), "cudnn.benchmark": False}

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Sets the flags of forward, with cuDNN's benchmark off."""
        before = _read()
        _write(self._wanted, before)
        try:
            yield
        finally:
            _write(before, self._wanted)


def _read():
    return {name: getattr(*_locate(name)) for name in _known_flags()}


def _write(wanted, present):
    for name, value in wanted.items():
        if value != present[name]:
            setattr(*_locate(name), value)


@functools.cache
def _known_flags():
    newer = all(hasattr(*_locate(name)) for name in _TF32)
    return [*_FLAGS, *(_TF32 if newer else _OLDER_TF32)]


@functools.cache
def _locate(name):
    """The object in torch.backends that has a flag, and the flag's name."""
    *path, flag = name.split(".")
    return functools.reduce(getattr, path, torch.backends), flag
