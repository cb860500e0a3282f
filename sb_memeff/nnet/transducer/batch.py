"""A batch for the transducer losses: its checks, lengths and reductions.

Authors
 * The sb_memeff authors 2026
"""

import torch

__all__ = [
    "REDUCTIONS",
    "check_settings",
    "check_tensors",
    "check_targets",
    "count",
    "reduce",
]

REDUCTIONS = ("speechbrain", "mean", "sum", "none")


def check_settings(reduction, fastemit_lambda, clamp):
    """Checks the settings that both losses have.

    Arguments
    ---------
    reduction : str
        One of REDUCTIONS.
    fastemit_lambda : float
        Not negative.
    clamp : float or None
        Positive.

    Raises
    ------
    ValueError
        If one of them means nothing.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(
            f"reduction={reduction!r} must be one of {', '.join(REDUCTIONS)}."
        )
    if not fastemit_lambda >= 0:
        raise ValueError(
            f"fastemit_lambda={fastemit_lambda} must not be negative."
        )
    if clamp is not None and not clamp > 0:
        raise ValueError(
            f"clamp={clamp} must be positive; None is without a limit."
        )


def check_tensors(batch, lengths, targets, others):
    """Checks what both losses are called with, shapes of their own aside.

    Arguments
    ---------
    batch : int
        Samples.
    lengths : dict
        Name to tensor; they must be [B].
    targets : torch.Tensor
        Must be integers.
    others : dict
        Name to tensor; all must be on one device.

    Raises
    ------
    ValueError
        If they are not.
    """
    kind = targets.dtype
    if kind == torch.bool or kind.is_floating_point or kind.is_complex:
        raise ValueError(f"targets must be integers, not {kind}.")
    for name, lens in lengths.items():
        if lens.shape != (batch,):
            raise ValueError(
                f"{name} must be [B] = [{batch}], not {list(lens.shape)}."
            )
    tensors = (*others.values(), targets, *lengths.values())
    devices = {str(x.device) for x in tensors}
    if len(devices) > 1:
        raise ValueError(
            f"{', '.join(others)}, targets and lengths must be on one device, "
            f"not on {', '.join(sorted(devices))}."
        )


def count(lengths, size, what):
    """Relative lengths as SpeechBrain has them, in frames or targets.

    Arguments
    ---------
    lengths : torch.Tensor
        [B], from 0 to 1, of a padded axis.
    size : int
        Size of that axis.
    what : str
        Its name, for errors.

    Returns
    -------
    torch.Tensor
        [B], int64.

    Raises
    ------
    ValueError
        If a length is not between 0 and 1.

    Example
    -------
    >>> count(torch.tensor([1.0, 0.5]), 7, "frames")
    tensor([7, 4])
    """
    counts = (lengths * size).round().long()
    bad = ((counts < 0) | (counts > size) | ~lengths.isfinite()).nonzero()
    if len(bad):
        sample = int(bad[0])
        raise ValueError(
            f"Sample {sample}: its length in {what}, {float(lengths[sample]):.4g}, "
            f"is not between 0 and 1 (of {size}). Lengths are relative, as in "
            "SpeechBrain."
        )
    return counts


def check_targets(targets, counts, frames, blank_index, vocabulary=None):
    """Checks lengths and targets of a batch.

    Arguments
    ---------
    targets : torch.Tensor
        [B, U], int64.
    counts : torch.Tensor
        [B], targets of each sample.
    frames : torch.Tensor
        [B], frames of each sample.
    blank_index : int
        The blank.
    vocabulary : int, optional
        Symbols, blank included; None if that is not known yet.

    Raises
    ------
    ValueError
        If the blank or a target is not in the vocabulary, a target is the
        blank, or a sample has no frame.
    """
    if blank_index < 0 or (
        vocabulary is not None and blank_index >= vocabulary
    ):
        known = "" if vocabulary is None else f" of {vocabulary} symbols"
        raise ValueError(
            f"blank_index={blank_index} is not in the vocabulary{known}."
        )
    empty = (frames < 1).nonzero()
    if len(empty):
        raise ValueError(
            f"Sample {int(empty[0])} has no frame: a transducer needs one to "
            "end with a blank. Leave it out."
        )
    u = torch.arange(targets.shape[1], device=targets.device)
    real = u < counts[:, None]
    unknown = targets < 0
    if vocabulary is not None:
        unknown = unknown | (targets >= vocabulary)
    for wrong, why in (
        (unknown, "not in the vocabulary"),
        (targets == blank_index, "the blank"),
    ):
        found = (wrong & real).nonzero()
        if len(found):
            sample, place = found[0].tolist()
            known = "" if vocabulary is None else f"{vocabulary} symbols, "
            raise ValueError(
                f"Sample {sample}: target {place} is "
                f"{int(targets[sample, place])}, which is {why} "
                f"({known}blank_index={blank_index})."
            )


def reduce(nll, frames, reduction):
    """Reduces the losses of the samples.

    Arguments
    ---------
    nll : torch.Tensor
        [B], negative log-likelihoods.
    frames : torch.Tensor
        [B], frames of each sample.
    reduction : str
        "none", "sum", "mean" (over the batch), or "speechbrain": the value
        of SpeechBrain 1.1, mean of nll / frames, with its gradient, which is
        that of the sum.

    Returns
    -------
    torch.Tensor
        [B] or a scalar.

    Example
    -------
    >>> nll = torch.tensor([6.0, 4.0], requires_grad=True)
    >>> loss = reduce(nll, torch.tensor([3, 1]), "speechbrain")
    >>> loss.backward()
    >>> loss.item(), nll.grad
    (3.0, tensor([1., 1.]))
    """
    if reduction == "none":
        return nll
    if reduction == "sum":
        return nll.sum()
    if reduction == "mean":
        return nll.mean()
    return _SpeechBrainMean.apply(nll, frames)


class _SpeechBrainMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx, nll, frames):
        ctx.samples = len(nll)
        return (nll / frames.to(nll)).mean()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.expand(ctx.samples), None
