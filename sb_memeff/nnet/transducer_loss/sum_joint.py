"""The usual joint network and classifier, tile by tile without autograd.

These are SpeechBrain's Transducer_joint with addition, an elementwise activation
and one linear layer. On a GPU two kernels and the library's matrix products
replace the modules, autograd and the recording for replays.

Authors
 * The sb_memeff authors 2026
"""

import dataclasses
from typing import Any, Optional, cast

import speechbrain.nnet.linear
import torch
from speechbrain.nnet.transducer.transducer_joint import Transducer_joint
from torch import nn
from torch.nn import functional

from sb_memeff.nnet.transducer_loss.cells import (
    CellLogits,
    Cells,
    Gradients,
    Tile,
)
from sb_memeff.nnet.transducer_loss.half_linear import HALF, wide_product
from sb_memeff.nnet.transducer_loss.passes import Planes, TiledPass, some_of
from sb_memeff.ops.dispatch import runs_fused
from sb_memeff.utils.hooks import are_watched

__all__ = ["SumJoint", "SumJointPass"]

# Weight and optional bias, in the dtype of the computation.
Narrow = tuple[torch.Tensor, Optional[torch.Tensor]]


@dataclasses.dataclass
class SumJoint:
    """A joint that adds and activates, and the linear layer after it.

    Arguments
    ---------
    activation : str
        Its name in ``sb_memeff.ops.triton.joint``.
    slope : float
        Negative slope of leaky_relu.
    linear : torch.nn.Linear
        The layer.
    names : tuple of str
        Names of its weight and bias among the parameters.
    dtype : torch.dtype
        Dtype of the computation.
    """

    activation: str
    slope: float
    linear: nn.Linear
    names: tuple[str, str | None]
    dtype: torch.dtype

    @classmethod
    def of(
        cls, logits: CellLogits, enc: torch.Tensor, pred: torch.Tensor
    ) -> "SumJoint | None":
        """Recognises supported modules.

        Arguments
        ---------
        logits : CellLogits
            Joint and classifier.
        enc : torch.Tensor
            [B, T, H].
        pred : torch.Tensor
            [B, U+1, H].

        Returns
        -------
        SumJoint or None
            None if the modules are not supported or have hooks, or if no
            kernel supports these tensors.
        """
        activation = _activation_of(logits.joint)
        linear = _linear_of(logits.classifier)
        if activation is None or linear is None:
            return None
        tensors = enc, pred, *linear.parameters()
        if not runs_fused(*tensors) or _is_observed(logits):
            return None
        kind = enc.device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        else:
            dtype = enc.dtype
            if any(p.dtype != dtype for p in linear.parameters()):
                return None
        if enc.shape[2] != linear.in_features or pred.shape[2] != enc.shape[2]:
            # The modules raise an error, or broadcast.
            return None
        names = {id(p): name for name, p in logits.named_parameters()}
        pair = linear.weight, linear.bias
        return cls(
            *activation,
            linear,
            cast(
                "tuple[str, str | None]", tuple(names.get(id(p)) for p in pair)
            ),
            dtype,
        )

    def narrow(self) -> Narrow:
        """Weight and bias (or None) in the dtype of the computation."""
        weight, bias = self.linear.weight, self.linear.bias
        return (
            weight.detach().to(self.dtype),
            None if bias is None else bias.detach().to(self.dtype),
        )

    def logits(
        self, cells: Cells, tile: Tile, narrow: Narrow
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Computes joined rows and logits of cells.

        Arguments
        ---------
        cells : Cells
            Cells of the group of samples.
        tile : Tile
            The cells.
        narrow : tuple
            Result of ``narrow``.

        Returns
        -------
        tuple of torch.Tensor
            [N, H] and [N, V].
        """
        from sb_memeff.ops.triton.joint import join

        joined = join(
            cells.enc,
            cells.pred,
            tile.indices,
            self.activation,
            self.slope,
            self.dtype,
        )
        with torch.autocast(joined.device.type, enabled=False):
            return joined, functional.linear(joined, *narrow)

    def add(
        self,
        gradients: Gradients,
        cells: Cells,
        tile: Tile,
        positions: torch.Tensor,
        start: int,
        computed: tuple[torch.Tensor, torch.Tensor],
        narrow: Narrow,
        factor: torch.Tensor | None,
    ) -> None:
        """Adds the gradients of weights, encoder and predictor.

        Arguments
        ---------
        gradients : Gradients
            The sums to add to.
        cells : Cells
            Cells of the group of samples.
        tile : Tile
            The cells.
        positions : torch.Tensor
            See ``sb_memeff.ops.triton.joint.add_input_gradients``.
        start : int
            See there.
        computed : tuple of torch.Tensor
            The joined rows, and the gradient of the logits.
        narrow : tuple
            Result of ``narrow``.
        factor : torch.Tensor or None
            A scalar to multiply by.
        """
        from sb_memeff.ops.triton.joint import add_input_gradients

        joined, gradient = computed
        gradients.linear.factor = factor
        with torch.autocast(joined.device.type, enabled=False):
            for_joined = gradient @ narrow[0]
            total = gradients.weight_sums.get(self.names[0])
            if total is not None:
                if self.dtype in HALF:
                    found = wide_product(gradient.t(), joined)
                    gradients.linear.add(total, found, total.dtype)
                else:
                    total.addmm_(gradient.t(), joined)
            # Without a bias the name is None.
            total = gradients.weight_sums.get(cast(str, self.names[1]))
            if total is not None:
                found = gradient.sum(0, dtype=torch.float32)
                gradients.linear.add(total, found, total.dtype)
        add_input_gradients(
            for_joined,
            positions,
            start,
            tile.indices,
            cells.enc,
            cells.pred,
            gradients.of_inputs[0].sum,
            gradients.of_inputs[1].sum,
            self.activation,
            self.slope,
            factor,
        )


class SumJointPass(TiledPass):
    """TiledPass with a SumJoint instead of the modules.

    Arguments
    ---------
    joint : SumJoint
        The recognised modules.
    *args : tuple
        See TiledPass.
    **kwargs : dict
        See TiledPass.
    """

    def __init__(self, joint: SumJoint, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.joint = joint

    def _score(self, flat: torch.Tensor) -> None:
        cells, narrow = self.cells, self.joint.narrow()
        whole = cells.tile(cells.indices())
        found = []
        for tile in whole.split(self.max_rows):
            _, logits = self.joint.logits(cells, tile, narrow)
            found.append(cells.scores(tile, logits))
            del logits
        flat[:, whole.indices] = torch.cat(found, 1)

    def _propagate(
        self,
        gradients: Gradients,
        planes: Planes,
        indices: torch.Tensor,
        visited: torch.Tensor,
        counts: list[int],
        upstream: torch.Tensor | None,
    ) -> None:
        cells, narrow, count = self.cells, self.joint.narrow(), sum(counts)
        whole = cells.tile(some_of(indices, visited, count))
        positions = torch.full_like(planes[0], -1, dtype=torch.int32)
        positions[whole.indices] = torch.arange(
            count, dtype=torch.int32, device=positions.device
        )
        packed = [plane[whole.indices].split(self.max_rows) for plane in planes]
        tiles = whole.split(self.max_rows) if count else []
        for number, (tile, *scores) in enumerate(zip(tiles, *packed)):
            joined, logits = self.joint.logits(cells, tile, narrow)
            gradient, factor = gradients.of_logits(
                cells, tile, logits, *scores, upstream=upstream, overwrite=True
            )
            del logits
            self.joint.add(
                gradients,
                cells,
                tile,
                positions,
                number * self.max_rows,
                (joined, gradient),
                narrow,
                factor,
            )
            del joined, gradient


# Saved on import, to detect replaced methods.
_FORWARDS = {
    kind: kind.forward
    for kind in (
        Transducer_joint,
        speechbrain.nnet.linear.Linear,
        nn.Linear,
        nn.LeakyReLU,
        nn.GELU,
        nn.ReLU,
        nn.Tanh,
        nn.Sigmoid,
        nn.SiLU,
    )
}


def _activation_of(joint: nn.Module) -> tuple[str, float] | None:
    """Name and slope, or None for another joint network."""
    if type(joint) is not Transducer_joint or joint.joint != "sum":
        return None
    module = joint.nonlinearity
    if type(module) is nn.LeakyReLU:
        return "leaky_relu", float(module.negative_slope)
    if type(module) is nn.GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}[module.approximate], 0.0
    names = {
        nn.ReLU: "relu",
        nn.Tanh: "tanh",
        nn.Sigmoid: "sigmoid",
        nn.SiLU: "silu",
    }
    name = names.get(type(module))
    return None if name is None else (name, 0.0)


def _linear_of(classifier: nn.Module) -> nn.Linear | None:
    """The linear layer of a classifier that consists of one, or None."""
    if (
        type(classifier) is speechbrain.nnet.linear.Linear
        and classifier.max_norm is None
    ):
        classifier = classifier.w
    return classifier if type(classifier) is nn.Linear else None


def _is_observed(modules: nn.Module) -> bool:
    """Whether hooks or replaced methods observe or change a module."""
    parts = list(modules.modules())
    return are_watched(parts) or any(
        _FORWARDS.get(type(part)) not in (None, type(part).forward)
        for part in parts
    )
