"""Counts where the host would wait for a GPU, on the CPU."""

import contextlib
import functools
from unittest import mock

import torch

READS = (
    "tolist",
    "item",
    "cpu",
    "numpy",
    "nonzero",
    "masked_select",
    "unique",
    "equal",
    "allclose",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
    "__contains__",
)
INDEXES = ("__getitem__", "__setitem__")
FUNCTIONS = ("nonzero", "masked_select", "unique", "equal", "allclose")


class HostWaits(contextlib.ExitStack):
    """Counts reads of values, and shapes that depend on values.

    Attributes
    ----------
    count : int
        How many there were.
    """

    def __enter__(self):
        super().__enter__()
        self.count = 0
        for owner, names in (
            (torch.Tensor, READS + INDEXES + ("repeat_interleave",)),
            (torch, FUNCTIONS + ("repeat_interleave",)),
        ):
            for name in names:
                counted = self._counted(name, getattr(owner, name))
                self.enter_context(mock.patch.object(owner, name, counted))
        return self

    def _counted(self, name, function):
        @functools.wraps(function)
        def call(*args, **kwargs):
            self.count += _waits(name, args, kwargs)
            return function(*args, **kwargs)

        return call


def _waits(name, args, kwargs):
    if name == "repeat_interleave":
        return "output_size" not in kwargs
    if name in INDEXES:
        parts = args[1] if isinstance(args[1], tuple) else args[1:2]
        return any(
            isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in parts
        )
    # States of generators are on the CPU.
    return args[0].dtype != torch.uint8
