"""Run a function a second time, in backward, exactly as it ran in forward.

Recomputing activations instead of storing them takes more than repeating the
arithmetic: the random numbers that were drawn (those of torch, Python, numpy
and of the modules' own generators), the autocast state, the flags of torch's
backends, state that modules keep, and the batch statistics, which a training
step must count once and not twice. ``torch.utils.checkpoint`` repeats torch's
random numbers and the autocast state only.

Authors
 * The sb_memeff authors 2026
"""

import contextlib
from collections.abc import Callable, Generator, Iterable, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from sb_memeff.nnet.replay.backends import BackendFlags
from sb_memeff.nnet.replay.kept import keeping, replaying
from sb_memeff.nnet.replay.module_state import (
    Changes,
    ModuleState,
    modules_of,
    without_trace,
)
from sb_memeff.nnet.replay.random_states import (
    Source,
    equal_states,
    generators_among,
    global_sources,
    own_source,
)

__all__ = [
    "Recorder",
    "Recording",
    "check_fingerprint",
    "fingerprint",
    "without_trace",
]


# Of modules: their weights, their modes, and the ids of weights left out.
Fingerprint = tuple[list["_Weight | None"], list[bool], Set[int]]


@dataclass
class Recording:
    """State that one call of one function found, as far as a replay needs it.

    Arguments
    ---------
    random_states : list, optional
        Pairs of Source and state before the call, of all generators that the
        call drew from; None if it drew no random numbers.
    changes : Changes
        Buffers and attributes of modules that the call changed.
    kept : list
        What the call has given to ``keep``.
    """

    random_states: list[tuple[Source, Any]] | None = None
    changes: Changes = field(default_factory=Changes)
    kept: list[Any] = field(default_factory=list)


class Recorder:
    """Calls functions in forward and calls them again, the same, in backward.

    It holds what all calls of one forward pass share (device, autocast state
    and flags of torch's backends) and, call by call, what differs
    (``Recording``).

    Arguments
    ---------
    device : torch.device
        Where the tensors live. The CPU's generator is looked after too.
    follow_random : bool
        False leaves torch's generators alone (fake tensors draw nothing).

    Example
    -------
    >>> dropout = torch.nn.Dropout(0.5)
    >>> recorder = Recorder(torch.device("cpu"))
    >>> first, recording = recorder.record(dropout, torch.ones(8))
    >>> with recorder.replay(dropout, recording):
    ...     second = dropout(torch.ones(8))
    >>> torch.equal(first, second)
    True
    """

    def __init__(self, device: torch.device, follow_random: bool = True):
        self.device = device
        self.follow_random = follow_random
        kind = device.type
        self.autocast_on = torch.is_autocast_enabled(kind)
        self.autocast_dtype = torch.get_autocast_dtype(kind)
        self.flags = BackendFlags()

    def autocast(self) -> torch.autocast:
        """The autocast state of the forward pass, as a context.

        Autocast's cache of converted weights stays off: a weight converted
        without gradients would be handed to whoever uses the same weight with
        gradients in the same context, and the copies would outlive the call.

        Returns
        -------
        torch.autocast
            A context to enter in forward and again in backward.
        """
        return torch.autocast(
            self.device.type,
            dtype=self.autocast_dtype,
            enabled=self.autocast_on,
            cache_enabled=False,
        )

    def record(
        self, function: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> tuple[Any, Recording]:
        """Calls ``function`` and notes what a replay will need.

        Arguments
        ---------
        function : callable
            A torch.nn.Module, or a function that changes no module's buffers.
        *args : tuple
            Passed on.
        **kwargs : dict
            Passed on.

        Returns
        -------
        tuple
            What the function returned, and its ``Recording``.
        """
        with self.recording(function) as recording:
            result = function(*args, **kwargs)
        return result, recording

    @contextlib.contextmanager
    def recording(
        self, function: Callable[..., Any], arguments: Iterable[object] = ()
    ) -> Generator[Recording, None, None]:
        """Notes what a replay will need of the one call inside this context.

        Arguments
        ---------
        function : callable
            Whose modules the call may change, see ``record``.
        arguments : iterable
            Of the call: generators among them are replayed too.

        Yields
        ------
        Recording
            Complete when the context is left.
        """
        recording = Recording()
        before = ModuleState(function)
        sources = self._sources(before.attribute_values(), arguments)
        states = [source.read() for source in sources]
        with (
            self.flags.applied(),
            _without_cached_weights(),
            keeping(recording.kept),
        ):
            yield recording
        drawn = [
            (source, state)
            for source, state in zip(sources, states, strict=True)
            if not equal_states(state, source.read())
        ]
        if drawn:
            recording.random_states = drawn
        recording.changes = before.changes()

    @contextlib.contextmanager
    def replay(
        self, function: object, recording: Recording
    ) -> Generator[None, None, None]:
        """Inside this context ``function`` repeats the call that was recorded.

        Afterwards generators, buffers, attributes and batch statistics are as
        if nothing had been called.

        Arguments
        ---------
        function : callable
            The function that was recorded.
        recording : Recording
            What ``record`` returned for that call.

        Yields
        ------
        None
        """
        drawn = recording.random_states or []
        now = [source.read() for source, _ in drawn]
        try:
            for source, state in drawn:
                source.write(state)
            with (
                self.autocast(),
                self.flags.applied(),
                _without_cached_weights(),
                without_trace(function, recording.changes),
                replaying(recording.kept),
            ):
                yield
        finally:
            for (source, _), state in zip(drawn, now, strict=True):
                source.write(state)

    def _sources(
        self, attributes: Iterable[object], arguments: Iterable[object]
    ) -> list[Source]:
        """All generators that a call may draw from."""
        own = generators_among(attributes) + generators_among(arguments)
        found = {id(generator): generator for generator in own}
        sources = (own_source(g, self.follow_random) for g in found.values())
        return global_sources(self.device, self.follow_random) + [
            source for source in sources if source is not None
        ]


@contextlib.contextmanager
def _without_cached_weights() -> Generator[None, None, None]:
    """Inside, ``parametrize.cached()`` of the caller is not in force.

    A weight that was computed before a call, or in another one, has a graph
    that a replay cannot build again.
    """
    saved = parametrize._cache_enabled, parametrize._cache
    parametrize._cache_enabled, parametrize._cache = 0, {}
    try:
        yield
    finally:
        parametrize._cache_enabled, parametrize._cache = saved


def fingerprint(
    module: nn.Module, ignore: Set[int] = frozenset()
) -> Fingerprint:
    """Notes weights and modes, which a second call must find unchanged.

    Arguments
    ---------
    module : torch.nn.Module
        The module, in forward.
    ignore : set of int
        The id of each parameter whose values may change.

    Returns
    -------
    tuple
        For ``check_fingerprint``.
    """
    modules = modules_of(module)
    parameters = {
        id(p): p
        for m in modules
        for p in m._parameters.values()
        if p is not None
    }
    return (
        [
            _Weight(p) if key not in ignore else None
            for key, p in parameters.items()
        ],
        [m.training for m in modules],
        ignore,
    )


class _Weight:
    """Tells whether a parameter is as it was."""

    __slots__ = ("storage", "key")

    def __init__(self, parameter: torch.Tensor):
        # Held: when ``p.data = ...`` has freed it, another may get its
        # address.
        self.storage = parameter.untyped_storage()
        self.key = (
            self.storage._cdata,
            parameter.storage_offset(),
            parameter._version,
            parameter.requires_grad,
        )

    def __eq__(self, other: object) -> bool:
        # One that was left out is None.
        return isinstance(other, _Weight) and self.key == other.key


def check_fingerprint(
    before: Fingerprint, module: nn.Module, owner: str, prefix: str = ""
) -> None:
    """Raises if weights or training mode changed since forward.

    Arguments
    ---------
    before : tuple
        The result of ``fingerprint`` in forward.
    module : torch.nn.Module
        The module, in backward.
    owner : str
        Begins the message.
    prefix : str
        Put before the names of the module's parameters and submodules.

    Raises
    ------
    RuntimeError
        If something changed; it names the parameter or the submodule.
    """
    weights, modes, _ = fingerprint(module, before[2])
    if weights != before[0]:
        names = [prefix + n for n, _ in module.named_parameters()]
        changed = [
            n for n, a, b in zip(names, before[0], weights) if a != b
        ] or ["the set of parameters"]
        raise RuntimeError(
            f"{owner}: {changed[0]} was changed between forward and backward "
            f"(an optimizer step, or weights loaded?). Backward computes the "
            f"activations again and needs the weights of the forward pass; "
            f"call backward first."
        )
    if modes != before[1]:
        names = [prefix + n for n, _ in module.named_modules()]
        changed = [
            n.rstrip(".") for n, a, b in zip(names, before[1], modes) if a != b
        ] or ["a module"]
        raise RuntimeError(
            f"{owner}: train() or eval() of {changed[0] or 'it'} was called "
            f"between forward and backward. Backward computes the activations "
            f"again and needs the mode of the forward pass; call backward "
            f"first."
        )
