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

from sb_memeff.memory.imports import around_imports

__all__ = ["fake_tensors", "without_data"]

# Lengths, masks and labels keep their values up to so many elements; numbers
# with a fraction, of which networks are made, only to very few.
MOST_WHOLE = 2**24
MOST_FLOATING = 2**12


@contextlib.contextmanager
def fake_tensors() -> Generator[None, None, None]:
    """Tensors made meanwhile are fake, but small ones keep their values.

    torch's FakeTensorMode knows no values at all, so that code which looks at
    a length stops it. Here whatever follows from small tensors alone
    (lengths, masks, labels; not weights or activations) is computed as well.

    Real tensors that were there before (what caches hold) may be used;
    afterwards they have their values of before. What modules that are imported
    meanwhile make is real, too.

    Raises
    ------
    ValueError
        In the code that runs meanwhile, if it asks for a value that is not
        known, or computes gradients of a tensor that was there before.

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
    # Small random tensors are drawn: not at the expense of others.
    with (
        torch.random.fork_rng([]),
        _quiet(),
        fake,
        _KnownValues(fake),
        # Constants of modules outlive this.
        around_imports(lambda module: _disable_current_modes()),
    ):
        yield


@contextlib.contextmanager
def _quiet() -> Generator[None, None, None]:
    """Keeps torch from logging, with a traceback, errors that it raises."""
    logger = logging.getLogger(FakeTensorMode.__module__)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


class _KnownValues(TorchDispatchMode):
    """Computes small tensors beside their fakes."""

    def __init__(self, fake: FakeTensorMode):
        super().__init__()
        self.fake = fake
        # Storages that were changed by something unknown.
        self.spoilt = weakref.WeakSet()
        # What real storages held before an operator changed them.
        self.before = weakref.WeakKeyDictionary()

    # pyrefly: ignore[bad-override]
    def __exit__(self, *error: Any) -> Any:
        """Gives real tensors back their values."""
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
        """Runs the operator on fakes and, if all is known, on values."""
        kwargs = kwargs or {}
        tensors = [
            x
            for x in tree_leaves((args, kwargs))
            if isinstance(x, torch.Tensor)
        ]
        self.refuse_others(tensors)
        real = [x for x in tensors if not isinstance(x, FakeTensor)]
        if real and func is not torch.ops.aten.lift_fresh.default:
            for x in self.overwritten(func, args, kwargs):
                self.remember_before(x)
            if len(real) == len(tensors) and all(
                self.value(x) is not None for x in real
            ):
                # The state of a random generator, or a part of a cache.
                return self.on_values(func, args, kwargs)
            args, kwargs = tree_map_only(
                torch.Tensor, self.converted, (args, kwargs)
            )
            tensors = [self.converted(x) for x in tensors]
        known = all(self.value(x) is not None for x in tensors)
        if func is torch.ops.aten.index.Tensor:
            args = args[0], self.positions(args[1])
        try:
            if func in _IMITATIONS and not known:
                return _IMITATIONS[func](self, *args)
            result = func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            if not known:
                raise ValueError(
                    f"This step cannot be analysed without running it: "
                    f"{func} asks for a value that depends on weights or data."
                ) from None
            return self.faked(self.on_values(func, args, kwargs))
        if known and all(
            x.numel() <= _most(x)
            for x in tree_leaves(result)
            if isinstance(x, torch.Tensor)
        ):
            self.remember(result, self.on_values(func, args, kwargs))
        else:
            self.spoil(func, args, kwargs)
        return result

    def refuse_others(self, tensors: Iterable[torch.Tensor]) -> None:
        """Raises for fakes that are not of this mode."""
        for x in tensors:
            if isinstance(x, FakeTensor) and x.fake_mode is not self.fake:
                raise ValueError(
                    f"This step uses a fake tensor of another analysis, of "
                    f"shape {list(x.shape)}: make it anew."
                )

    def converted(self, tensor: torch.Tensor) -> FakeTensor:
        """The fake of a real tensor, always the same one."""
        if isinstance(tensor, FakeTensor):
            return tensor
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"This step computes gradients of a tensor of shape "
                f"{list(tensor.shape)} that was made before the analysis: make "
                f"it in build_model or in the step."
            )
        fake = self.fake.from_tensor(tensor)
        self.remember(fake, tensor)
        return fake

    def remember_before(self, tensor: torch.Tensor) -> None:
        """Keeps what a real tensor holds, to be given back."""
        storage = tensor.untyped_storage()
        if not isinstance(tensor, FakeTensor) and storage not in self.before:
            with torch._C._DisableTorchDispatch():
                self.before[storage] = storage.clone()

    def value(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """Values of a tensor, or None."""
        found = tensor
        if isinstance(tensor, FakeTensor):
            found = getattr(tensor, "_sb_memeff_value", None)
        if found is None or found.untyped_storage() in self.spoilt:
            return None
        return found

    def positions(
        self, indices: Iterable[torch.Tensor | None]
    ) -> list[torch.Tensor | None]:
        """Known masks among indices as numbers, whose count is known too."""
        found = []
        for index in indices:
            mask = None if index is None else self.value(index)
            if mask is not None and mask.dtype == torch.bool:
                with torch._C._DisableTorchDispatch():
                    places = mask.nonzero().unbind(1)
                found += self.faked(places)
            else:
                found.append(index)
        return found

    def on_values(
        self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Runs the operator on values."""
        args, kwargs = tree_map_only(torch.Tensor, self.value, (args, kwargs))
        # Below this mode there is only FakeTensorMode.
        with torch._C._DisableTorchDispatch():
            return func(*args, **kwargs)

    def faked(self, result: Any) -> Any:
        """The fakes of tensors, which remember them."""

        def fake(value: torch.Tensor) -> FakeTensor:
            tensor = self.fake.from_tensor(value)
            self.remember(tensor, value)
            return tensor

        return tree_map_only(torch.Tensor, fake, result)

    def remember(self, result: Any, values: Any) -> None:
        """Lets fakes know their values."""
        for tensor, value in zip(
            tree_leaves(result), tree_leaves(values), strict=True
        ):
            if isinstance(tensor, FakeTensor):
                cast(Any, tensor)._sb_memeff_value = value

    def spoil(
        self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Forgets what the operator overwrites."""
        for tensor in self.overwritten(func, args, kwargs):
            value = self.value(tensor)
            if value is not None:
                self.spoilt.add(value.untyped_storage())

    def overwritten(
        self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Iterator[torch.Tensor]:
        """The tensors that the operator writes into."""
        for number, name in _overwritten(func):
            given = args[number] if number < len(args) else kwargs.get(name)
            for tensor in tree_leaves(given):
                if isinstance(tensor, torch.Tensor):
                    yield tensor


def _ctc_loss(
    mode: _KnownValues,
    log_probs: torch.Tensor,
    targets: torch.Tensor,
    frames: torch.Tensor,
    counts: torch.Tensor,
    *options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and alphas; FakeTensorMode has nothing for lengths in tensors."""
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
    """Workspace that oneDNN keeps for backward; FakeTensorMode overlooks it.

    The gates, and states and gradients in rows as long as the longer of
    input and state; measured, and within 3 % of it.
    """
    layer = torch.ops.aten.mkldnn_rnn_layer.default
    *outputs, _ = layer(x, weight, *others)
    steps, batch = outputs[0].shape[:2]
    hidden = weight.shape[0] // 4
    row = -(-max(x.shape[-1], hidden) // 16) * 16
    kept = steps * 4 * hidden + (steps + 1) * (6 * row + 5 * hidden)
    return (*outputs, x.new_empty(4 * batch * kept, dtype=torch.uint8))


_IMITATIONS: dict[OpOverload, Callable[..., Any]] = {
    torch.ops.aten.mkldnn_rnn_layer.default: _lstm,
    torch.ops.aten._ctc_loss.Tensor: _ctc_loss,
    torch.ops.aten._ctc_loss_backward.Tensor: _ctc_loss_backward,
}


@functools.cache
def _overwritten(func: OpOverload) -> list[tuple[int, str]]:
    return [
        (number, argument.name)
        for number, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]


def _most(tensor: torch.Tensor) -> int:
    return MOST_FLOATING if tensor.is_floating_point() else MOST_WHOLE


def without_data(module: nn.Module) -> nn.Module:
    """A copy of a module whose parameters and buffers are new and hold nothing.

    Under ``fake_tensors`` they take no memory. Other tensors in the module,
    what it has cached, are shared with the copy.

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
    own = {id(x) for x in (*module.parameters(), *module.buffers())}
    known = {
        id(x): _like(x) if x.requires_grad or id(x) in own else x
        for x in _tensors_in(module)
    }
    return copy.deepcopy(module, known)


def _tensors_in(module: nn.Module) -> Iterator[torch.Tensor]:
    """All tensors that copying a module would copy, however deep."""
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
