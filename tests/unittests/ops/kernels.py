"""Every operation that has a Triton kernel. A new one is a line in KERNELS.

Without a GPU they run in Triton's interpreter, see tests/conftest.py.

Authors
 * The sb_memeff authors 2026
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from speechbrain.nnet.transducer.transducer_joint import Transducer_joint
from torch import nn

from sb_memeff.nnet.reversible.grid import round_to_grid
from sb_memeff.nnet.transducer import lattice, rows
from sb_memeff.nnet.transducer.joint_loss import TransducerJointLoss
from sb_memeff.ops.blocks_8bit import BLOCK, VALUES, Codebook, Quantized8bit
from sb_memeff.ops.triton import (
    blocks_8bit,
    grid,
    joint,
    lattice as lattice_kernels,
    logit_rows,
)
from tests.unittests.optim.optimizers import CLASSES, OPTIMIZERS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def poison(monkeypatch):
    """Fills what a kernel must write with NaN, where a test can see it."""
    empty_like, new_empty = torch.empty_like, torch.Tensor.new_empty

    def filled(make):
        def made(*args, **kwargs):
            x = make(*args, **kwargs)
            return x.fill_(torch.nan) if x.is_floating_point() else x

        return made

    monkeypatch.setattr(torch, "empty_like", filled(empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", filled(new_empty))


def error(found, exact):
    """||found - exact|| / ||exact||; NaN never passes a bound."""
    found, exact = found.double().flatten(), exact.double().flatten()
    return ((found - exact).norm() / exact.norm().clamp(min=1e-30)).item()


@dataclasses.dataclass(frozen=True)
class Kernel:
    """An operation: its kernel, its plain form, and what they are called with.

    Arguments
    ---------
    fused : callable
        Takes tensors, lists of them and settings; launches the kernel and
        returns a list of tensors. What the kernel updates is a copy.
    plain : callable
        The same by torch, of which float64 is asked.
    inputs : callable
        Draws the tensors, given a generator, a dtype and a shape.
    shapes : list of tuple
        Ragged ones among them.
    bounds : dict
        The error that is allowed, by dtype.
    settings : list of dict
        The last one asks for all that the kernel can do: it is compiled.
    dispatched : callable, optional
        As users call it; ``plain`` where that chooses.
    """

    fused: Callable[..., list[torch.Tensor]]
    plain: Callable[..., list[torch.Tensor]]
    inputs: Callable[..., tuple[Any, ...]]
    shapes: list[tuple[Any, ...]]
    bounds: dict[torch.dtype, float]
    settings: list[dict[str, Any]] = dataclasses.field(
        default_factory=lambda: [{}]
    )
    dispatched: Callable[..., object] | None = None

    def draw(self, shape, dtype, seed=0):
        """Inputs of a shape, always the same ones."""
        g = torch.Generator().manual_seed(seed)
        return tuple(
            [y.to(DEVICE) for y in x] if isinstance(x, list) else x.to(DEVICE)
            for x in self.inputs(g, dtype, *shape)
        )


def _fp32(bound):
    return {torch.float32: bound}


def _all(fp32, fp16, bf16):
    # The interpreter cuts bfloat16 off, where a GPU rounds.
    return {
        torch.float32: fp32,
        torch.float16: fp16,
        torch.bfloat16: bf16,
    }


def _rows(g, dtype, size, vocabulary):
    logits = 4 * torch.randn(size, vocabulary, generator=g)
    return logits.to(dtype), torch.randint(1, vocabulary, (size,), generator=g)


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
        rows._scale_into_float16 if fits else None,
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


def _lattice(g, dtype, frames, targets):
    shape = len(frames), max(frames), max(targets) + 1, 3
    scores = torch.randn(shape, generator=g).log_softmax(-1).to(dtype)
    lengths = torch.tensor([frames, targets])
    return scores[..., 0], scores[..., :-1, 1], *lengths


def _reals(g, dtype, size):
    """Ties, both zeros, what is not finite, the large and the small."""
    ties = torch.arange(-9, 10) / 2 + 0.5
    large = torch.tensor([2.0**22 + 0.5, -(2.0**23) - 1, 2.0**30, -(2.0**40)])
    odd = torch.tensor(
        [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-30, -1e-30]
    )
    x = torch.cat(
        [
            *(torch.cat([ties, large]) * 2.0**-bits for bits in (0, 9, 12)),
            odd,
            3 * torch.randn(2000, generator=g),
            1e-4 * torch.randn(500, generator=g),
        ]
    )
    return (x[-size:].to(dtype),)


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


def _in_8bit(g, dtype, *sizes):
    """Parameters, gradients, and codes and maxima of three moments."""
    found = [
        [torch.randn(n, generator=g).to(dtype) for n in sizes] for _ in range(5)
    ]
    params, grads, *moments = found
    packed = []
    for number, states in enumerate(moments):
        signed = number == 0
        codebook = Codebook(signed, torch.device("cpu"))
        states = [codebook.quantize(x if signed else x**2) for x in states]
        packed += [x.codes for x in states], [x.absmax for x in states]
    return params, grads, *packed


def _names(optimizer):
    return [name for name in optimizer.states if name in optimizer.signed]


def _resumed(kind, settings, params, grads, *packed):
    """Our optimizer, which has done a step and has these states."""
    params = [nn.Parameter(p.clone()) for p in params]
    optimizer = kind.ours(params, min_8bit_size=0, **settings)
    for number, p in enumerate(params):
        p.grad = grads[number]
        state = {}
        if "step" in optimizer.states:
            where = DEVICE if settings.get("fused") else "cpu"
            state["step"] = torch.ones((), device=where)
        pairs = zip(packed[::2], packed[1::2])
        for name, (codes, maxima) in zip(_names(optimizer), pairs):
            x = Quantized8bit(codes[number].clone(), maxima[number].clone())
            state[name] = x
        optimizer.state[p] = state
    return optimizer, params


def _step_kernel(kind):
    """The step of an 8-bit optimizer, of all parameters in one launch."""

    def fused(*inputs, **settings):
        optimizer, params = _resumed(kind, settings, *inputs)
        (group,) = optimizer.param_groups
        optimizer._update_fused(group, params)
        names = optimizer._names(group)
        maxima = [
            optimizer.state[p][name].absmax
            for name in _names(optimizer)
            if name in names
            for p in params
        ]
        return [*(p.detach() for p in params), *maxima]

    def plain(*inputs, **settings):
        """torch's step from the same states, in float64."""
        optimizer, params = _resumed(kind, settings, *inputs)
        theirs = kind.torchs(params, **{**settings, "fused": None})
        for p in params:
            for name, value in optimizer.state[p].items():
                if name in optimizer.signed:
                    values = torch.tensor(VALUES[optimizer.signed[name]])
                    value = (
                        values.to(p)[value.codes.long()]
                        * (value.absmax.repeat_interleave(BLOCK)[: p.numel()])
                    )
                theirs.state[p][name] = value.cpu() if name == "step" else value
        theirs.step()
        names = optimizer._names(optimizer.param_groups[0])
        maxima = [
            torch.stack(
                [x.abs().max() for x in theirs.state[p][name].split(BLOCK)]
            )
            for name in _names(optimizer)
            if name in names
            for p in params
        ]
        return [*(p.detach() for p in params), *maxima]

    def dispatched(*inputs, **settings):
        optimizer, params = _resumed(kind, settings, *inputs)
        optimizer.step()
        return params

    settings = [k.options for k in OPTIMIZERS.values() if k.ours is kind.ours]
    # Whole blocks, whose addresses are aligned, and parts of blocks.
    shapes = [(512, 256), (301, 7, 256)]
    bounds = _fp32(2e-6)
    return Kernel(fused, plain, _in_8bit, shapes, bounds, settings, dispatched)


def _many_sizes(g, dtype, size):
    """Of many orders of magnitude; and blocks that are special."""
    sizes = 10 ** torch.empty(size).uniform_(-9, 0, generator=g)
    x = torch.randn(size, generator=g) * sizes
    x[256:512] = 0
    x[512:768] = torch.nan
    x[768:769] = torch.inf
    # On the middles between two codes, where the lower one is taken.
    for block, signed in enumerate((True, False), 4):
        values = torch.tensor(VALUES[signed])
        ties = torch.cat([(values[1:] + values[:-1]) / 2, torch.ones(1)])
        part = x[256 * block : 256 * (block + 1)]
        part.copy_(ties[: len(part)])
    return (x.to(dtype),)


def _comparable(codes, maxima):
    """Of what is not finite any code will do: its maximum is not either."""
    finite = maxima.isfinite().repeat_interleave(BLOCK)[: len(codes)]
    return [codes * finite, maxima]


def _quantize_plain(x, signed):
    packed = Codebook(signed, x.device).quantize(x if signed else x.abs())
    return _comparable(packed.codes, packed.absmax)


def _quantize_fused(x, signed):
    middles = Codebook(signed, x.device).middles
    x = x if signed else x.abs()
    return _comparable(*blocks_8bit.quantize(x, middles, signed))


KERNELS = {
    "row_scores": Kernel(
        lambda *inputs: [logit_rows.row_scores(*inputs, 1)],
        lambda *inputs: [rows.row_scores(*inputs, 1)],
        _rows,
        [(1, 2), (5, 1000), (3, 1025), (4, 2500)],
        # Of half precision too: sums are float32.
        _all(1e-6, 1e-6, 1e-6),
    ),
    "row_gradient": Kernel(
        _row_gradient_fused,
        _row_gradient_plain,
        _row_gradients,
        [(1, 2), (5, 1000), (3, 1025)],
        _all(1e-6, 5e-4, 8e-3),
        [
            {},
            {"clamp": 0.2},
            {"weighs": True},
            {"fits": True},
            {"clamp": 0.1, "weighs": True},
            {"clamp": 0.1, "weighs": True, "fits": True},
        ],
    ),
    "forward_backward": Kernel(
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
            ([2, 1], [150, 200]),
        ],
        _fp32(3e-7),
    ),
    "round_to_grid": Kernel(
        lambda x, bits: [grid.round_to_grid(x, bits)],
        lambda x, bits: [round_to_grid(x, bits)],
        _reals,
        [(1,), (1024,), (1025,), (2600,)],
        _all(0, 0, 0),
        [{"bits": 0}, {"bits": 9}, {"bits": 12}],
    ),
    "join": Kernel(
        _join_fused,
        _join_plain,
        _cells,
        [(1, 1, 1, 7), (3, 7, 5, 33), (2, 1, 9, 130)],
        _all(1e-6, 1e-3, 1e-2),
        [{"activation": name} for name in ACTIVATIONS],
        _joint_loss,
    ),
    "add_input_gradients": Kernel(
        _add_fused,
        _add_plain,
        _cells,
        [(1, 1, 1, 7), (2, 2, 3, 70), (1, 18, 2, 9)],
        _all(1e-6, 1e-3, 1e-2),
        [
            {"activation": "leaky_relu"},
            {"activation": "gelu_tanh", "factor": 0.25},
        ],
        _joint_loss,
    ),
    "quantize": Kernel(
        _quantize_fused,
        _quantize_plain,
        _many_sizes,
        [(1,), (256,), (3001,)],
        _fp32(0),
        [{"signed": True}, {"signed": False}],
    ),
    **{cls.__name__: _step_kernel(kind) for cls, kind in CLASSES.items()},
}
