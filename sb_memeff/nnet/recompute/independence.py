"""Checks that the samples of a batch do not depend on each other.

Authors
 * The sb_memeff authors 2026
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import TreeSpec, tree_leaves, tree_unflatten

from sb_memeff.nnet.replay.recorder import Recorder, without_trace

__all__ = ["OutputRowsError", "dependent_input"]


class OutputRowsError(ValueError):
    """Raised if an output does not have a row for each sample.

    Arguments
    ---------
    shape : torch.Size
        Of the output.
    """

    def __init__(self, shape: torch.Size):
        super().__init__(f"An output for two samples has shape {list(shape)}.")
        self.shape = shape


def dependent_input(
    block: nn.Module,
    function: Callable[..., Any],
    leaves: Sequence[Any],
    per_sample: Sequence[bool],
    structure: TreeSpec,
) -> int | None:
    """Finds an argument of one sample that changes the output of another.

    The gradient of a sample's output for another sample's input is exactly zero
    if they are independent, with dropout too. The call leaves no trace in the
    state of modules and random generators.

    Arguments
    ---------
    block : torch.nn.Module
        The block.
    function : callable
        Its forward.
    leaves : list
        Leaves of its arguments, for two samples.
    per_sample : list of bool
        Whether a leaf has rows for each sample.
    structure : TreeSpec
        Structure of ``(args, kwargs)``.

    Returns
    -------
    int or None
        Index of a leaf, if there is one.

    Raises
    ------
    OutputRowsError
        If an output does not have two rows.

    Example
    -------
    >>> from torch.utils._pytree import tree_flatten
    >>> x = torch.rand(2, 3)
    >>> leaves, structure = tree_flatten(((x,), {}))
    >>> for module in torch.nn.Softmax(dim=1), torch.nn.Softmax(dim=0):
    ...     dependent_input(module, module.forward, leaves, [True], structure)
    0
    """
    inputs = {}
    for i, (leaf, split) in enumerate(zip(leaves, per_sample)):
        if split and leaf.is_floating_point():
            inputs.setdefault(id(leaf), (i, leaf.detach().requires_grad_()))
    # Copies, because the function may change its input in place, which is refused
    # later.
    with torch.enable_grad():
        copies = {key: x.clone() for key, (_, x) in inputs.items()}
    leaves = [copies.get(id(x), x) for x in leaves]
    tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
    recorder = Recorder(tensors[0].device)
    recorded = recorder.recording(block, leaves)
    # An enclosing segment must not count these tensors.
    hooks = saved_tensors_hooks(lambda x: x, lambda x: x)
    no_trace = without_trace(block)
    with torch.enable_grad(), recorded as recording, no_trace, hooks:
        args, kwargs = tree_unflatten(leaves, structure)
        result = function(*args, **kwargs)
        shapes = [
            y.shape for y in tree_leaves(result) if isinstance(y, torch.Tensor)
        ]
        wrong = [shape for shape in shapes if shape[:1] != (2,)]
        found = None
        if not wrong:
            found = _dependent(result, list(inputs.values()))
    for source, state in recording.random_states or ():
        source.write(state)
    if wrong:
        raise OutputRowsError(wrong[0])
    return found


def _dependent(
    result: Any, inputs: list[tuple[int, torch.Tensor]]
) -> int | None:
    outputs = [
        y
        for y in tree_leaves(result)
        if isinstance(y, torch.Tensor) and y.requires_grad
    ]
    if not outputs or not inputs:
        return None
    for sample, other in ((0, 1), (1, 0)):
        # No plain sum, which is constant after a norm or a softmax.
        totals = [(_weights(y[sample]) * y[sample]).sum() for y in outputs]
        gradients = torch.autograd.grad(
            totals,
            [x for _, x in inputs],
            retain_graph=True,
            allow_unused=True,
        )
        for (index, x), gradient in zip(inputs, gradients):
            if gradient is not None:
                rows = gradient.unflatten(0, (2, len(x) // 2))[other]
                # NaN comes from zero times the infinity of a masked score.
                if rows.nan_to_num().any():
                    return index
    return None


def _weights(y: torch.Tensor) -> torch.Tensor:
    numbers = torch.arange(y.numel(), device=y.device)
    return numbers.cos().view(y.shape).to(y.dtype)
