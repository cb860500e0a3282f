"""Run a function a second time, in backward, exactly as it ran in forward.

Recomputing activations instead of storing them takes more than repeating the
arithmetic: the random numbers that dropout drew, the autocast state, the
algorithms that cuDNN chose, and the batch statistics, which a training step
must count once and not twice. ``torch.utils.checkpoint`` repeats the first two;
this module repeats all four.

Authors
 * The sb_memeff authors 2026
"""

import contextlib
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from sb_memeff.nnet.backends import BackendFlags
from sb_memeff.nnet.generators import RandomStates, generators_of

__all__ = [
    "Recorder",
    "Recording",
    "check_fingerprint",
    "check_weights",
    "fingerprint",
    "without_trace",
]


@dataclass
class Recording:
    """What one call of one function found, as far as a replay needs it.

    Arguments
    ---------
    random_states : RandomStates
        States before the call of the generators from which it drew.
    buffers : dict
        Buffers that the call changed, as they were before it: {(module,
        name): torch.Tensor}.
    """

    random_states: RandomStates
    buffers: dict


class Recorder:
    """Calls functions in forward and calls them again, the same, in backward.

    It holds what all calls of one forward pass share (device, autocast state,
    flags of torch's backends) and, call by call, what differs (``Recording``).

    Arguments
    ---------
    device : torch.device
        Where the tensors live.
    follow_random : bool
        False leaves all generators alone (fake tensors draw nothing).

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

    def __init__(self, device, follow_random=True):
        self.device = device
        self.follow_random = follow_random
        self.flags = BackendFlags()
        kind = device.type
        self.autocast_on = torch.is_autocast_enabled(kind)
        self.autocast_dtype = torch.get_autocast_dtype(kind)

    def autocast(self):
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

    def record(self, function, *args, **kwargs):
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
    def recording(self, function):
        """Notes what a replay will need of the one call inside this context.

        Arguments
        ---------
        function : callable
            Whose buffers the call may change, see ``record``.

        Yields
        ------
        Recording
            Complete when the context is left.
        """
        generators = []
        if self.follow_random:
            generators = generators_of(function, self.device)
        before = RandomStates(generators)
        recording = Recording(RandomStates([]), {})
        buffers = {
            key: (buffer, buffer._version, buffer.clone())
            for key, buffer in _buffers(function).items()
            # Those of a batch norm make no difference to a training call.
            if not isinstance(key[0], _BatchNorm)
        }
        with self.flags.applied(), _no_parametrization_cache():
            yield recording
        recording.random_states = before.changed()
        for (module, name), (buffer, version, clone) in buffers.items():
            same = module._buffers[name] is buffer
            if not same or buffer._version != version:
                recording.buffers[module, name] = clone

    @contextlib.contextmanager
    def replay(self, function, recording):
        """Inside this context ``function`` repeats the call that was recorded.

        Afterwards generators, buffers and batch statistics are as if nothing
        had been called.

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
        now = recording.random_states.again()
        recording.random_states.restore()
        try:
            with (
                self.autocast(),
                self.flags.applied(),
                _no_parametrization_cache(),
                without_trace(function, recording.buffers),
            ):
                yield
        finally:
            now.restore()


@contextlib.contextmanager
def _no_parametrization_cache():
    """Weights are computed in each call, also in ``parametrize.cached()``.

    What the cache holds belongs to another graph, or to none.
    """
    before = parametrize._cache_enabled
    parametrize._cache_enabled = 0
    try:
        yield
    finally:
        parametrize._cache_enabled = before


@contextlib.contextmanager
def without_trace(function, buffers=None):
    """Calls inside change no running statistics and no other buffer.

    Modules in training mode get copies of their buffers to work on. What a
    batch norm finds in them makes no difference to what it returns.

    Arguments
    ---------
    function : callable
        A torch.nn.Module; anything else is left alone.
    buffers : dict, optional
        Buffers that shall have other values than now, see ``Recording``.

    Yields
    ------
    None
    """
    originals = _buffers(function)
    for (module, name), buffer in originals.items():
        if buffers is not None:
            buffer = buffers.get((module, name), buffer)
        # A copy, so that a second backward starts from the same values.
        module._buffers[name] = buffer.clone()
    try:
        yield
    finally:
        for (module, name), buffer in originals.items():
            module._buffers[name] = buffer


def _buffers(function):
    """The buffers that a training call of ``function`` might change."""
    # Looked up at every call: SpeechBrain replaces BatchNorm by SyncBatchNorm
    # after the network was built.
    modules = function.modules() if isinstance(function, nn.Module) else ()
    return {
        (module, name): buffer
        for module in modules
        if module.training
        for name, buffer in module._buffers.items()
        if buffer is not None
    }


def fingerprint(module):
    """What must be the same when a module is called again.

    Arguments
    ---------
    module : torch.nn.Module
        The module, in forward.

    Returns
    -------
    tuple
        For ``check_fingerprint``.
    """
    return (
        [
            (p.untyped_storage()._cdata, p._version, p.requires_grad)
            for p in module.parameters()
        ],
        [m.training for m in module.modules()],
    )


def check_fingerprint(before, module, owner, prefix=""):
    """Raises if weights or training mode changed since forward.

    Arguments
    ---------
    before : tuple
        What ``fingerprint`` returned in forward.
    module : torch.nn.Module
        The module, in backward.
    owner : str
        Who speaks, for the message.
    prefix : str
        Put before the names of the module's parameters.

    Raises
    ------
    RuntimeError
        If something changed; it names the parameter.
    """
    weights, modes = fingerprint(module)
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
        raise RuntimeError(
            f"{owner}: train() or eval() was called between forward and "
            f"backward. Backward computes the activations again and needs the "
            f"mode of the forward pass; call backward first."
        )


def check_weights(before, module, owner):
    """Raises if a module changed its own weights in forward.

    Arguments
    ---------
    before : tuple
        What ``fingerprint`` returned before the call.
    module : torch.nn.Module
        The module, after it.
    owner : str
        Its name, for the message.

    Raises
    ------
    RuntimeError
        If a weight changed; it names the parameter.
    """
    weights, _ = fingerprint(module)
    for (name, _), a, b in zip(module.named_parameters(), before[0], weights):
        if a != b:
            raise RuntimeError(
                f"{owner} changes its weight {name} in forward, as "
                f"Embedding(max_norm=...) does, so backward cannot compute it "
                f"again. Keep it out of recomputed and reversible blocks, or "
                f"limit the norm after the optimizer's step."
            )
