"""Memory of a recipe's training step.

Authors
 * The sb_memeff authors 2026
"""

import weakref
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from speechbrain.utils.autocast import AMPConfig
from torch import nn

from sb_memeff.analysis.families.step import (
    TrainingStep,
    Variant,
    require_positive,
)
from sb_memeff.analysis.recipe import Recipe
from sb_memeff.analysis.recurrence import few_steps
from sb_memeff.memory.step import StepMemory, training_step_memory
from sb_memeff.memory.tracker import KINDS
from sb_memeff.memory.units import format_bytes
from sb_memeff.ops.dispatch import fused_on_fake_tensors

__all__ = ["Profile", "comparison", "profile", "report"]


@dataclass
class Profile:
    """Result of ``profile``.

    Arguments
    ---------
    label : str
        The network or loss.
    batch : int
        Utterances in a batch of the loader.
    rows : int
        Utterances after augmentation, in the network.
    seconds : float
        Length of each utterance.
    tokens : int or None
        Length of each transcript, if there are transcripts.
    precision : str
        fp32, bf16 or fp16.
    optimizer : str
        Name of the optimizer's class.
    memory : StepMemory
        The counted memory.
    measured_bytes : int or None
        Peak of an executed step: from torch's allocator on a GPU, otherwise
        of all tensors.
    """

    label: str
    batch: int
    rows: int
    seconds: float
    tokens: int | None
    precision: str
    optimizer: str
    memory: StepMemory
    measured_bytes: int | None = None

    @property
    def batch_text(self) -> str:
        """The batch in words."""
        text = f"batch {self.batch} x {self.seconds:g} s"
        if self.rows > self.batch:
            text += (
                f" (times {self.rows // self.batch} by augmentation: "
                f"{self.rows})"
            )
        if self.tokens:
            text += f" with {self.tokens} tokens"
        return text


def profile(
    recipe: Recipe,
    batch: int | None = None,
    seconds: float | None = None,
    tokens: int | None = None,
    precision: str | None = None,
    variant: Variant | None = None,
    device: str | None = None,
) -> Profile:
    """Analyses a recipe's training step on fake tensors.

    Arguments
    ---------
    recipe : Recipe
        The recipe.
    batch : int, optional
        Utterances in a batch of the data loader; the recipe's by default.
    seconds : float, optional
        Their length; the recipe's by default.
    tokens : int, optional
        Length of each transcript of a recipe for speech recognition.
    precision : str, optional
        fp32, bf16 or fp16; the recipe's by default.
    variant : Variant, optional
        Replaces the recipe's network or loss.
    device : str, optional
        Also run the step on this device, such as "cuda", for
        ``measured_bytes``. For CUDA the step is counted with our kernels.

    Returns
    -------
    Profile
        The memory.

    Raises
    ------
    ValueError
        If an argument does not apply to the recipe, or the step cannot be
        analysed. The message is one sentence.

    Example
    -------
    >>> from sb_memeff.analysis.recipe import read_recipe
    >>> path = "recipes/VoxCeleb/SpeakerRec_memeff/hparams/train_revnet.yaml"
    >>> result = profile(read_recipe(path, {"base_channels": 8}), batch=4)
    >>> result.label, result.memory.peak_phase
    ('RevNet34 Type II', 'backward')
    """
    require_positive(batch=batch, seconds=seconds, tokens=tokens)
    default, seconds = recipe.default_batch(seconds)
    batch = default if batch is None else batch
    precision = recipe.precision(precision)
    autocast = _autocast(precision)
    variant = variant or recipe.own_variant()
    if tokens is not None and not recipe.step_class.has_transcripts:
        raise ValueError(
            f"{recipe.path} has no transcripts, so tokens={tokens} does not "
            f"apply."
        )
    details: dict[str, Any] = {"tokens": None}
    # Weak, so that the step does not outlive its analysis.
    steps: weakref.WeakValueDictionary[str, TrainingStep] = (
        weakref.WeakValueDictionary()
    )

    def measure(**where: Any) -> StepMemory:
        def build() -> nn.Module:
            step = recipe.build()
            if variant.change:
                variant.change(step)
            if where:
                step.to(where["device"])
            on_gpu = where and torch.device(where["device"]).type != "cpu"
            if not on_gpu:
                step.imitate_gpu()
            steps["step"] = step
            step.inputs = step.batch(batch, seconds, tokens)
            details["rows"] = batch * step.copies
            details["tokens"] = step.tokens
            return step

        def optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
            updater = steps["step"].optimizer()
            details["optimizer"] = type(updater).__name__
            # After it, Brain.fit_batch returns.
            updater.register_step_post_hook(
                lambda *_: steps["step"].release_outputs()
            )
            return updater

        return training_step_memory(
            build,
            lambda step: step(*step.inputs),
            optimizer,
            autocast,
            **where,
        )

    measured = None
    try:
        on_gpu = device is not None and torch.device(device).type == "cuda"
        fused = fused_on_fake_tensors() if on_gpu else nullcontext()
        with fused, few_steps():
            memory = measure()
        if device is not None:
            real = measure(fake=False, device=device)
            measured = real.allocator_bytes or real.peak_bytes
    except Exception as error:
        if "rows" not in details and isinstance(error, ValueError):
            # The message is about the yaml file or the arguments.
            raise
        raise ValueError(
            f"{recipe.path}: a batch of {batch} x {seconds:g} s cannot be "
            f"analysed: {_reason(error)}"
        ) from error
    return Profile(
        variant.label,
        batch,
        seconds=seconds,
        precision=precision,
        memory=memory,
        measured_bytes=measured,
        **details,
    )


def _autocast(precision: str) -> torch.dtype | None:
    """The dtype of autocast, or None without autocast."""
    try:
        dtype = AMPConfig.from_name(precision).dtype
    except ValueError:
        raise ValueError(
            f"precision={precision} must be fp32, bf16 or fp16."
        ) from None
    return None if dtype == torch.float32 else dtype


def _reason(error: Exception) -> str:
    """The error of a failed step on one line, with the remedy if known."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if "more than 1 value per channel" in lines[0]:
        return "batch norm cannot train on one utterance; use 2 or more."
    return lines[0]


def report(result: Profile, layers: int = 5) -> str:
    """Formats a profile as text.

    Arguments
    ---------
    result : Profile
        The profile.
    layers : int
        Number of largest layers to list.

    Returns
    -------
    str
        Several lines.
    """
    memory = result.memory
    at = f", at {memory.peak_module}" if memory.peak_module else ""
    measured = []
    if result.measured_bytes:
        measured = [
            f"measured in a real step: {format_bytes(result.measured_bytes)}"
        ]
    lines = [
        f"{result.label}: {result.batch_text}, {result.precision}, "
        f"{result.optimizer}, {memory.parameters / 1e6:.2f} M parameters",
        f"peak of a training step: {format_bytes(memory.peak_bytes)}, in "
        f"{PHASES[memory.peak_phase]}{at}",
        *measured,
        "",
        *_table(memory.by_kind, memory.peak_bytes, "kind"),
        "",
        *_table(memory.by_module(1), memory.peak_bytes, "module"),
    ]
    inner = {
        name: size for name, size in memory.by_module().items() if "." in name
    }
    largest = dict(list(inner.items())[:layers])
    if largest:
        lines += ["", *_table(largest, memory.peak_bytes, "largest layers")]
    return "\n".join(lines)


def comparison(profiles: Sequence[Profile]) -> str:
    """Formats profiles as a table.

    Arguments
    ---------
    profiles : list of Profile
        The others are compared with the first.

    Returns
    -------
    str
        Several lines.
    """
    first = profiles[0]
    most = first.memory.peak_bytes
    kinds = [k for k in KINDS if any(p.memory.by_kind[k] for p in profiles)]
    rows = [["", "parameters (M)", "peak", "ratio", *kinds]]
    for result in profiles:
        memory = result.memory
        rows.append(
            [
                result.label,
                f"{memory.parameters / 1e6:.2f}",
                format_bytes(memory.peak_bytes),
                f"{most / memory.peak_bytes:.1f}x",
                *(format_bytes(memory.by_kind[kind]) for kind in kinds),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if number == 0 else cell.rjust(width)
            for number, (cell, width) in enumerate(
                zip(row, widths, strict=True)
            )
        )
        for row in rows
    ]
    head = f"{first.batch_text}, {first.precision}, {first.optimizer}"
    return "\n".join([head, "", *lines])


PHASES = {
    "forward": "forward",
    "backward": "backward",
    "step": "the optimizer's step",
}


def _table(sizes: dict[str, int], total: int, title: str) -> list[str]:
    """Lines of names, bytes and shares, without negligible rows."""
    rows = [
        (name or "(no module)", format_bytes(size), f"{size / total:.1%}")
        for name, size in sizes.items()
        if size / total >= 0.0005
    ]
    width = max(len(title), *(len(name) for name, *_ in rows))
    return [
        f"{title:{width}s} {'bytes':>9s} {'share':>7s}",
        *(
            f"{name:{width}s} {size:>9s} {share:>7s}"
            for name, size, share in rows
        ),
    ]
