"""Checks that joint and classifier can be computed cell by cell.

Authors
 * The sb_memeff authors 2026
"""

import contextlib
from collections.abc import Generator, Iterator

import speechbrain.nnet.linear
import torch
from speechbrain.nnet.transducer.transducer_joint import Transducer_joint
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

from sb_memeff.nnet.replay.random_states import global_sources

__all__ = [
    "check_modules",
    "check_widths",
    "declared_vocabulary",
    "unchanged",
]


def check_modules(joint: nn.Module, classifier: nn.Module) -> None:
    """Checks that cells can be computed a few at a time.

    Arguments
    ---------
    joint : torch.nn.Module
        The joint network.
    classifier : torch.nn.Module
        The output layer.

    Raises
    ------
    ValueError
        If a module in them is known to mix cells, so that its result for a
        tile differs from that for the batch, or if each call changes its
        weights.

    Example
    -------
    >>> check_modules(nn.BatchNorm2d(3).eval(), nn.Linear(3, 4))
    >>> check_modules(nn.BatchNorm2d(3), nn.Linear(3, 4))
    Traceback (most recent call last):
        ...
    ValueError: joint (BatchNorm2d) computes statistics over all cells of its \
input, which differ between a tile or sample and the batch. Use \
method="batched", or call eval() of this module first.
    """
    of_rows = set(_in_sequence(classifier))
    for owner, top in (("joint", joint), ("classifier", classifier)):
        for name, module in top.named_modules(prefix=owner):
            if owner == "joint":
                mixing = _MIX_PLANES
            else:
                # Deeper modules may have any inputs.
                mixing = _MIX_ROWS if module in of_rows else ()
            reason = _mixes(module, mixing)
            if reason is not None:
                raise ValueError(f"{name} ({type(module).__name__}) {reason}")


# Modules that mix the cells of [N, T, U, H], the joint's input, and modules that
# treat [N, H], the classifier's input, as one sequence.
_MIX_PLANES = (
    nn.GroupNorm,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.MultiheadAttention,
    _ConvNd,
)
_MIX_ROWS = (nn.RNNBase, nn.MultiheadAttention)


def _in_sequence(module: nn.Module) -> Iterator[nn.Module]:
    """A module and, for a Sequential, the modules called in turn."""
    yield module
    if isinstance(module, nn.Sequential):
        for part in module:
            yield from _in_sequence(part)


def _mixes(
    module: nn.Module, mixing: tuple[type[nn.Module], ...]
) -> str | None:
    """Why a module cannot compute cells independently, or None."""
    if isinstance(module, (_BatchNorm, _InstanceNorm)):
        own = (
            not isinstance(module, _InstanceNorm) or module.track_running_stats
        )
        if module.training or not own or module.running_mean is None:
            remedy = ", or call eval() of this module first"
            return (
                "computes statistics over all cells of its input, which differ "
                'between a tile or sample and the batch. Use method="batched"'
                f"{remedy if module.running_mean is not None else ''}."
            )
    narrow = isinstance(module, _ConvNd) and max(module.kernel_size) == 1
    if isinstance(module, mixing) and not narrow:
        return (
            "combines several frames or targets, but cells are computed "
            'independently. Use method="batched".'
        )
    if getattr(module, "max_norm", None) is not None:
        return (
            "changes its weights in every call (max_norm), and a batch needs "
            'many calls. Use method="batched".'
        )
    return None


def declared_vocabulary(classifier: nn.Module) -> int | None:
    """Returns the size of the classifier's output, if it is declared.

    Arguments
    ---------
    classifier : torch.nn.Module
        torch's or SpeechBrain's Linear, or a sequence that ends with one.

    Returns
    -------
    int or None
        The size; None for any other module.

    Example
    -------
    >>> declared_vocabulary(nn.Sequential(nn.ReLU(), nn.Linear(3, 10)))
    10
    """
    if isinstance(classifier, nn.Sequential) and len(classifier):
        return declared_vocabulary(classifier[-1])
    if isinstance(classifier, speechbrain.nnet.linear.Linear):
        return declared_vocabulary(classifier.w)
    if type(classifier) is nn.Linear:
        return classifier.out_features
    return None


def check_widths(
    joint: nn.Module,
    classifier: nn.Module,
    enc: torch.Tensor,
    pred: torch.Tensor,
) -> None:
    """Checks the sizes of rows where the modules' own are known.

    Arguments
    ---------
    joint : torch.nn.Module
        The joint network.
    classifier : torch.nn.Module
        The output layer.
    enc : torch.Tensor
        [B, T, H].
    pred : torch.Tensor
        [B, U+1, H].

    Raises
    ------
    ValueError
        If SpeechBrain's joint would add rows of different sizes, or give the
        classifier, a linear layer, rows of a wrong size.

    Example
    -------
    >>> x = torch.zeros(1, 1, 4)
    >>> check_widths(Transducer_joint(), nn.Linear(4, 9), x, x)
    """
    if type(joint) is not Transducer_joint or joint.joint != "sum":
        return
    width, other = enc.shape[2], pred.shape[2]
    # A size of 1 is broadcast, as in the joint.
    if width != other and 1 not in (width, other):
        raise ValueError(
            f"The joint adds enc and pred, but their sizes H differ: {width} "
            f"and {other}."
        )
    linear = getattr(classifier, "w", classifier)
    if type(linear) is nn.Linear and linear.in_features != max(width, other):
        raise ValueError(
            f"The classifier takes {linear.in_features} numbers for each cell, "
            f"but the joint adds enc and pred, which have {max(width, other)}."
        )


@contextlib.contextmanager
def unchanged(
    modules: nn.Module, device: torch.device
) -> Generator[None, None, None]:
    """Raises if calls change buffers; restores the state after an error.

    Arguments
    ---------
    modules : torch.nn.Module
        The called modules.
    device : torch.device
        Their device.

    Yields
    ------
    None

    Raises
    ------
    ValueError
        If a call has changed a buffer, as spectral norm does. A batch needs
        many calls here, but only one if all cells are computed at once.
    """
    before = {
        (module, name): (buffer, buffer._version, buffer.clone())
        for module in modules.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    }
    states = [(s.write, s.read()) for s in global_sources(device, True)]
    try:
        yield
        for prefix, module in modules.named_modules():
            for name, buffer in module._buffers.items():
                # A table created in the first call is not a change.
                if (module, name) not in before:
                    continue
                original, version, clone = before[module, name]
                if buffer is not None:
                    same = buffer is original and buffer._version == version
                    if same or torch.equal(buffer, clone):
                        continue
                raise ValueError(
                    f"{prefix} ({type(module).__name__}) changes its buffer "
                    f"{name} in every call, and a batch needs many calls. "
                    'Use method="batched", or call eval() of this module '
                    "first."
                )
    except BaseException:
        for (module, name), (buffer, version, clone) in before.items():
            if buffer._version != version:
                buffer.copy_(clone)
            module._buffers[name] = buffer
        for write, state in states:
            write(state)
        raise
