"""Which frames of a padded batch are padding, at every stage of a network.

Authors
 * The sb_memeff authors 2026
"""

import torch

__all__ = ["check_lengths", "padding_masks"]


def check_lengths(lengths, x):
    """There must be one length for each utterance.

    Arguments
    ---------
    lengths : torch.Tensor
        Relative lengths [N], or None.
    x : torch.Tensor
        Features [N, ...].

    Raises
    ------
    ValueError
        If there are others.
    """
    if lengths is not None and lengths.shape != x.shape[:1]:
        raise ValueError(
            f"lengths must hold one relative length for each of the "
            f"{x.shape[0]} utterances, got shape {tuple(lengths.shape)}."
        )


def padding_masks(lengths, x, strides):
    """Masks of the padded frames of [N, C, T, F] maps, one for each stage.

    A strided convolution with padding, and space-to-depth with zeros at the
    end, turn ``n`` frames into ceil(n / stride); so do these masks, so that an
    utterance keeps the same frames in any batch.

    Arguments
    ---------
    lengths : torch.Tensor
        Relative lengths [N] in (0, 1], as everywhere in SpeechBrain; None for
        a batch without padding.
    x : torch.Tensor
        Features [N, T, ...] to which the lengths refer.
    strides : list of int
        Stride in time of each stage, relative to the stage before it.

    Returns
    -------
    list of torch.Tensor
        For each stage a mask [N, 1, T_stage, 1], True where padded; None
        without lengths.

    Raises
    ------
    ValueError
        If there is not one length for each utterance.

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
    frames = (lengths * size).round().long().clamp(min=1)
    masks = []
    for stride in strides:
        # Not -(-size // stride): ONNX rounds negative quotients up.
        size = (size + stride - 1) // stride
        frames = (frames + stride - 1) // stride
        steps = torch.arange(size, device=lengths.device)
        masks.append((steps >= frames[:, None])[:, None, :, None])
    return masks
