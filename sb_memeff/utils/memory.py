"""Peak memory of a training step, without a GPU and without the arithmetic.

Authors
 * The sb_memeff authors 2026
"""

import contextlib
import weakref
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["StepMemory", "StorageTracker", "training_step_memory"]


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
    input_shape : tuple of int
        Shape of the float32 input.
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
        x = torch.zeros(input_shape)
        weights = [p for p in model.parameters() if p.requires_grad]
        updater = optimizer(weights) if optimizer else None
        for _ in range(2 if updater else 1):
            before = tracker.alive
            with torch.autocast("cpu", autocast, enabled=bool(autocast)):
                y = model(x)
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
