"""Compares a training step that saves memory with one that stores everything.

Authors
 * The sb_memeff authors 2026
"""

import contextlib
import copy
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from speechbrain.utils.autocast import AMPConfig
from torch import nn

from sb_memeff.analysis.families.step import TrainingStep
from sb_memeff.analysis.recipe import Recipe
from sb_memeff.nnet.recompute import store_blocks
from sb_memeff.nnet.recompute.blocks import is_split
from sb_memeff.nnet.replay.random_states import forked_generators
from sb_memeff.nnet.reversible import inversion_errors
from sb_memeff.nnet.transducer_loss.joint_loss import TransducerJointLoss
from sb_memeff.nnet.transducer_loss.logits_loss import transducer_loss

__all__ = ["CheckReport", "check_recipe"]

# Largest relative errors that pass. Errors measured on our yaml files are 0 at
# every precision with exact streams, and otherwise 1e-6 in float32. Faults are
# larger: without exact streams, RevNet34's streams are off by 2e-6 and its
# gradients by 1e-2; one step of the grid is at least 1e-5.
INVERSION = 1e-6
STATISTICS = 1e-6
# Another order of summation occasionally rounds to another float16 or bfloat16.
STORED = {"fp32": 1e-4, "bf16": 1e-3, "fp16": 1e-3}
# The same for logits, whose gradients are rounded to 8 (bf16) or 11 (fp16) bits;
# the encoder amplifies the error. Measured on a conformer of 12 layers: 2e-6 in
# fp32, 2e-2 in bf16.
LOGITS = {"fp32": 1e-4, "bf16": 1e-1, "fp16": 2e-2}
# Some gradients are zero up to rounding (a bias before a batch norm). Errors are
# relative to at least this part of the root mean square of all gradients.
NEGLIGIBLE = 1e-3
# GradScaler's initial scale, and smaller scales to try.
LOSS_SCALES = {"fp16": [2.0**n for n in (16, 12, 8, 4, 0)]}


@dataclass
class CheckReport:
    """Result of ``check_recipe``.

    Arguments
    ---------
    lines : list of str
        One for each check, with its figure and "ok" or "FAILED: <where>".
    passed : bool
        Whether all checks passed.
    """

    lines: list[str]
    passed: bool = True

    def add(self, check: str, fault: str | None = None) -> None:
        """Adds a line.

        Arguments
        ---------
        check : str
            The check and its figure.
        fault : str, optional
            Where it failed.
        """
        self.lines.append(f"{check}: {f'FAILED: {fault}' if fault else 'ok'}")
        self.passed = self.passed and not fault

    def __str__(self) -> str:
        return "\n".join([*self.lines, "passed" if self.passed else "failed"])


def check_recipe(
    recipe: Recipe,
    batch: int = 2,
    seconds: float = 1.0,
    precision: str | None = None,
    device: str | torch.device = "cpu",
) -> CheckReport:
    """Compares a recipe's training step with one that stores all activations.

    Both steps have the same weights, noise as speech, and random numbers. The
    reference has ``save_memory`` off, recomputes nothing and computes the
    transducer loss from all logits at once. The check compares the streams
    reconstructed in backward with those of forward, and gradients and running
    statistics of both steps. Errors are relative, ||a - b|| / ||b|| for each
    parameter and buffer.

    Weights that are all zero are first drawn at random. New reversible networks
    have zeros in their last convolutions, so f and g return zeros, which would
    hide errors before them. Dropout inside the joint network and its classifier
    is switched off, because tiles and a whole batch draw different masks. On the
    CPU, where SpeechBrain's transducer loss cannot run, our function of the
    same logits replaces it.

    The check does not cover padding (all utterances have one length),
    augmentation, the optimizer, or several processes.

    Arguments
    ---------
    recipe : sb_memeff.analysis.recipe.Recipe
        Result of ``read_recipe``.
    batch : int
        Utterances.
    seconds : float
        Length of each.
    precision : str, optional
        fp32, bf16 or fp16: autocast in forward, as in Brain. The yaml
        file's by default.
    device : str
        Where to compute. On the CPU fp16 is slow, and LSTMs do not support
        it.

    Returns
    -------
    CheckReport
        Prints as the lines and "passed" or "failed".

    Raises
    ------
    ValueError
        If precision, device or batch are invalid, if the reference step
        fails, or as ``recipe.build``.

    Example
    -------
    >>> from sb_memeff.analysis.recipe import read_recipe
    >>> path = "recipes/VoxCeleb/SpeakerRec_memeff/hparams/train_revnet.yaml"
    >>> recipe = read_recipe(path, {"base_channels": 4, "out_n_neurons": 9})
    >>> check_recipe(recipe, seconds=0.5).passed
    True
    """
    precision = recipe.precision(precision)
    if precision not in STORED:
        raise ValueError(
            f"precision={precision!r} must be one of {', '.join(STORED)}."
        )
    device = _usable(device)
    with forked_generators(device):
        torch.manual_seed(0)
        step = recipe.build().to(device)
        _draw_zeros(step)
        _switch_dropout_off(step)
        if device.type == "cpu" and hasattr(step, "logits_loss"):
            blank_index = step.settings["blank_index"]
            cast(Any, step).logits_loss = partial(
                transducer_loss, blank_index=blank_index
            )
        run_step = partial(
            _run_step, batch=step.batch(batch, seconds), name=precision
        )
        title = f"{recipe.path.name}: {batch} x {seconds:g} s, {precision}"
        return _compare(step, run_step, precision, f"{title}, {device}")


def _compare(
    step: TrainingStep,
    run_step: "Callable[..., _StepResult]",
    precision: str,
    title: str,
) -> CheckReport:
    stored = copy.deepcopy(step)
    storing = _store(stored)
    reference = copy.deepcopy(stored)
    batched = _batch_logits(reference)
    saving = storing + batched
    report = CheckReport([title])
    try:
        expected, scale = _run_reference(reference, run_step, precision)
    except RuntimeError as error:
        # Too short for a convolution, no kernel for this precision, ...
        raise ValueError(
            f"{title}: the step does not run, not even without saving "
            f"memory: {_one_line(error)}"
        ) from error
    if not saving:
        _check_finite(report, expected)
        report.lines.append("Nothing in this step saves memory.")
        return report
    report.lines[0] += f"; saves memory in {_listed(saving)}"
    try:
        result = run_step(step, scale=scale)
        without = result
        if storing:
            without = run_step(stored, scale=scale) if batched else expected
    except RuntimeError as error:
        report.add("training step", _one_line(error))
        return report
    _check_finite(report, result)
    if result.inversion:
        _check_inversion(report, result.inversion)
    if storing:
        _check_gradients(
            report, "stored activations", result, without, STORED[precision]
        )
    if batched:
        _check_gradients(
            report, "all logits at once", without, expected, LOGITS[precision]
        )
    _check_statistics(report, result, expected)
    return report


# --- two steps ---------------------------------------------------------------


def _store(step: TrainingStep) -> list[str]:
    """Stores all activations; returns the names of the changed modules."""
    names = []
    for name, part in step.named_modules():
        # A network precedes its chain and switches it off too.
        if getattr(part, "save_memory", False):
            cast(Any, part).save_memory = False
            names.append(name)
    return names + store_blocks(step)


def _batch_logits(step: TrainingStep) -> list[str]:
    """Computes all logits at once; returns the names of the changed losses."""
    names = []
    for name, part in step.named_modules():
        if isinstance(part, TransducerJointLoss) and part.method != "batched":
            part.method = "batched"
            names.append(name)
    return names


def _draw_zeros(step: TrainingStep) -> None:
    for name, weight in step.named_parameters():
        of_layer = name.rpartition(".")[2].startswith("weight")
        if of_layer and weight.numel() and not weight.any():
            nn.init.normal_(weight, std=1 / math.sqrt(weight[0].numel()))


def _switch_dropout_off(step: TrainingStep) -> None:
    """Where tiles or pieces of the batch draw other random numbers."""
    for module in step.modules():
        if isinstance(module, TransducerJointLoss) or is_split(module):
            for part in module.modules():
                if isinstance(part, nn.modules.dropout._DropoutNd):
                    part.p = 0.0
                if isinstance(getattr(part, "dropout", None), float):
                    # Of attention, in torch and SpeechBrain.
                    cast(Any, part).dropout = 0.0


@dataclass
class _StepResult:
    """Loss, gradients, buffers and inversion errors of a step."""

    loss: float
    gradients: dict[str, torch.Tensor]
    buffers: dict[str, torch.Tensor]
    inversion: dict[str, float]

    def not_finite(self) -> list[str]:
        """Names of parameters with a gradient that is not finite."""
        return [n for n, g in self.gradients.items() if not g.isfinite().all()]


def _run_step(
    step: TrainingStep,
    batch: tuple[torch.Tensor, ...],
    name: str,
    scale: float = 1.0,
) -> _StepResult:
    step = copy.deepcopy(step)
    dtype = AMPConfig.from_name(name).dtype
    context = contextlib.nullcontext()
    if dtype != torch.float32:
        context = torch.autocast(batch[0].device.type, dtype=dtype)
    # Layer drop may use Python's or numpy's random numbers.
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    with inversion_errors(step) as inversion:
        with context:
            loss = step(*batch)
        (loss * scale).backward()
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad / scale
        for name, p in step.named_parameters()
        if p.requires_grad
    }
    buffers = dict(step.named_buffers())
    return _StepResult(loss.item(), gradients, buffers, inversion)


def _run_reference(
    step: TrainingStep, run_step: Callable[..., _StepResult], precision: str
) -> tuple[_StepResult, float]:
    """Runs the step; finds a loss scale with finite gradients."""
    for scale in LOSS_SCALES.get(precision, [1.0]):
        result = run_step(step, scale=scale)
        if not result.not_finite():
            break
    # There is at least one scale.
    # pyrefly: ignore[unbound-name]
    return result, scale


# --- checks ------------------------------------------------------------------


def _check_finite(report: CheckReport, result: _StepResult) -> None:
    faults = result.not_finite()
    if not math.isfinite(result.loss):
        faults = ["loss", *faults]
    report.add(
        f"finite: loss {result.loss:.6g}, {len(result.gradients)} gradients",
        _listed(faults),
    )


def _check_inversion(report: CheckReport, errors: dict[str, float]) -> None:
    worst = max(errors.values())
    # Backward carries the error on to earlier blocks, and it grows.
    fault = next((n for n, e in errors.items() if e > INVERSION), None)
    report.add(
        f"inversion: error at most {worst:.2g} in {len(errors)} blocks (bound "
        f"{INVERSION:.0e})",
        fault,
    )


def _check_gradients(
    report: CheckReport,
    against: str,
    result: _StepResult,
    expected: _StepResult,
    bound: float,
) -> None:
    norms = {n: _norm(g) for n, g in expected.gradients.items()}
    sizes = {n: math.sqrt(g.numel()) for n, g in expected.gradients.items()}
    rms = math.hypot(*norms.values()) / math.hypot(*sizes.values())
    _check_close(
        report,
        f"gradients against {against}",
        {
            name: _relative(
                result.gradients[name],
                gradient,
                max(norms[name], NEGLIGIBLE * rms * sizes[name]),
            )
            for name, gradient in expected.gradients.items()
        },
        bound,
    )


def _check_statistics(
    report: CheckReport, result: _StepResult, expected: _StepResult
) -> None:
    errors = {
        name: _relative(result.buffers[name], buffer, _norm(buffer))
        for name, buffer in expected.buffers.items()
    }
    _check_close(report, "running statistics", errors, STATISTICS)


def _check_close(
    report: CheckReport, check: str, errors: dict[str, float], bound: float
) -> None:
    where = max(errors, key=errors.__getitem__, default=None)
    worst = errors.get(cast(str, where), 0.0)
    most = f", most in {where}" if 0 < worst <= bound else ""
    report.add(
        f"{check}: error {worst:.2g} (bound {bound:.0e}){most}",
        where if worst > bound else None,
    )


def _relative(
    value: torch.Tensor, expected: torch.Tensor, scale: float
) -> float:
    if torch.equal(value, expected):
        return 0.0
    error = _norm(value.double() - expected.double())
    if not math.isfinite(error) or scale == 0:
        return math.inf
    return error / scale


def _norm(tensor: torch.Tensor) -> float:
    return tensor.double().norm().item()


# --- words -------------------------------------------------------------------


def _usable(device: str | torch.device) -> torch.device:
    try:
        # Read its value, which tensors on "meta" do not have.
        tensor = torch.zeros(1, device=device)
        tensor.item()
        return tensor.device
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"device {device}: {_one_line(error)}") from error


def _listed(names: list[str], most: int = 3) -> str:
    more = [f"{len(names) - most} more"] if len(names) > most else []
    return ", ".join([*names[:most], *more])


def _one_line(error: object) -> str:
    return " ".join(str(error).split())
