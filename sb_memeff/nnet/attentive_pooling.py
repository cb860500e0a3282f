"""Attentive statistics pooling that stores only its input.

Okabe et al., "Attentive Statistics Pooling for Deep Speaker Embedding"
(2018), with the global context of Desplanques et al., "ECAPA-TDNN" (2020):

    h = W [x; mean(x); std(x)] + b       a = tanh(norm(activation(h)))
    e = V a + c                          w = softmax over time of e
    output: mean and standard deviation over time of x with the weights w

In these formulas [x; mean; std] has three times the channels of x, and e, w and
the deviations each have as many as x. But W [x; mean; std] is a sum over
channels, and everything after a treats channels independently. Both can
therefore be computed, and recomputed in backward, for a few channels at a time.
Only h and a, which have few channels, exist as a whole.

Authors
 * The sb_memeff authors 2026
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from speechbrain.dataio.dataio import length_to_mask
from speechbrain.lobes.models.ECAPA_TDNN import AttentiveStatisticsPooling

from sb_memeff.nnet.replay.recorder import Recorder
from sb_memeff.utils.autograd import refuse_double_backward

__all__ = ["attentive_statistics_pooling"]

# Channels at a time: few compared with the hundreds or thousands of x, but enough
# to keep a GPU busy.
WIDTH = 128


def attentive_statistics_pooling(
    pooling: AttentiveStatisticsPooling,
    x: torch.Tensor,
    lengths: torch.Tensor | None = None,
    save_memory: bool = True,
    padding: torch.Tensor | None = None,
) -> torch.Tensor:
    """Computes SpeechBrain's AttentiveStatisticsPooling in less memory.

    Arguments
    ---------
    pooling : speechbrain.lobes.models.ECAPA_TDNN.AttentiveStatisticsPooling
        The module, with its weights.
    x : torch.Tensor
        [N, C, T].
    lengths : torch.Tensor, optional
        Relative lengths [N]. Padded frames are excluded from context and
        statistics.
    save_memory : bool
        False stores all activations instead of recomputing them.
    padding : torch.Tensor, optional
        Padded frames [N, 1, T], instead of lengths. SpeechBrain's mask may
        include one more frame if the product of length and T is rounded up.

    Returns
    -------
    torch.Tensor
        [N, 2 * C, 1]: all means, then all standard deviations.

    Example
    -------
    >>> from speechbrain.lobes.models.ECAPA_TDNN import (
    ...     AttentiveStatisticsPooling,
    ... )
    >>> pooling = AttentiveStatisticsPooling(64)
    >>> attentive_statistics_pooling(pooling, torch.rand(8, 64, 120)).shape
    torch.Size([8, 128, 1])
    """
    frames = x.shape[-1]
    if padding is not None:
        mask = (~padding).float()
    else:
        if lengths is None:
            lengths = torch.ones(x.shape[0], device=x.device)
        mask = length_to_mask(lengths * frames, max_len=frames, device=x.device)
        # In half precision 1 / frames has an error of a thousandth.
        mask = mask.unsqueeze(1).to(
            torch.promote_types(mask.dtype, torch.float32)
        )
    common = {"mask": mask, "eps": pooling.eps}

    tdnn = pooling.tdnn
    conv = tdnn.conv.conv
    # The input channels first, to be sliced with x.
    weights = conv.weight.transpose(0, 1).split(x.shape[1])
    function = _context if pooling.global_context else _projection
    h, x = _over_channels(
        partial(function, **common), "sum", save_memory, x, (), weights
    )
    # TDNNBlock and the attention always have biases.
    h = h + conv.bias.to(h.dtype).unsqueeze(1)
    a = pooling.tanh(tdnn.dropout(tdnn.norm(tdnn.activation(h))))
    # All slices add to the gradient of a, in the dtype of a.
    a = a.to(torch.promote_types(a.dtype, torch.float32))
    conv = pooling.conv.conv
    pooled, _ = _over_channels(
        partial(_attend, **common),
        "cat",
        save_memory,
        x,
        (a,),
        (conv.weight, conv.bias),
    )
    return pooled.transpose(1, 2).flatten(1).unsqueeze(2)


def _statistics(
    x: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    mean = (weight * x).sum(2, keepdim=True)
    var = (weight * (x - mean).square()).sum(2, keepdim=True)
    return mean, var.clamp(eps).sqrt()


def _projection(
    x: torch.Tensor, w_x: torch.Tensor, mask: torch.Tensor, eps: float
) -> torch.Tensor:
    """Contribution of a few channels to h, [N, A, T]."""
    return F.conv1d(x, w_x.transpose(0, 1))


def _context(
    x: torch.Tensor,
    w_x: torch.Tensor,
    w_mean: torch.Tensor,
    w_std: torch.Tensor,
    mask: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    """The same with the context, their means and deviations."""
    weight = mask / mask.sum(2, keepdim=True)
    mean, std = (s.to(x.dtype) for s in _statistics(x, weight, eps))
    h = F.conv1d(x, w_x.transpose(0, 1))
    h = h + F.conv1d(mean, w_mean.transpose(0, 1))
    return h + F.conv1d(std, w_std.transpose(0, 1))


def _attend(
    x: torch.Tensor,
    a: torch.Tensor,
    v: torch.Tensor,
    c: torch.Tensor,
    mask: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    """Weighted mean and deviation of a few channels, [N, channels, 2]."""
    e = F.conv1d(a.to(v.dtype), v, c).masked_fill(mask == 0, float("-inf"))
    return torch.cat(_statistics(x, F.softmax(e, dim=2), eps), dim=2)


def _over_channels(
    function: Callable[..., torch.Tensor],
    join: Literal["sum", "cat"],
    save_memory: bool,
    x: torch.Tensor,
    shared: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes function(x, *shared, *weights), a few channels at a time.

    The slices' results are summed ("sum") or concatenated ("cat"). x is
    returned too, and must be passed to the next function and used nowhere else.
    The gradient of x then arrives through it, and this function's part is added
    in place instead of in a second tensor of that size.
    """
    if save_memory and torch.is_grad_enabled():
        return _OverChannels.apply(
            function, join, len(shared), x, *shared, *weights
        )
    return _joined(function, join, x, shared, weights), x


def _slices(
    x: torch.Tensor, weights: Sequence[torch.Tensor]
) -> Iterator[tuple[torch.Tensor, ...]]:
    return zip(x.split(WIDTH, 1), *(w.split(WIDTH) for w in weights))


def _joined(
    function: Callable[..., torch.Tensor],
    join: Literal["sum", "cat"],
    x: torch.Tensor,
    shared: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
) -> torch.Tensor:
    results = (
        function(part, *shared, *parts) for part, *parts in _slices(x, weights)
    )
    if join == "cat":
        return torch.cat(list(results), dim=1)
    total = next(results)
    dtype = total.dtype
    # Sum many small parts in float32; round at the end.
    total = total.to(torch.promote_types(dtype, torch.float32))
    for result in results:
        total = total + result
    return total.to(dtype)


class _OverChannels(torch.autograd.Function):
    """``_joined`` that stores its inputs and recomputes slices in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        function: Callable[..., torch.Tensor],
        join: Literal["sum", "cat"],
        count: int,
        x: torch.Tensor,
        *tensors: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.function = function
        ctx.join = join
        ctx.count = count
        # These functions draw no random numbers.
        ctx.recorder = Recorder(x.device, follow_random=False)
        ctx.save_for_backward(x, *tensors)
        ctx.set_materialize_grads(False)
        shared, weights = tensors[:count], tensors[count:]
        return _joined(function, join, x, shared, weights), x

    @staticmethod
    # pyrefly: ignore[bad-override]
    def backward(
        ctx: Any, gradient: torch.Tensor, dx: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        refuse_double_backward(
            "attentive_statistics_pooling", "set save_memory=False"
        )
        x, *tensors = (t.detach() for t in ctx.saved_tensors)
        shared, weights = tensors[: ctx.count], tensors[ctx.count :]
        if dx is None:
            dx = torch.zeros_like(x)
        d_shared = [torch.zeros_like(t) for t in shared]
        d_weights = [torch.zeros_like(t) for t in weights]
        slices = zip(_slices(x, weights), _slices(dx, d_weights))
        start = 0
        for (part, *parts), targets in slices:
            inputs = [
                t.detach().requires_grad_() for t in (part, *parts, *shared)
            ]
            part, parts = inputs[0], inputs[1 : 1 + len(parts)]
            with torch.enable_grad(), ctx.recorder.autocast():
                value = ctx.function(part, *inputs[1 + len(parts) :], *parts)
            upstream = gradient
            if ctx.join == "cat":
                upstream = gradient.narrow(1, start, value.shape[1])
                start += value.shape[1]
            found = torch.autograd.grad(value, inputs, upstream.to(value.dtype))
            del value
            for target, more in zip((*targets, *d_shared), found):
                target.add_(more)
        return None, None, None, dx, *d_shared, *d_weights
