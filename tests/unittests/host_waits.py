"""Counts where the host would wait for a GPU, on the CPU."""

import contextlib
import functools
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

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
        self.enter_context(_Masks(self))
        for owner, names in (
            (torch.Tensor, READS + ("repeat_interleave",)),
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


class _Masks(TorchDispatchMode):
    """Counts masks among indices.

    Tensor.__getitem__ cannot be replaced for a while: Python then regards tensors
    as sequences for ever, and torch.Tensor([a scalar tensor]) raises a TypeError.
    """

    def __init__(self, waits):
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.overloadpacket in (
            torch.ops.aten.index,
            torch.ops.aten.index_put_,
        ):
            self.waits.count += any(
                x is not None and x.dtype == torch.bool for x in args[1]
            )
        return op(*args, **(kwargs or {}))


def _waits(name, args, kwargs):
    if name == "repeat_interleave":
        return "output_size" not in kwargs
    # States of generators are on the CPU.
    return args[0].dtype != torch.uint8
