"""Is a training step that saves memory the step that stores everything?

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
from sb_memeff.nnet.replay.random_states import forked_generators
from sb_memeff.nnet.reversible import inversion_errors
from sb_memeff.nnet.transducer.joint_loss import TransducerJointLoss
from sb_memeff.nnet.transducer.logits_loss import transducer_loss

__all__ = ["CheckReport", "check_recipe"]

# Largest relative errors that pass. Measured on the shipped yaml files: on the
# exact stream 0 at every precision, elsewhere 1e-6 in float32. Faults:
# without the exact stream, the streams of RevNet34 are off by 2e-6 and its
# gradients by 1e-2; one step of the grid is 1e-5 and more.
INVERSION = 1e-6
STATISTICS = 1e-6
# Sums in another order end in another float16 or bfloat16 here and there.
STORED = {"fp32": 1e-4, "bf16": 1e-3, "fp16": 1e-3}
# The same for logits, whose gradients are rounded to 8 and 11 bits before the
# encoder amplifies that: 2e-6, and in bf16 2e-2 on a conformer of 12 layers.
LOGITS = {"fp32": 1e-4, "bf16": 1e-1, "fp16": 2e-2}
# Some gradients are zero but for roundings (a bias before a batch norm): an
# error counts relative to this part of the others' root mean square at least.
NEGLIGIBLE = 1e-3
# What GradScaler begins with, and what it may come down to.
LOSS_SCALES = {"fp16": [2.0**n for n in (16, 12, 8, 4, 0)]}


@dataclass
class CheckReport:
    """Result of ``check_recipe``.

    Arguments
    ---------
    lines : list of str
        One for each check, with its figure; "ok" or "FAILED: <where>" ends it.
    passed : bool
        Whether none has failed.
    """

    lines: list[str]
    passed: bool = True

    def add(self, what: str, fault: str | None = None) -> None:
        """Adds a line.

        Arguments
        ---------
        what : str
            The check and its figure.
        fault : str, optional
            Where it failed.
        """
        self.lines.append(f"{what}: {f'FAILED: {fault}' if fault else 'ok'}")
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
    """Compares a recipe's training step with one that saves no memory.

    The same weights, noise for speech, and random numbers go through both:
    the step as it is, and with ``save_memory`` off, nothing recomputed and
    the transducer loss of all logits at once. What has to agree are the
    streams that backward rebuilds with those that forward saw, gradients and
    running statistics; an error is relative, ||a - b|| / ||b|| by parameter
    and by buffer.

    Weights that are zero everywhere are drawn at random first: the last
    convolutions of fresh reversible networks are, so that f and g return
    zeros and hide what goes wrong before them. Dropout inside the joint
    network and its classifier is switched off, as tiles and a whole batch
    draw different masks. Where SpeechBrain's transducer loss cannot run, on
    the CPU, ours of the same logits takes its place.

    Not seen are: padding (all utterances are of one length), augmentation,
    the optimizer, and several processes.

    Arguments
    ---------
    recipe : sb_memeff.analysis.recipe.Recipe
        What ``read_recipe`` returned.
    batch : int
        Utterances.
    seconds : float
        Length of each.
    precision : str, optional
        fp32, bf16 or fp16: autocast in forward, as in Brain. By default the
        yaml file's.
    device : str
        Where to compute. On the CPU fp16 is slow, and LSTMs have none.

    Returns
    -------
    CheckReport
        Prints as the lines and "passed" or "failed".

    Raises
    ------
    ValueError
        For a precision or device that there is not, a batch of nothing, or
        if not even the step that saves no memory runs. And as
        ``recipe.build``.

    Example
    -------
    >>> from sb_memeff.analysis.recipe import read_recipe
    >>> path = "recipes/VoxCeleb/SpeakerRec/hparams/train_revnet.yaml"
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
        run = partial(_run, batch=step.batch(batch, seconds), name=precision)
        title = f"{recipe.path.name}: {batch} x {seconds:g} s, {precision}"
        return _compare(step, run, precision, f"{title}, {device}")


def _compare(
    step: TrainingStep,
    run: "Callable[..., _Step]",
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
        expected, scale = _run_reference(reference, run, precision)
    except RuntimeError as error:
        # Too short for a convolution, no kernel for this precision, ...
        raise ValueError(
            f"{title}: the step does not run, not even without saving "
            f"memory: {_one_line(error)}"
        ) from error
    if not saving:
        _check_finite(report, expected)
        report.lines.append("Nothing in this step saves memory to be checked.")
        return report
    report.lines[0] += f"; saves memory in {_listed(saving)}"
    try:
        found = run(step, scale=scale)
        without = found
        if storing:
            without = run(stored, scale=scale) if batched else expected
    except RuntimeError as error:
        report.add("training step", _one_line(error))
        return report
    _check_finite(report, found)
    if found.inversion:
        _check_inversion(report, found.inversion)
    if storing:
        _check_gradients(
            report, "stored activations", found, without, STORED[precision]
        )
    if batched:
        _check_gradients(
            report, "all logits at once", without, expected, LOGITS[precision]
        )
    _check_statistics(report, found, expected)
    return report


# --- two steps ---------------------------------------------------------------


def _store(step: TrainingStep) -> list[str]:
    """Saves no memory for activations; names of what did."""
    names = []
    for name, part in step.named_modules():
        # A network comes before the chain in it, and switches that off.
        if getattr(part, "save_memory", False):
            cast(Any, part).save_memory = False
            names.append(name)
    return names + store_blocks(step)


def _batch_logits(step: TrainingStep) -> list[str]:
    """Computes all logits of a transducer at once; names of what did not."""
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
    for loss in step.modules():
        if isinstance(loss, TransducerJointLoss):
            for part in loss.modules():
                if isinstance(part, nn.modules.dropout._DropoutNd):
                    part.p = 0.0


@dataclass
class _Step:
    """A step's loss, gradients and buffers after it, and inversion errors."""

    loss: float
    gradients: dict[str, torch.Tensor]
    buffers: dict[str, torch.Tensor]
    inversion: dict[str, float]

    def not_finite(self) -> list[str]:
        """Parameters whose gradient is not."""
        return [n for n, g in self.gradients.items() if not g.isfinite().all()]


def _run(
    step: TrainingStep,
    batch: tuple[torch.Tensor, ...],
    name: str,
    scale: float = 1.0,
) -> _Step:
    step = copy.deepcopy(step)
    dtype = AMPConfig.from_name(name).dtype
    context = contextlib.nullcontext()
    if dtype != torch.float32:
        context = torch.autocast(batch[0].device.type, dtype=dtype)
    # Layers may be dropped by Python's or numpy's numbers.
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
    return _Step(loss.item(), gradients, buffers, inversion)


def _run_reference(
    step: TrainingStep, run: Callable[..., _Step], precision: str
) -> tuple[_Step, float]:
    """The step, and the scale of the loss that makes its gradients finite."""
    for scale in LOSS_SCALES.get(precision, [1.0]):
        found = run(step, scale=scale)
        if not found.not_finite():
            break
    # There is a scale at least.
    # pyrefly: ignore[unbound-name]
    return found, scale


# --- checks ------------------------------------------------------------------


def _check_finite(report: CheckReport, found: _Step) -> None:
    faults = found.not_finite()
    if not math.isfinite(found.loss):
        faults = ["loss", *faults]
    report.add(
        f"finite: loss {found.loss:.6g}, {len(found.gradients)} gradients",
        _listed(faults),
    )


def _check_inversion(report: CheckReport, errors: dict[str, float]) -> None:
    worst = max(errors.values())
    # Blocks that are walked later inherit the error, and enlarge it.
    fault = next((n for n, e in errors.items() if e > INVERSION), None)
    report.add(
        f"inversion: error {worst:.2g} at most in {len(errors)} blocks (bound "
        f"{INVERSION:.0e})",
        fault,
    )


def _check_gradients(
    report: CheckReport,
    against: str,
    found: _Step,
    expected: _Step,
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
                found.gradients[name],
                gradient,
                max(norms[name], NEGLIGIBLE * rms * sizes[name]),
            )
            for name, gradient in expected.gradients.items()
        },
        bound,
    )


def _check_statistics(
    report: CheckReport, found: _Step, expected: _Step
) -> None:
    errors = {
        name: _relative(found.buffers[name], buffer, _norm(buffer))
        for name, buffer in expected.buffers.items()
    }
    _check_close(report, "running statistics", errors, STATISTICS)


def _check_close(
    report: CheckReport, what: str, errors: dict[str, float], bound: float
) -> None:
    where = max(errors, key=errors.__getitem__, default=None)
    worst = errors.get(cast(str, where), 0.0)
    most = f", most in {where}" if 0 < worst <= bound else ""
    report.add(
        f"{what}: error {worst:.2g} (bound {bound:.0e}){most}",
        where if worst > bound else None,
    )


def _relative(
    found: torch.Tensor, expected: torch.Tensor, scale: float
) -> float:
    if torch.equal(found, expected):
        return 0.0
    error = _norm(found.double() - expected.double())
    if not math.isfinite(error) or scale == 0:
        return math.inf
    return error / scale


def _norm(tensor: torch.Tensor) -> float:
    return tensor.double().norm().item()


# --- words -------------------------------------------------------------------


def _usable(device: str | torch.device) -> torch.device:
    try:
        # Read, since tensors on "meta" hold nothing.
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
