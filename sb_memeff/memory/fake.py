"""Fake tensors: shapes, dtypes and devices without memory or arithmetic.

Authors
 * The sb_memeff authors 2026
"""

import contextlib
import copy
import functools
import gc
import logging
import types
import weakref
from collections.abc import Callable, Collection, Generator, Iterable, Iterator
from typing import Any, cast

import torch
from torch import nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
)
from torch.utils._pytree import tree_leaves, tree_map_only

from sb_memeff.memory.arguments import tensors_in
from sb_memeff.memory.attention import FUSED_ATTENTION, fused_attention
from sb_memeff.memory.filters import real_filters
from sb_memeff.memory.imports import around_imports

__all__ = ["fake_tensors", "without_data"]

# Largest number of elements of a tensor that keeps its values: integers and
# booleans (lengths, masks, labels), and floating-point numbers (weights have
# more).
MAX_INTEGERS = 2**24
MAX_FLOATS = 2**12


@contextlib.contextmanager
def fake_tensors() -> Generator[None, None, None]:
    """Makes fake tensors within the context; small ones keep their values.

    In torch's FakeTensorMode no tensor has values, so code that reads a length
    fails. Here everything that depends only on small tensors (lengths, masks,
    labels; not weights or activations) is computed as well.
    ``scaled_dot_product_attention`` stores what it does on a GPU.

    Existing real tensors, such as those in caches, may be used; afterwards their
    old values are restored. Tensors made by modules that are imported within the
    context are real.

    Raises
    ------
    ValueError
        Within the context, if code reads an unknown value or computes
        gradients of an existing real tensor.

    Example
    -------
    >>> with fake_tensors():
    ...     x = torch.rand(1000, 1000) @ torch.rand(1000, 10)
    ...     lengths = torch.tensor([3, 5])
    ...     longest = lengths.max().item()
    >>> type(x).__name__, x.shape, longest
    ('FakeTensor', torch.Size([1000, 10]), 5)
    """
    fake = FakeTensorMode()
    # Small random tensors are really drawn, so restore the random state.
    with torch.random.fork_rng([]), _quiet(), fake, _KnownValues(fake):
        # Constants of imported modules outlive the context.
        imports = around_imports(lambda module: _disable_current_modes())
        with fused_attention(), real_filters(), imports:
            yield


@contextlib.contextmanager
def _quiet() -> Generator[None, None, None]:
    """Stops torch from logging the errors that it also raises."""
    logger = logging.getLogger(FakeTensorMode.__module__)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


class _KnownValues(TorchDispatchMode):
    """Computes the values of small tensors besides their fakes."""

    def __init__(self, fake: FakeTensorMode):
        super().__init__()
        self.fake = fake
        # Storages whose values have become unknown.
        self.unknown = weakref.WeakSet()
        # Values of real storages before an operator changed them.
        self.before = weakref.WeakKeyDictionary()

    # pyrefly: ignore[bad-override]
    def __exit__(self, *error: Any) -> Any:
        """Restores the values of real tensors."""
        result = super().__exit__(*error)
        with torch._C._DisableTorchDispatch():
            for storage, values in self.before.items():
                storage.copy_(values)
        return result

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Collection[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Runs the operator on fakes and, if all values are known, on values."""
        if func is torch.ops.prim.device.default:
            # More than half of all calls: autograd asks each fake tensor.
            return args[0].device
        kwargs = kwargs or {}
        tensors = tensors_in((args, kwargs))
        self.check_modes(tensors)
        real = [x for x in tensors if not isinstance(x, FakeTensor)]
        if real and func is not torch.ops.aten.lift_fresh.default:
            for x in self.overwritten(func, args, kwargs):
                self.save_values(x)
            if len(real) == len(tensors) and all(
                self.value(x) is not None for x in real
            ):
                # A random generator's state, or a part of a cache.
                return self.on_values(func, args, kwargs)
            args, kwargs = tree_map_only(
                torch.Tensor, self.converted, (args, kwargs)
            )
            tensors = [self.converted(x) for x in tensors]
        known = all(self.value(x) is not None for x in tensors)
        if known and func is torch.ops.aten._local_scalar_dense.default:
            # An optimizer asks each parameter's number of steps.
            return self.on_values(func, args, kwargs)
        if func is torch.ops.aten.index.Tensor:
            args = args[0], self.without_masks(args[1])
        try:
            if func in _FAKE_FORMS:
                # Without values, even if they could be known: a CPU has no LSTM
                # in half precision.
                return _FAKE_FORMS[func](self, *args)
            result = func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            if not known:
                raise ValueError(
                    f"This step cannot be analysed without running it: "
                    f"{func} needs a value that depends on weights or data."
                ) from None
            return self.faked(self.on_values(func, args, kwargs))
        if func in FUSED_ATTENTION:
            known = False
        if known and all(
            x.numel() <= _max_elements(x) for x in tensors_in(result)
        ):
            self.remember(result, self.on_values(func, args, kwargs))
        else:
            self.forget_overwritten(func, args, kwargs)
        return result

    def check_modes(self, tensors: Iterable[torch.Tensor]) -> None:
        """Raises if a fake is of another mode."""
        for x in tensors:
            if isinstance(x, FakeTensor) and x.fake_mode is not self.fake:
                raise ValueError(
                    f"This step uses a fake tensor of another analysis, of "
                    f"shape {list(x.shape)}: create it again."
                )

    def converted(self, tensor: torch.Tensor) -> FakeTensor:
        """Returns the fake of a real tensor, the same one on each call."""
        if isinstance(tensor, FakeTensor):
            return tensor
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"This step computes gradients of a tensor of shape "
                f"{list(tensor.shape)} that existed before the analysis: "
                f"create it in build_model or in the step."
            )
        fake = self.fake.from_tensor(tensor)
        self.remember(fake, tensor)
        return fake

    def save_values(self, tensor: torch.Tensor) -> None:
        """Saves the values of a real tensor, to restore them later."""
        storage = tensor.untyped_storage()
        if not isinstance(tensor, FakeTensor) and storage not in self.before:
            with torch._C._DisableTorchDispatch():
                self.before[storage] = storage.clone()

    def value(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """Returns the values of a tensor, or None if they are unknown."""
        value = tensor
        if isinstance(tensor, FakeTensor):
            value = getattr(tensor, "_sb_memeff_value", None)
        if value is None or value.untyped_storage() in self.unknown:
            return None
        return value

    def without_masks(
        self, indices: Iterable[torch.Tensor | None]
    ) -> list[torch.Tensor | None]:
        """Replaces known masks among indices by integers of known number."""
        result = []
        for index in indices:
            mask = None if index is None else self.value(index)
            if mask is not None and mask.dtype == torch.bool:
                with torch._C._DisableTorchDispatch():
                    integers = mask.nonzero().unbind(1)
                result += self.faked(integers)
            else:
                result.append(index)
        return result

    def on_values(
        self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Runs the operator on values."""
        args, kwargs = tree_map_only(torch.Tensor, self.value, (args, kwargs))
        # The only mode below this one is FakeTensorMode.
        with torch._C._DisableTorchDispatch():
            return func(*args, **kwargs)

    def faked(self, result: Any) -> Any:
        """Converts tensors to fakes with known values."""

        def fake(value: torch.Tensor) -> FakeTensor:
            tensor = self.fake.from_tensor(value)
            self.remember(tensor, value)
            return tensor

        return tree_map_only(torch.Tensor, fake, result)

    def remember(self, result: Any, values: Any) -> None:
        """Attaches values to fakes."""
        for tensor, value in zip(tree_leaves(result), tree_leaves(values)):
            if isinstance(tensor, FakeTensor):
                cast(Any, tensor)._sb_memeff_value = value

    def forget_overwritten(
        self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Marks the values of overwritten tensors as unknown."""
        for tensor in self.overwritten(func, args, kwargs):
            value = self.value(tensor)
            if value is not None:
                self.unknown.add(value.untyped_storage())

    def overwritten(
        self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Iterator[torch.Tensor]:
        """Yields the tensors that the operator writes to."""
        for number, name in _overwritten(func):
            given = args[number] if number < len(args) else kwargs.get(name)
            yield from tensors_in(given)


def _ctc_loss(
    mode: _KnownValues,
    log_probs: torch.Tensor,
    targets: torch.Tensor,
    frames: torch.Tensor,
    counts: torch.Tensor,
    *options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and alphas; FakeTensorMode does not support lengths in tensors."""
    rows, batch, _ = log_probs.shape
    with torch._C._DisableTorchDispatch():
        known = cast(torch.Tensor, mode.value(counts))
        columns = 2 * int(known.max()) + 1
    return (
        log_probs.new_empty(batch),
        log_probs.new_empty(batch, rows, columns),
    )


def _ctc_loss_backward(
    mode: _KnownValues,
    gradient: torch.Tensor,
    log_probs: torch.Tensor,
    *others: Any,
) -> torch.Tensor:
    """The gradient of the log-probabilities."""
    return torch.empty_like(log_probs)


def _lstm(
    mode: _KnownValues, x: torch.Tensor, weight: torch.Tensor, *others: Any
) -> tuple[torch.Tensor, ...]:
    """Adds the workspace that oneDNN keeps for backward.

    FakeTensorMode omits it. It consists of the gates, and of states and
    gradients in rows as long as the longer of input and state. This is within
    3 % of the measured size.
    """
    layer = torch.ops.aten.mkldnn_rnn_layer.default
    *outputs, _ = layer(x, weight, *others)
    steps, batch = outputs[0].shape[:2]
    hidden = weight.shape[0] // 4
    row = -(-max(x.shape[-1], hidden) // 16) * 16
    elements = steps * 4 * hidden + (steps + 1) * (6 * row + 5 * hidden)
    return (*outputs, x.new_empty(4 * batch * elements, dtype=torch.uint8))


_FAKE_FORMS: dict[OpOverload, Callable[..., Any]] = {
    torch.ops.aten.mkldnn_rnn_layer.default: _lstm,
    torch.ops.aten._ctc_loss.Tensor: _ctc_loss,
    torch.ops.aten._ctc_loss_backward.Tensor: _ctc_loss_backward,
}


@functools.lru_cache(maxsize=None)
def _overwritten(func: OpOverload) -> list[tuple[int, str]]:
    return [
        (number, argument.name)
        for number, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]


def _max_elements(tensor: torch.Tensor) -> int:
    return MAX_FLOATS if tensor.is_floating_point() else MAX_INTEGERS


def without_data(module: nn.Module) -> nn.Module:
    """Copies a module with new, uninitialised parameters and buffers.

    Under ``fake_tensors`` they take no memory. The copy shares the module's
    other tensors, such as cached ones.

    Arguments
    ---------
    module : torch.nn.Module
        The module.

    Returns
    -------
    torch.nn.Module
        The copy, with the same shapes, layouts, dtypes and devices.

    Example
    -------
    >>> with FakeTensorMode():
    ...     copied = without_data(torch.nn.Linear(2, 3))
    >>> copied.weight
    Parameter(FakeTensor(..., size=(3, 2), requires_grad=True))
    """
    own = {id(x) for x in (*module.parameters(), *module.buffers())}
    known = {
        id(x): _like(x) if x.requires_grad or id(x) in own else x
        for x in _tensors_in(module)
    }
    return copy.deepcopy(module, known)


def _tensors_in(module: nn.Module) -> Iterator[torch.Tensor]:
    """Yields all tensors that a deep copy of the module would copy."""
    found, queue = {}, [module]
    while queue:
        one = queue.pop()
        if id(one) in found or isinstance(one, _NOT_COPIED):
            continue
        found[id(one)] = one
        if isinstance(one, torch.Tensor):
            yield one
        else:
            queue += gc.get_referents(one)


_NOT_COPIED = (type, types.ModuleType, types.FunctionType, weakref.ref)


def _like(tensor: torch.Tensor) -> torch.Tensor:
    new = torch.empty_strided(
        tensor.size(), tensor.stride(), dtype=tensor.dtype, device=tensor.device
    )
    if isinstance(tensor, torch.nn.Parameter):
        return torch.nn.Parameter(new, tensor.requires_grad)
    return new.requires_grad_(tensor.requires_grad)
