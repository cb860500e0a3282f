"""Peak memory of a training step, without a GPU and without the arithmetic.

Authors
 * The sb_memeff authors 2026
"""

import contextlib
import copy
import math
import re
import weakref
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = [
    "StepMemory",
    "StorageTracker",
    "format_bytes",
    "parse_bytes",
    "training_step_memory",
    "without_data",
]


class StorageTracker(TorchDispatchMode):
    """Adds up the storages that are alive, and remembers the most.

    Every tensor that an operator returns while the mode is on is counted
    until its storage is freed; views and in-place results share a storage and
    count once. What an operator uses inside itself (a convolution's
    workspace) is not seen.

    Arguments
    ---------
    but : iterable of torch.Tensor
        Tensors that were there before and do not count, nor do their views.

    Example
    -------
    >>> with StorageTracker() as tracker:
    ...     x = torch.zeros(1000)
    ...     y = x + 1
    ...     del x
    >>> tracker.alive, tracker.peak
    (4000, 8000)
    """

    def __init__(self, but=()):
        super().__init__()
        self.alive = 0
        self.peak = 0
        self._known = weakref.WeakSet(x.untyped_storage() for x in but)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Runs the operator and counts what it returns."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage):
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._free, size)

    def _free(self, size):
        self.alive -= size


@dataclass
class StepMemory:
    """Memory of one training step, in bytes.

    Arguments
    ---------
    parameters : int
        Number of trainable parameters (a count, not bytes).
    parameter_bytes : int
        What they take.
    saved_bytes : int
        Activations alive between forward and backward.
    peak_bytes : int
        The most that was alive at any time: parameters, buffers, gradients,
        optimizer states, activations and temporaries.
    """

    parameters: int
    parameter_bytes: int
    saved_bytes: int
    peak_bytes: int

    @property
    def activation_bytes(self):
        """The peak beyond parameters and their gradients."""
        return self.peak_bytes - 2 * self.parameter_bytes


def training_step_memory(
    build_model, input_shape, optimizer=None, autocast=None, fake=True
):
    """Measures forward, backward and (if asked) the optimizer's step.

    Arguments
    ---------
    build_model : callable
        Returns the torch.nn.Module; called without arguments.
    input_shape : tuple of int or callable
        Shape of the float32 input; or a function that takes the model, calls
        it and returns its output or loss, a tensor.
    optimizer : callable, optional
        Takes the parameters and returns an optimizer. Two steps are run then,
        so that its states are there when activations are largest.
    autocast : torch.dtype, optional
        Run forward under autocast with this dtype.
    fake : bool
        Fake tensors: no arithmetic, no memory. False runs the step on the
        CPU.

    Returns
    -------
    StepMemory
        What was counted.

    Example
    -------
    >>> build = lambda: torch.nn.Linear(1000, 1000)
    >>> memory = training_step_memory(build, (8, 1000))
    >>> memory.parameters
    1001000
    """
    mode = FakeTensorMode() if fake else contextlib.nullcontext()
    with mode, StorageTracker() as tracker:
        model = build_model()
        if callable(input_shape):
            run = input_shape
        else:
            x = torch.zeros(input_shape)

            def run(model):
                return model(x)

        weights = [p for p in model.parameters() if p.requires_grad]
        updater = optimizer(weights) if optimizer else None
        for _ in range(2 if updater else 1):
            before = tracker.alive
            with torch.autocast("cpu", autocast, enabled=bool(autocast)):
                y = run(model)
            saved = tracker.alive - before
            # Under fake tensors sum() would do; the gradient is what counts.
            y.backward(torch.ones_like(y))
            del y
            if updater:
                updater.step()
                updater.zero_grad()
    return StepMemory(
        parameters=sum(p.numel() for p in weights),
        parameter_bytes=sum(p.numel() * p.element_size() for p in weights),
        saved_bytes=saved,
        peak_bytes=tracker.peak,
    )


def without_data(module):
    """A copy of a module whose tensors are new and hold nothing.

    Under FakeTensorMode it takes no memory.

    Arguments
    ---------
    module : torch.nn.Module
        The module.

    Returns
    -------
    torch.nn.Module
        The copy: same shapes, layouts, dtypes, devices.

    Example
    -------
    >>> with FakeTensorMode():
    ...     copied = without_data(torch.nn.Linear(2, 3))
    >>> copied.weight
    Parameter(FakeTensor(..., size=(3, 2), requires_grad=True))
    """
    known = {}
    for part in module.modules():
        for group in (part._parameters, part._buffers, vars(part)):
            for tensor in group.values():
                if isinstance(tensor, torch.Tensor):
                    known[id(tensor)] = _like(tensor)
    return copy.deepcopy(module, known)


def _like(tensor):
    new = torch.empty_strided(
        tensor.size(), tensor.stride(), dtype=tensor.dtype, device=tensor.device
    )
    if isinstance(tensor, torch.nn.Parameter):
        return torch.nn.Parameter(new, tensor.requires_grad)
    return new.requires_grad_(tensor.requires_grad)


def parse_bytes(size):
    """The number of bytes that a size such as "11GB" stands for.

    Arguments
    ---------
    size : int or str
        Bytes; or a number and one of B, kB, MB, GB, TB (powers of 1000),
        KiB, MiB, GiB, TiB (powers of 1024).

    Returns
    -------
    int
        Bytes.

    Raises
    ------
    ValueError
        If it is neither, or not positive.

    Example
    -------
    >>> parse_bytes("11GB"), parse_bytes("1.5 GiB")
    (11000000000, 1610612736)
    """
    number = size
    if isinstance(size, str):
        match = re.fullmatch(
            r"(\d+(?:\.\d*)?)\s*(?:([kmgt])(i?))?b", size.strip().lower()
        )
        number = 0
        if match:
            digits, prefix, binary = match.groups()
            power = "kmgt".index(prefix) + 1 if prefix else 0
            number = float(digits) * (1024 if binary else 1000) ** power
    if not isinstance(number, (int, float)) or not number > 0:
        raise ValueError(
            f"A size is a number of bytes or such as '11GB' or '10.5 GiB', "
            f"not {size!r}."
        )
    return int(number)


def format_bytes(size):
    """A number of bytes for people.

    Arguments
    ---------
    size : int
        Bytes.

    Returns
    -------
    str
        Three digits or more and B, kB, MB or GB (powers of 1000).

    Example
    -------
    >>> format_bytes(11_264_000_000), format_bytes(512)
    ('11.3 GB', '512 B')
    """
    for power, unit in ((3, "GB"), (2, "MB"), (1, "kB")):
        if size >= 1000**power:
            value = size / 1000**power
            digits = max(0, 2 - int(math.log10(value)))
            return f"{value:.{digits}f} {unit}"
    return f"{size} B"
