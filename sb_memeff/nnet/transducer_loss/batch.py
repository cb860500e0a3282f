"""Checks, lengths and reductions of a batch for the transducer losses.

Authors
 * The sb_memeff authors 2026
"""

from typing import Any, Literal

import torch

from sb_memeff.utils.settings import check_integer, check_number

__all__ = [
    "PER_SAMPLE",
    "REDUCTIONS",
    "Reduction",
    "check_counts",
    "check_dense",
    "check_settings",
    "check_tensors",
    "count",
    "reduce",
]

Reduction = Literal["mean", "sum", "none", "nll_mean", "nll_sum", "nll"]
# The first three have the values and the gradients of SpeechBrain 1.1, whose
# kernels divide the values by the frames, but the gradients by nothing.
REDUCTIONS: dict[Reduction, str] = {
    "mean": "SpeechBrain's, mean of nll / frames, with the gradient of nll_sum",
    "sum": "SpeechBrain's, sum of nll / frames, with the gradient of nll_sum",
    "none": "SpeechBrain's, nll / frames of each sample, with nll's gradient",
    "nll_mean": "mean of the samples' negative log-likelihoods",
    "nll_sum": "their sum",
    "nll": "the negative log-likelihood of each sample",
}
# Reductions that return a loss of each sample.
PER_SAMPLE: tuple[Reduction, ...] = ("none", "nll")
INTEGERS = (
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
)


def check_settings(
    reduction: Reduction, fastemit_lambda: float, clamp: float | None
) -> None:
    """Checks the settings that both losses share.

    Arguments
    ---------
    reduction : str
        A key of REDUCTIONS.
    fastemit_lambda : float
        Must not be negative.
    clamp : float or None
        Must be positive.

    Raises
    ------
    ValueError
        If a setting is invalid.
    """
    if not isinstance(reduction, str) or reduction not in REDUCTIONS:
        known = "; ".join(
            f"{name}: {text}" for name, text in REDUCTIONS.items()
        )
        raise ValueError(f"reduction={reduction!r} must be one of: {known}.")
    check_number("fastemit_lambda", fastemit_lambda, least=0)
    if clamp is not None:
        check_number("clamp", clamp, above=0)


def check_dense(**tensors: object) -> None:
    """Checks that arguments are tensors with a value for each position.

    Arguments
    ---------
    **tensors : dict
        Arguments by name.

    Raises
    ------
    TypeError
        If one is something else. The message names it.

    Example
    -------
    >>> check_dense(enc=torch.zeros(1, 2, 3))
    """
    for name, x in tensors.items():
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name} must be a tensor, not {type(x).__name__}.")
        if x.layout != torch.strided:
            raise TypeError(f"{name} must be dense, not {x.layout}.")


def check_tensors(
    batch: int,
    lengths: dict[str, torch.Tensor],
    targets: torch.Tensor,
    others: dict[str, torch.Tensor],
) -> None:
    """Checks the arguments that both losses share.

    Arguments
    ---------
    batch : int
        Number of samples.
    lengths : dict
        Maps names to tensors, which must be [B].
    targets : torch.Tensor
        Must be integers.
    others : dict
        Maps names to further tensors. All tensors must be on one device.

    Raises
    ------
    ValueError
        If an argument is invalid.
    """
    if targets.dtype not in INTEGERS:
        raise ValueError(f"targets must be integers, not {targets.dtype}.")
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


def count(lengths: torch.Tensor, size: int, unit: str) -> torch.Tensor:
    """Converts SpeechBrain's relative lengths to frames or targets.

    ``check_counts`` detects invalid lengths.

    Arguments
    ---------
    lengths : torch.Tensor
        [B], from 0 to 1, relative to a padded axis.
    size : int
        Size of that axis.
    unit : str
        "frames" or "targets", for errors.

    Returns
    -------
    torch.Tensor
        [B], int64.

    Raises
    ------
    ValueError
        If the lengths' dtype cannot distinguish that many frames.

    Example
    -------
    >>> count(torch.tensor([1.0, 0.5]), 7, "frames")
    tensor([7, 4])
    """
    if lengths.is_complex():
        raise ValueError(f"Lengths in {unit} must be real: {lengths.dtype}.")
    if lengths.is_floating_point():
        # The rounding error of n / size is at most eps / 2.
        if torch.finfo(lengths.dtype).eps * size >= 1:
            raise ValueError(
                f"Lengths in {unit} are {lengths.dtype}, which cannot "
                f"distinguish {size} {unit}. Use float32."
            )
    return (lengths.double() * size).round().long()


def check_counts(
    lengths: tuple[torch.Tensor, torch.Tensor],
    logit_lengths: torch.Tensor,
    target_lengths: torch.Tensor,
    targets: torch.Tensor,
    blank_index: int,
    vocabulary: int | None,
) -> tuple[list[int], list[int]]:
    """Checks lengths and targets of a batch. The host waits once.

    Arguments
    ---------
    lengths : tuple of torch.Tensor
        [B] each, relative: of frames and of targets.
    logit_lengths : torch.Tensor
        [B], frames of each sample.
    target_lengths : torch.Tensor
        [B], targets of each sample.
    targets : torch.Tensor
        [B, U], int64.
    blank_index : int
        The blank.
    vocabulary : int, optional
        Number of symbols, including the blank; None if unknown.

    Returns
    -------
    tuple of list of int
        logit_lengths and target_lengths on the host.

    Raises
    ------
    ValueError
        If a length is not between 0 and 1, the blank or a target is not in
        the vocabulary, a target is the blank, or a sample has no frame.
    """
    known = vocabulary is not None
    check_integer("blank_index", blank_index, 0)
    if known and blank_index >= vocabulary:
        raise ValueError(
            f"blank_index={blank_index} is not in the vocabulary of "
            f"{vocabulary} symbols."
        )
    bad = [~((x >= 0) & (x <= 1)) for x in lengths]
    empty = logit_lengths < 1
    u = torch.arange(targets.shape[1], device=targets.device)
    real = u < target_lengths[:, None]
    outside = targets < 0
    if known:
        outside |= targets >= vocabulary
    blank = targets == blank_index
    masks = (*bad, empty, outside & real, blank & real)
    host = torch.cat(
        [
            torch.stack([x.any() for x in masks]).long(),
            logit_lengths,
            target_lengths,
        ]
    ).tolist()
    wrong, lengths_on_host = host[: len(masks)], host[len(masks) :]
    if not any(wrong):
        batch = len(logit_lengths)
        return lengths_on_host[:batch], lengths_on_host[batch:]
    for mask, found, unit in zip(bad, wrong[:2], ("frames", "targets")):
        if found:
            lens = lengths[unit == "targets"]
            sample = int(mask.nonzero()[0])
            raise ValueError(
                f"Sample {sample}: its length in {unit}, "
                f"{float(lens[sample]):.4g}, is not between 0 and 1. Lengths "
                "are relative, as in SpeechBrain."
            )
    if wrong[2]:
        raise ValueError(
            f"Sample {int(empty.nonzero()[0])} has no frame, but a transducer "
            "needs at least one for the last blank. Remove the sample."
        )
    mask, reason = (
        (outside, "not in the vocabulary") if wrong[3] else (blank, "the blank")
    )
    sample, index = (mask & real).nonzero()[0].tolist()
    symbols = f"{vocabulary} symbols, " if known else ""
    raise ValueError(
        f"Sample {sample}: target {index} is {int(targets[sample, index])}, "
        f"which is {reason} ({symbols}blank_index={blank_index})."
    )


def reduce(
    nll: torch.Tensor, logit_lengths: torch.Tensor, reduction: Reduction
) -> torch.Tensor:
    """Reduces the losses of the samples.

    Arguments
    ---------
    nll : torch.Tensor
        [B], negative log-likelihoods.
    logit_lengths : torch.Tensor
        [B], frames of each sample.
    reduction : str
        A key of REDUCTIONS.

    Returns
    -------
    torch.Tensor
        [B] or a scalar.

    Example
    -------
    >>> nll = torch.tensor([6.0, 4.0], requires_grad=True)
    >>> loss = reduce(nll, torch.tensor([3, 1]), "mean")
    >>> loss.backward()
    >>> loss.item(), nll.grad
    (3.0, tensor([1., 1.]))
    """
    if reduction == "nll":
        return nll
    if reduction == "nll_sum":
        return nll.sum()
    if reduction == "nll_mean":
        return nll.mean()
    return _SpeechBrainsReduction.apply(nll, logit_lengths, reduction)


class _SpeechBrainsReduction(torch.autograd.Function):
    """Values per frame, with the gradient of the plain losses or their sum."""

    @staticmethod
    def forward(
        ctx: Any,
        nll: torch.Tensor,
        logit_lengths: torch.Tensor,
        reduction: Reduction,
    ) -> torch.Tensor:
        ctx.samples = len(nll)
        per_frame = nll / logit_lengths.to(nll)
        if reduction == "none":
            return per_frame
        return per_frame.sum() if reduction == "sum" else per_frame.mean()

    @staticmethod
    # pyrefly: ignore[bad-override]
    def backward(
        ctx: Any, gradient: torch.Tensor
    ) -> tuple[torch.Tensor, None, None]:
        return gradient.expand(ctx.samples), None, None
