"""Recurrences over time in few steps, with the memory of all steps.

SpeechBrain's LiGRU calls a dozen operators for each frame, and fake tensors take
longer for a call than for anything else. All its steps make tensors of the same
sizes, so a step that makes the tensors of many frames at once stands for them.

Authors
 * The sb_memeff authors 2026
"""

import contextlib
from collections.abc import Callable, Generator
from typing import Any

import torch
from speechbrain.nnet import RNN
from torch._subclasses.fake_tensor import FakeTensor

__all__ = ["few_steps"]

# Steps that stand for all steps of a layer. What is alive within one of them only
# is larger than in the layer by this share.
STEPS = 16

# Classes of layers, and their functions that iterate over time.
_RECURRENCES = (
    (RNN.LiGRU_Layer, "_ligru_cell"),
    (RNN.SLiGRU_Layer, "_sligru_cell"),
)


@contextlib.contextmanager
def few_steps() -> Generator[None, None, None]:
    """Shortens the recurrences of LiGRU and SLiGRU on fake tensors.

    What they compute would be wrong; fake tensors have no values. Other tensors
    are computed as before.

    Yields
    ------
    None

    Example
    -------
    >>> from sb_memeff.memory.fake import fake_tensors
    >>> with fake_tensors(), few_steps():
    ...     net = RNN.LiGRU(hidden_size=5, input_shape=(2, 1000, 20))
    ...     net(torch.rand(2, 1000, 20))[0].shape
    torch.Size([2, 1000, 5])
    """
    originals = [getattr(cls, name) for cls, name in _RECURRENCES]
    for (cls, name), original in zip(_RECURRENCES, originals):
        setattr(cls, name, _shortened(original))
    try:
        yield
    finally:
        for (cls, name), original in zip(_RECURRENCES, originals):
            setattr(cls, name, original)


def _shortened(original: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    def cell(
        layer: torch.nn.Module, w: torch.Tensor, ht: torch.Tensor
    ) -> torch.Tensor:
        if not isinstance(w, FakeTensor) or w.shape[1] <= STEPS:
            return original(layer, w, ht)
        return _iterate(layer, w, ht)

    return cell


def _iterate(layer: Any, w: torch.Tensor, ht: torch.Tensor) -> torch.Tensor:
    """The layer's operators, for many frames at a time.

    Arguments
    ---------
    layer : torch.nn.Module
        The layer.
    w : torch.Tensor
        Transformed input, [B, T, 2 * H].
    ht : torch.Tensor
        State before the first frame, [B, H].

    Returns
    -------
    torch.Tensor
        States, [B, T, H].
    """
    normalize = getattr(layer, "layer_norm", torch.nn.Identity())
    drop_mask = layer._sample_drop_mask(w).unsqueeze(-2)
    ht = ht.unsqueeze(1)
    states = []
    frames = -(-w.shape[1] // STEPS)
    for start in range(0, w.shape[1], frames):
        # Slices, as a layer's single frames are: their gradients are as long as
        # w. The last one is shorter.
        part = w[:, start : start + frames]
        ht = ht[:, : part.shape[1]]
        at, zt = (part + normalize(layer.u(ht))).chunk(2, -1)
        zt = torch.sigmoid(zt)
        hcand = layer.act(at) * drop_mask
        ht = zt * ht + (1 - zt) * hcand
        states.append(ht)
    return torch.cat(states, dim=1)
