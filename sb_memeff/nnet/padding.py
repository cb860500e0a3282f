"""Masks of the padded frames of a batch, at every stage of a network.

Authors
 * The sb_memeff authors 2026
"""

import torch

from sb_memeff.nnet.replay.mismatch import next_forward, report_mismatches
from sb_memeff.ops.dispatch import has_values

__all__ = ["check_lengths", "mask", "padding_masks"]


def mask(x: torch.Tensor, padding: torch.Tensor | None) -> torch.Tensor:
    """Sets padded frames to zero in place, so that backward needs no copy of x.

    Arguments
    ---------
    x : torch.Tensor
        Overwritten.
    padding : torch.Tensor, optional
        True where padded; broadcasts to x.

    Returns
    -------
    torch.Tensor
        x.

    Example
    -------
    >>> mask(torch.ones(1, 3), torch.tensor([[False, False, True]]))
    tensor([[1., 1., 0.]])
    """
    return x if padding is None else x.masked_fill_(padding, 0.0)


def check_lengths(lengths: torch.Tensor | None, x: torch.Tensor) -> None:
    """Checks that there is one relative length for each utterance.

    On the CPU an error is raised at once. On an accelerator the check runs on
    the device, and the host reads the result when it need not wait (see
    ``sb_memeff.nnet.replay.mismatch``).

    Arguments
    ---------
    lengths : torch.Tensor
        Relative lengths [N] in (0, 1], or None.
    x : torch.Tensor
        Features [N, T, ...].

    Raises
    ------
    TypeError
        If the lengths are not a tensor, or their dtype cannot distinguish
        the frames.
    ValueError
        If their number is not that of the utterances, or they are not
        relative.

    Example
    -------
    >>> check_lengths(torch.tensor([1.0, 0.5]), torch.rand(2, 50, 80))
    """
    if lengths is None:
        return
    if not isinstance(lengths, torch.Tensor):
        raise TypeError(
            f"lengths must be a tensor of relative lengths, got "
            f"{type(lengths).__name__}; use torch.tensor(lengths)."
        )
    if lengths.shape != x.shape[:1]:
        raise ValueError(
            f"lengths must contain one relative length for each of the "
            f"{x.shape[0]} utterances, got shape {tuple(lengths.shape)}."
        )
    if _symbolic(lengths):
        return
    size = x.shape[1]
    # Below 1 the spacing is eps / 2. Rounding errors are half of that, and must be
    # less than half a frame.
    if (
        lengths.is_floating_point()
        and size * torch.finfo(lengths.dtype).eps >= 2
    ):
        raise TypeError(
            f"lengths of {lengths.dtype} cannot distinguish {size} frames; "
            f"keep lengths in torch.float32."
        )
    # "inside" is False for NaN. A number of frames divided in float32 may be
    # slightly more than 1.
    inside = (lengths > 0) & (lengths <= 1 + 0.5 / max(size, 1))
    if inside.device.type == "cpu" or not lengths.is_floating_point():
        if not inside.all():
            wrong = lengths[~inside][0].item()
            raise ValueError(_not_relative(f"got {wrong}"))
        return
    next_forward()
    report_mismatches(
        ~inside, lambda row: _not_relative(f"that of utterance {row} was not")
    )


def _not_relative(finding: str) -> str:
    return (
        f"lengths must be relative, in (0, 1]; {finding}. Divide the number "
        f"of frames of each utterance by that of the batch."
    )


def _symbolic(tensor: torch.Tensor) -> bool:
    """Whether there are no values, or a tracer must not read them."""
    return (
        not has_values(tensor)
        or torch.jit.is_tracing()
        or torch.compiler.is_compiling()
    )


def padding_masks(
    lengths: torch.Tensor | None, x: torch.Tensor, strides: list[int]
) -> list[torch.Tensor] | None:
    """Makes masks of the padded frames of [N, C, T, F] maps for each stage.

    A strided convolution with padding, and space-to-depth with zeros at the
    end, turn ``n`` frames into ceil(n / stride). The masks do the same, so that
    an utterance has the same valid frames in any batch.

    Arguments
    ---------
    lengths : torch.Tensor
        Relative lengths [N] in (0, 1], as in SpeechBrain; None for a batch
        without padding.
    x : torch.Tensor
        Features [N, T, ...] to which the lengths refer.
    strides : list of int
        Time stride of each stage, relative to the previous stage.

    Returns
    -------
    list of torch.Tensor
        For each stage a mask [N, 1, T_stage, 1], True where padded; None
        without lengths.

    Raises
    ------
    TypeError
        See ``check_lengths``.
    ValueError
        See ``check_lengths``.

    Example
    -------
    >>> feats = torch.rand(2, 5, 80)
    >>> masks = padding_masks(torch.tensor([1.0, 0.6]), feats, [1, 2])
    >>> masks[0][1].flatten().tolist()
    [False, False, False, True, True]
    >>> masks[1][1].flatten().tolist()
    [False, False, True]
    """
    if lengths is None:
        return None
    check_lengths(lengths, x)
    size = x.shape[1]
    # In half precision the product would be off by frames.
    lengths = lengths.to(torch.promote_types(lengths.dtype, torch.float32))
    frames = (lengths * size).round().long().clamp(min=1)
    masks = []
    for stride in strides:
        # Not -(-size // stride): ONNX rounds negative quotients up.
        size = (size + stride - 1) // stride
        frames = (frames + stride - 1) // stride
        steps = torch.arange(size, device=lengths.device)
        masks.append((steps >= frames[:, None])[:, None, :, None])
    return masks
