"""Recoverables that restore random states and positions in data.

Authors
 * The sb_memeff authors 2026
"""

import functools
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from speechbrain.augment.time_domain import AddNoise, AddReverb
from speechbrain.utils.checkpoints import (
    mark_as_loader,
    mark_as_saver,
    register_checkpoint_hooks,
)
from speechbrain.utils.distributed import if_main_process
from speechbrain.utils.logger import get_logger

if TYPE_CHECKING:
    from sb_memeff.dataio.reproducible import SeededSampler

__all__ = ["NoisePosition", "RandomState", "SamplerPosition"]

logger = get_logger(__name__)
on_every_process = functools.partial(
    register_checkpoint_hooks, save_on_main_only=False
)


@on_every_process
class RandomState:
    """Recovers the random states of Python, numpy and torch.

    Each process has its own; on CUDA, the current device's generator.

    Example
    -------
    >>> from speechbrain.utils.checkpoints import Checkpointer
    >>> tmpdir = getfixture("tmpdir")
    >>> checkpointer = Checkpointer(tmpdir, {"random_state": RandomState()})
    >>> saved = checkpointer.save_checkpoint()
    >>> first = torch.rand(3)
    >>> checkpointer.load_checkpoint(saved)
    >>> torch.equal(first, torch.rand(3))
    True
    """

    @mark_as_saver
    def save(self, path: str | Path) -> None:
        """Saves the state of all processes.

        Arguments
        ---------
        path : str or Path
            File to write.
        """
        _save_of_all(_get_states(), path)

    @mark_as_loader
    def load(self, path: str | Path, end_of_epoch: bool) -> None:
        """Loads the state of this process.

        Arguments
        ---------
        path : str or Path
            File to read.
        end_of_epoch : bool
            Not used.
        """
        states = _load_own(path)
        if states is not None:
            _set_states(states)


@on_every_process
class NoisePosition:
    """Recovers the position of AddNoise or AddReverb in its list of files.

    Arguments
    ---------
    augmentation : AddNoise or AddReverb
        One with a csv file.
    device : str or torch.device
        Device of the waveforms.
    """

    def __init__(
        self, augmentation: AddNoise | AddReverb, device: str | torch.device
    ):
        self.augmentation = augmentation
        self.device = device
        self._loaded: list[int] | None = None

    @mark_as_saver
    def save(self, path: str | Path) -> None:
        """Saves the position.

        Arguments
        ---------
        path : str or Path
            File to write.
        """
        loader = getattr(self.augmentation, "data_loader", None)
        position = self._loaded
        if position is None and loader is not None:
            iterator = loader._speechbrain_iterator
            position = [loader.batch_size, iterator._num_yielded]
        _save_of_all(position, path)

    @mark_as_loader
    def load(self, path: str | Path, end_of_epoch: bool) -> None:
        """Loads the position, for ``resume``.

        Arguments
        ---------
        path : str or Path
            File to read.
        end_of_epoch : bool
            Not used.
        """
        self._loaded = _load_own(path)

    def resume(self) -> None:
        """Moves to the loaded position, if any.

        This is separate from ``load``, since evaluation needs no noise.
        """
        if self._loaded is None:
            return
        batch_size, batches = self._loaded
        self._loaded = None
        states = _get_states()
        # SpeechBrain creates the loader on first use, for the batch size of
        # that call.
        if hasattr(self.augmentation, "data_loader"):
            del self.augmentation.data_loader
        waveforms = torch.ones(batch_size, 400, device=self.device)
        if isinstance(self.augmentation, AddNoise):
            self.augmentation(waveforms, waveforms.new_ones(batch_size))
            iterator = "noise_data"
        else:
            self.augmentation(waveforms)
            iterator = "rir_data"
        loader = self.augmentation.data_loader
        loader._speechbrain_recovery_skip_to = batches
        setattr(self.augmentation, iterator, iter(loader))
        _set_states(states)


@on_every_process
class SamplerPosition:
    """Recovers the random states of a sampler.

    The number of batches drawn is saved with the loader.

    Arguments
    ---------
    sampler : sb_memeff.dataio.reproducible.SeededSampler
        Sampler of the training data.
    """

    def __init__(self, sampler: "SeededSampler"):
        self.sampler = sampler
        self._loaded: tuple[dict[str, Any] | None, bool] | None = None

    @mark_as_saver
    def save(self, path: str | Path) -> None:
        """Saves the position.

        Arguments
        ---------
        path : str or Path
            File to write.
        """
        position, _ = self._loaded or (None, None)
        if position is None:
            position = self.sampler.position()
        _save_of_all(position, path)

    @mark_as_loader
    def load(self, path: str | Path, end_of_epoch: bool) -> None:
        """Loads the position, for ``resume``.

        Arguments
        ---------
        path : str or Path
            File to read.
        end_of_epoch : bool
            Whether the next epoch begins at its start.
        """
        self._loaded = _load_own(path), end_of_epoch

    def resume(self) -> None:
        """Moves to the loaded position, if any."""
        position, end_of_epoch = self._loaded or (None, False)
        self._loaded = None
        if position is not None:
            self.sampler.resume(position, end_of_epoch)


def _distributed() -> bool:
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized()


def _save_of_all(value: object, path: str | Path) -> None:
    values = [value]
    if _distributed():
        values *= torch.distributed.get_world_size()
        torch.distributed.all_gather_object(values, value)
    if if_main_process():
        torch.save(values, path)


def _load_own(path: str | Path) -> Any:
    values = torch.load(path, map_location="cpu", weights_only=True)
    rank, processes = 0, 1
    if _distributed():
        rank = torch.distributed.get_rank()
        processes = torch.distributed.get_world_size()
    if len(values) != processes:
        logger.warning(
            f"{path} was saved by {len(values)} processes, but now there are "
            f"{processes}: training continues with other random numbers."
        )
        return None
    return values[rank]


def _get_states() -> dict[str, Any]:
    kind, keys, *position = cast(Any, np.random.get_state())
    states = {
        "python": random.getstate(),
        "numpy": [kind, keys.tolist(), *position],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(tuple(states["numpy"]))
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
