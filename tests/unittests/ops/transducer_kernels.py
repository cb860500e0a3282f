"""Kernels of the transducer loss.

Authors
 * The sb_memeff authors 2026
"""

import torch
from speechbrain.nnet.transducer.transducer_joint import Transducer_joint
from torch import nn

from sb_memeff.nnet.transducer_loss.joint_loss import TransducerJointLoss
from sb_memeff.ops import (
    lattice,
    logit_rows as rows,
)
from sb_memeff.ops.triton import (
    joint,
    lattice as lattice_kernels,
    logit_rows,
)
from tests.unittests.ops.kernel import DEVICE, Kernel, each, fp32


def _rows(g, dtype, size, vocabulary):
    logits = 4 * torch.randn(size, vocabulary, generator=g)
    return logits.to(dtype), torch.randint(1, vocabulary, (size,), generator=g)


ROW_SCORES = Kernel(
    lambda *inputs: [logit_rows.row_scores(*inputs, 1)],
    lambda *inputs: [rows.row_scores(*inputs, 1)],
    _rows,
    [(1, 2), (5, 1000), (3, 1025), (4, 2500)],
    # Of half precision too: sums are float32.
    each(1e-6, 1e-6, 1e-6),
)


def _row_gradients(g, dtype, size, vocabulary):
    logits, target = _rows(g, dtype, size, vocabulary)
    lse = rows.row_scores(logits.double(), target, 0)[0].float()
    blank, emission = torch.rand(2, size, generator=g)
    weight = torch.linspace(-2, 3, size)
    return logits, lse, target, blank, 0.5 * emission, weight


def _row_gradient_fused(*inputs, clamp=None, weighs=False, fits=False):
    *inputs, weight = inputs
    found, undo = logit_rows.row_gradient(
        *inputs,
        0,
        inputs[0].new_zeros(1, dtype=torch.float32),
        1e-3,
        clamp,
        weight if weighs else None,
        rows.scale_into_float16 if fits else None,
    )
    return [found.double() * undo if fits else found]


def _row_gradient_plain(*inputs, clamp=None, weighs=False, fits=False):
    *inputs, weight = inputs
    found, undo = rows.row_gradient(
        *inputs,
        0,
        clamp=clamp,
        weight=weight if weighs else None,
        fit_into_float16=fits,
    )
    return [found.double() * undo if fits else found]


ROW_GRADIENT = Kernel(
    _row_gradient_fused,
    _row_gradient_plain,
    _row_gradients,
    [(1, 2), (5, 1000), (3, 1025)],
    each(1e-6, 5e-4, 8e-3),
    [
        {},
        {"clamp": 0.2},
        {"weighs": True},
        {"fits": True},
        {"clamp": 0.1, "weighs": True},
        {"clamp": 0.1, "weighs": True, "fits": True},
    ],
)


def _lattice(g, dtype, frames, targets):
    shape = len(frames), max(frames), max(targets) + 1, 3
    scores = torch.randn(shape, generator=g).log_softmax(-1).to(dtype)
    lengths = torch.tensor([frames, targets])
    return scores[..., 0], scores[..., :-1, 1], *lengths


FORWARD_BACKWARD = Kernel(
    lambda *inputs: list(lattice_kernels.forward_backward(*inputs)),
    lambda *inputs: list(lattice.forward_backward(*inputs)),
    _lattice,
    [
        ([13, 8, 5, 1], [9, 4, 0, 2]),
        ([1], [0]),
        ([1], [5]),
        ([7], [0]),
        ([2, 3], [40, 33]),
        ([30, 1], [3, 3]),
        ([1], [200]),
    ],
    fp32(3e-7),
)


def _cells(g, dtype, batch, frames, columns, features):
    """Rows of encoder and predictor, gradients of some cells, and the cells."""
    size = batch * frames * columns
    indices = torch.randperm(size, generator=g)[: 1 + 2 * size // 3].sort()[0]
    shapes = (
        (batch, frames, features),
        (batch, columns, features),
        (len(indices), features),
    )
    return *(torch.randn(s, generator=g).to(dtype) for s in shapes), indices


# By the kernels' names; the last is the longest.
ACTIVATIONS = {
    "relu": nn.ReLU,
    "leaky_relu": lambda: nn.LeakyReLU(0.2),
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU("tanh"),
}


def slope_of(activation):
    """That of leaky_relu below 0."""
    return getattr(ACTIVATIONS[activation](), "negative_slope", 0.0)


def _join_fused(enc, pred, _, indices, activation):
    slope = slope_of(activation)
    return [joint.join(enc, pred, indices, activation, slope, enc.dtype)]


def _join_plain(enc, pred, _, indices, activation):
    sums = (enc[:, :, None] + pred[:, None]).flatten(0, 2)
    return [ACTIVATIONS[activation]()(sums[indices])]


def _add_fused(enc, pred, gradient, indices, activation, factor=None):
    cells = enc.shape[0] * enc.shape[1] * pred.shape[1]
    positions = indices.new_full((cells,), -1, dtype=torch.int32)
    # As those of the second tile, behind one of 5 cells.
    positions[indices] = torch.arange(len(indices), device=DEVICE).int() + 5
    totals = [torch.ones_like(x, dtype=torch.float32) for x in (enc, pred)]
    joint.add_input_gradients(
        gradient,
        positions,
        5,
        indices,
        enc,
        pred,
        *totals,
        activation,
        slope_of(activation),
        None if factor is None else torch.tensor(factor, device=DEVICE),
    )
    return totals


def _add_plain(enc, pred, gradient, indices, activation, factor=None):
    enc, pred = (x.detach().requires_grad_() for x in (enc, pred))
    (joined,) = _join_plain(enc, pred, gradient, indices, activation)
    found = torch.autograd.grad(joined, (enc, pred), gradient * (factor or 1))
    return [1 + x.to(rows.wide_dtype(x.dtype)) for x in found]


def _joint_loss(enc, pred, _, indices, activation, factor=None):
    classifier = nn.Linear(enc.shape[2], 3).to(enc)
    joint = Transducer_joint(nonlinearity=ACTIVATIONS[activation])
    targets = indices.new_ones(len(pred), pred.shape[1] - 1)
    lengths = torch.ones(len(pred), device=DEVICE)
    loss = TransducerJointLoss(joint, classifier)
    return loss(enc.requires_grad_(), pred, targets, lengths, lengths)


JOIN = Kernel(
    _join_fused,
    _join_plain,
    _cells,
    [(1, 1, 1, 7), (2, 3, 3, 130)],
    each(1e-6, 1e-3, 1e-2),
    [{"activation": name} for name in ACTIVATIONS],
    _joint_loss,
)
ADD_INPUT_GRADIENTS = Kernel(
    _add_fused,
    _add_plain,
    _cells,
    [(1, 1, 1, 7), (2, 2, 3, 70), (1, 18, 2, 9)],
    each(1e-6, 1e-3, 1e-2),
    [
        {"activation": "leaky_relu"},
        {"activation": "gelu_tanh", "factor": 0.25},
    ],
    _joint_loss,
)
