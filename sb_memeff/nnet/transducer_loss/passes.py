"""Forward and backward passes over the lattices of a group of samples.

Authors
 * The sb_memeff authors 2026
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import nn

from sb_memeff.nnet.replay.recorder import Recorder, Recording
from sb_memeff.nnet.transducer_loss.cells import (
    CellLogits,
    Cells,
    ComputedLogits,
    Gradients,
    Tile,
)
from sb_memeff.ops.dispatch import has_values
from sb_memeff.ops.lattice import loss_and_occupancies
from sb_memeff.ops.logit_rows import wide_dtype

__all__ = ["Planes", "TiledPass", "WholePass", "some_of"]

# Flat planes of log-normalisers, and of posteriors of blanks and emissions.
Planes = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class TiledPass:
    """Computes scores tile by tile, the lattice, then gradients tile by tile.

    Forward computes all cells, backward only those that paths visit.

    Arguments
    ---------
    cells : Cells
        Cells of the samples.
    recorder : Recorder
        Recorder of the forward pass.
    occupancy_floor : float
        See TransducerJointLoss.
    fastemit_lambda : float
        See TransducerJointLoss.
    """

    def __init__(
        self,
        cells: Cells,
        recorder: Recorder,
        occupancy_floor: float,
        fastemit_lambda: float,
    ):
        self.max_rows = cells.max_rows
        self.occupancy_floor = occupancy_floor
        self.fastemit_lambda = fastemit_lambda
        self.cells, self.recorder = cells, recorder
        self.recordings: list[Recording] = []
        self.planes: Planes | None = None
        self.nll: torch.Tensor | None = None
        # Of each loss, once backward has read it.
        self.finite: list[bool] = []

    def forward(self, gradients: Gradients | None = None) -> torch.Tensor:
        """Computes the loss of each sample.

        Arguments
        ---------
        gradients : Gradients, optional
            Given if ``backward`` follows at once.

        Returns
        -------
        torch.Tensor
            [B].
        """
        cells = self.cells
        planes = cells.enc.new_zeros(
            3, *cells.shape, dtype=wide_dtype(cells.enc.dtype)
        )
        flat = planes.flatten(1)
        self._score(flat)
        nll, blank, emission = loss_and_occupancies(
            *planes[1:],
            logit_lengths=cells.logit_lengths,
            target_lengths=cells.target_lengths,
            fastemit_lambda=self.fastemit_lambda,
        )
        self.planes, self.nll = (flat[0].clone(), blank, emission), nll
        return nll

    def _score(self, flat: torch.Tensor) -> None:
        """Fills the flat planes of normalisers, blanks and targets."""
        cells, replayed = self.cells, bool(self.recordings)
        for number, chunk in enumerate(self._split(cells.indices())):
            tile = cells.tile(chunk)
            if replayed:
                recording = self.recordings[number]
                with self.recorder.replay(cells.logits, recording):
                    logits = cells.compute_logits(tile)
            else:
                logits, recording = self.recorder.record(
                    _Call(cells.logits), cells.compute_logits, tile
                )
                self.recordings.append(recording)
            flat[:, chunk] = cells.scores(tile, logits)
            del logits

    def backward(
        self, gradients: Gradients, upstream: torch.Tensor | None = None
    ) -> None:
        """Adds the gradients of the samples.

        Arguments
        ---------
        gradients : Gradients
            The sums to add to.
        upstream : torch.Tensor, optional
            [B], gradient of each sample's loss; 1 by default.
        """
        cells = self.cells
        if self.planes is None:
            # A second backward.
            nll = cast(torch.Tensor, self.nll)
            with torch.no_grad():
                gradients.compare_losses(nll, self.forward())
        planes, self.planes = cast(Planes, self.planes), None
        indices = cells.indices()
        _, blank, emission = planes
        # Not "occupancy >= floor", so that NaN counts as visited.
        visited = ~((blank + emission)[indices] < self.occupancy_floor)
        if upstream is not None:
            visited &= (upstream != 0)[cells.sample_of(indices)]
        counts = self._count(visited)
        self._propagate(gradients, planes, indices, visited, counts, upstream)

    def _count(self, visited: torch.Tensor) -> list[int]:
        """How many cells of each tile are visited. The host waits once."""
        tiles = -(-len(visited) // self.max_rows)
        if not has_values(visited):
            # Memory is analysed, and there are no occupancies: all cells.
            return [self.max_rows] * (tiles - 1) + [
                len(visited) - (tiles - 1) * self.max_rows
            ]
        padding = tiles * self.max_rows - len(visited)
        of_tiles = nn.functional.pad(visited, (0, padding)).view(tiles, -1)
        finite = cast(torch.Tensor, self.nll).isfinite()
        read = torch.cat([of_tiles.sum(1), finite]).tolist()
        self.finite = list(map(bool, read[tiles:]))
        return read[:tiles]

    def _propagate(
        self,
        gradients: Gradients,
        planes: Planes,
        indices: torch.Tensor,
        visited: torch.Tensor,
        counts: list[int],
        upstream: torch.Tensor | None,
    ) -> None:
        """Adds the gradients of the cells that are visited.

        counts says how many they are in each tile.
        """
        cells = self.cells
        if any(r.random_states for r in self.recordings):
            # With dropout, use the tiles of forward to repeat its masks.
            tiles, masks = self._split(indices), self._split(visited)
            recordings = self.recordings
            used = counts
        else:
            count = sum(counts)
            chosen = some_of(indices, visited, count)
            tiles = self._split(chosen) if count else []
            masks = [None] * len(tiles)
            recordings = self.recordings[:1] * len(tiles)
            used = [1] * len(tiles)
        for chunk, mask, recording, cells_used in zip(
            tiles, masks, recordings, used
        ):
            if not cells_used:
                continue
            with self.recorder.replay(cells.logits, recording):
                computed = gradients.compute_logits(
                    cells, cells.tile(chunk), mask
                )
            lse, blank, emission = (plane[chunk] for plane in planes)
            if mask is not None:
                # Softmax and posteriors are 0 for skipped cells, which may be
                # NaN.
                lse = torch.where(mask, lse, torch.inf)
                blank = torch.where(mask, blank, 0.0)
                emission = torch.where(mask, emission, 0.0)
            gradients.add(computed, lse, blank, emission, upstream)
            del computed

    def _split(self, indices: torch.Tensor) -> Sequence[torch.Tensor]:
        tiles = indices.split(self.max_rows)
        # For memory analysis two tiles suffice: all need the same.
        return tiles if has_values(indices) else tiles[:2]


def some_of(
    indices: torch.Tensor, chosen: torch.Tensor, count: int
) -> torch.Tensor:
    """Those that are chosen, without a wait for the device.

    Arguments
    ---------
    indices : torch.Tensor
        [N].
    chosen : torch.Tensor
        [N], bool.
    count : int
        How many are.

    Returns
    -------
    torch.Tensor
        [count].

    Example
    -------
    >>> chosen = torch.tensor([True, False, True])
    >>> some_of(torch.tensor([5, 6, 7]), chosen, 2)
    tensor([5, 7])
    """
    places = chosen.nonzero_static(size=count).squeeze(1)
    return indices.index_select(0, places)


class WholePass:
    """Computes all logits of a sample at once, and once if backward follows.

    Arguments
    ---------
    cells : Cells
        Cells of one sample.
    recorder : Recorder
        Recorder of the forward pass.
    fastemit_lambda : float
        See TransducerJointLoss.
    """

    def __init__(
        self, cells: Cells, recorder: Recorder, fastemit_lambda: float
    ):
        self.fastemit_lambda = fastemit_lambda
        self.cells, self.recorder = cells, recorder
        self.recording: Recording | None = None
        # The arguments of Gradients.add.
        self.computed: (
            tuple[ComputedLogits, torch.Tensor, torch.Tensor, torch.Tensor]
            | None
        ) = None
        self.nll: torch.Tensor | None = None
        # Not read here, see TiledPass.
        self.finite: list[bool] = []

    def forward(self, gradients: Gradients | None = None) -> torch.Tensor:
        """Computes the loss of the sample; see TiledPass."""
        cells = self.cells
        call, tile = _Call(cells.logits), cells.tile(cells.indices())
        if gradients is None:
            logits, self.recording = self.recorder.record(
                call, cells.compute_logits, tile
            )
            self.nll = self._lattice(tile, logits)[0]
            return self.nll
        computed, self.recording = self.recorder.record(
            call, gradients.compute_logits, cells, tile
        )
        nll, lse, blank, emission = self._lattice(tile, computed[0])
        self.nll, self.computed = nll, (computed, lse, blank, emission)
        return self.nll

    def backward(
        self, gradients: Gradients, upstream: torch.Tensor | None = None
    ) -> None:
        """Adds the gradients of the sample; see TiledPass."""
        cells = self.cells
        computed, self.computed = self.computed, None
        if computed is None:
            tile = cells.tile(cells.indices())
            with self.recorder.replay(
                cells.logits, cast("Recording", self.recording)
            ):
                replayed = gradients.compute_logits(cells, tile)
            nll, lse, blank, emission = self._lattice(tile, replayed[0])
            gradients.compare_losses(cast(torch.Tensor, self.nll), nll)
            computed = replayed, lse, blank, emission
        gradients.add(*computed, upstream)

    def _lattice(
        self, tile: Tile, logits: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        cells = self.cells
        lse, *scores = cells.scores(tile, logits.detach())
        [frames], [targets] = cells.lengths
        shape = 1, frames, targets + 1
        nll, blank, emission = loss_and_occupancies(
            *(s.view(shape) for s in scores),
            logit_lengths=cells.logit_lengths,
            target_lengths=cells.target_lengths,
            fastemit_lambda=self.fastemit_lambda,
        )
        return nll, lse, blank, emission


class _Call(nn.Module):
    """Lets a Recorder see the modules while it calls any function."""

    def __init__(self, logits: CellLogits):
        super().__init__()
        self.logits = logits

    def forward(self, function: Callable[..., Any], *args: Any) -> Any:
        """Calls the function."""
        return function(*args)
