"""Repeats a function in backward exactly as it ran in forward.

To repeat the arithmetic is not enough. Backward must also restore the random
numbers (of torch, Python, numpy and the modules' own generators), the autocast
state, the flags of torch's backends and the modules' state, and a training step
must count batch statistics only once. ``torch.utils.checkpoint`` restores only
torch's random numbers and the autocast state.

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
from sb_memeff.nnet.replay.kept import Kept, keeping, replaying
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


# Weights and modes of modules, and the ids of ignored weights.
Fingerprint = tuple[list["_Weight | None"], list[bool], Set[int]]


@dataclass
class Recording:
    """State of one call of a function, as far as a replay needs it.

    Arguments
    ---------
    random_states : list, optional
        Pairs of Source and state before the call, for all generators that
        the call used; None if it drew no random numbers.
    changes : Changes
        Buffers and attributes of modules that the call changed.
    kept : dict
        What the call has given to ``keep``.
    """

    random_states: list[tuple[Source, Any]] | None = None
    changes: Changes = field(default_factory=Changes)
    kept: Kept = field(default_factory=dict)


class Recorder:
    """Records calls of functions in forward and replays them in backward.

    It contains the state that all calls of a forward pass share (device,
    autocast state and flags of torch's backends). A ``Recording`` contains the
    state of a single call.

    Arguments
    ---------
    device : torch.device
        Device of the tensors. The CPU's generator is always included.
    follow_random : bool
        False excludes torch's generators (fake tensors draw no numbers).

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
        """Returns a context with the autocast state of the forward pass.

        Autocast's cache of converted weights is off. Otherwise a weight
        converted without gradients would be used for calls with gradients in
        the same context, and the copies would outlive the call.

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
        """Calls ``function`` and records the state for a replay.

        Arguments
        ---------
        function : callable
            A torch.nn.Module, or a function that changes no module's buffers.
        *args : tuple
            Its arguments.
        **kwargs : dict
            Its keyword arguments.

        Returns
        -------
        tuple
            Result of the function, and its ``Recording``.
        """
        with self.recording(function) as recording:
            result = function(*args, **kwargs)
        return result, recording

    @contextlib.contextmanager
    def recording(
        self, function: Callable[..., Any], arguments: Iterable[object] = ()
    ) -> Generator[Recording, None, None]:
        """Records the state of the single call within the context.

        Arguments
        ---------
        function : callable
            The called function; see ``record``.
        arguments : iterable
            Arguments of the call; generators among them are replayed too.

        Yields
        ------
        Recording
            Complete after the context.
        """
        recording = Recording()
        before = ModuleState(function)
        sources = self._sources(before.attribute_values(), arguments)
        states = [source.read() for source in sources]
        with self.flags.applied(), _without_cached_weights():
            with keeping(recording.kept):
                yield recording
        drawn = [
            (source, state)
            for source, state in zip(sources, states)
            if not equal_states(state, source.read())
        ]
        if drawn:
            recording.random_states = drawn
        recording.changes = before.changes()

    @contextlib.contextmanager
    def replay(
        self, function: object, recording: Recording
    ) -> Generator[None, None, None]:
        """Makes ``function`` repeat the recorded call within the context.

        Afterwards generators, buffers, attributes and batch statistics are
        restored.

        Arguments
        ---------
        function : callable
            The recorded function.
        recording : Recording
            The recording of that call.

        Yields
        ------
        None
        """
        drawn = recording.random_states or []
        now = [source.read() for source, _ in drawn]
        try:
            for source, state in drawn:
                source.write(state)
            with self.autocast(), self.flags.applied(), _without_cached_weights():
                no_trace = without_trace(function, recording.changes)
                with no_trace, replaying(recording.kept):
                    yield
        finally:
            for (source, _), state in zip(drawn, now):
                source.write(state)

    def _sources(
        self, attributes: Iterable[object], arguments: Iterable[object]
    ) -> list[Source]:
        """All generators that a call may use."""
        own = generators_among(attributes) + generators_among(arguments)
        found = {id(generator): generator for generator in own}
        sources = (own_source(g, self.follow_random) for g in found.values())
        return global_sources(self.device, self.follow_random) + [
            source for source in sources if source is not None
        ]


@contextlib.contextmanager
def _without_cached_weights() -> Generator[None, None, None]:
    """Disables the caller's ``parametrize.cached()`` within the context.

    A cached weight was computed outside the call, so a replay could not rebuild
    its graph.
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
    """Records weights and modes, which a second call requires unchanged.

    Arguments
    ---------
    module : torch.nn.Module
        The module, in forward.
    ignore : set of int
        Ids of parameters whose values may change.

    Returns
    -------
    tuple
        The argument of ``check_fingerprint``.
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
    """Identifies a parameter's storage and version."""

    __slots__ = ("storage", "key")

    def __init__(self, parameter: torch.Tensor):
        # Kept alive: if ``p.data = ...`` freed it, another storage could get
        # its address.
        self.storage = parameter.untyped_storage()
        self.key = (
            self.storage._cdata,
            parameter.storage_offset(),
            parameter._version,
            parameter.requires_grad,
        )

    def __eq__(self, other: object) -> bool:
        # Ignored weights are None.
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
        Start of the message.
    prefix : str
        Prefix of the names of parameters and submodules.

    Raises
    ------
    RuntimeError
        If a parameter or mode changed. The message names it.
    """
    weights, modes, _ = fingerprint(module, before[2])
    if weights != before[0]:
        names = [prefix + n for n, _ in module.named_parameters()]
        changed = [
            n for n, a, b in zip(names, before[0], weights) if a != b
        ] or ["the set of parameters"]
        raise RuntimeError(
            f"{owner}: {changed[0]} was changed between forward and backward "
            f"(by an optimizer step, or by loading weights?). Backward "
            f"computes the activations again and needs the weights of the "
            f"forward pass; call backward first."
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
