"""Saves checkpoints that are never half-written, and finds the best one.

Authors
 * The sb_memeff authors 2026
"""

import logging
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import yaml
from speechbrain.utils.checkpoints import METAFNAME, Checkpoint, Checkpointer
from speechbrain.utils.distributed import ddp_barrier
from speechbrain.utils.logger import get_logger

__all__ = ["AtomicCheckpointer", "best_checkpoint", "trained_weights"]

logger = get_logger(__name__)


class AtomicCheckpointer(Checkpointer):
    """A Checkpointer whose checkpoints are complete or do not exist.

    SpeechBrain's Checkpointer first writes the file that marks a folder as a
    checkpoint. A training killed while it saves leaves a checkpoint that cannot
    be loaded, and can never be resumed. Here a folder gets its name only when
    it is complete.

    Saving under an existing name replaces that checkpoint. The old folder is
    first renamed to one that any Checkpointer still recognises as a
    checkpoint, so a training killed at that moment can be resumed from it.

    Example
    -------
    >>> import torch
    >>> tmpdir = getfixture("tmpdir")
    >>> net = torch.nn.Linear(2, 2)
    >>> checkpointer = AtomicCheckpointer(tmpdir, {"net": net})
    >>> saved = checkpointer.save_checkpoint(name="first")
    >>> checkpointer.recover_if_possible().path.name
    'CKPT+first'
    """

    PARTIAL = "partial-"
    REPLACED = ".replaced"

    @staticmethod
    def _construct_checkpoint_objects(
        checkpoint_dirs: Iterable[Path],
    ) -> list[Checkpoint]:
        """Reads the checkpoints' meta files, which must not run code.

        SpeechBrain's loader makes any Python object that the file names.
        """
        checkpoint_dirs = list(checkpoint_dirs)
        for path in checkpoint_dirs:
            text = (path / METAFNAME).read_text(encoding="utf-8")
            try:
                yaml.safe_load(text)
            except yaml.YAMLError as error:
                raise ValueError(
                    f"{path / METAFNAME} is damaged, or names Python objects, "
                    f"which are not loaded: {error}. Remove {path}, or these "
                    f"lines."
                ) from error
        return Checkpointer._construct_checkpoint_objects(checkpoint_dirs)

    def _new_checkpoint_dirpath(self) -> Path:
        return self._partial(super()._new_checkpoint_dirpath())

    def _custom_checkpoint_dirpath(self, name: str) -> Path:
        return self._partial(super()._custom_checkpoint_dirpath(name))

    def _partial(self, path: Path) -> Path:
        for leftover in self.checkpoints_dir.glob(self.PARTIAL + "*"):
            shutil.rmtree(leftover)
        # Left by trainings killed between the renaming and the removal.
        for old in self.checkpoints_dir.glob("*" + self.REPLACED):
            if self._is_replaced(old):
                self._remove(old)
        return path.with_name(self.PARTIAL + path.name)

    def _list_checkpoint_dirs(self) -> list[Path]:
        return [
            path
            for path in super()._list_checkpoint_dirs()
            if not self._is_replaced(path)
        ]

    def _is_replaced(self, path: Path) -> bool:
        return path.suffix == self.REPLACED and path.with_suffix("").exists()

    def _put_in_place(self, partial: Path, path: Path) -> None:
        """Renames a complete checkpoint, replacing an existing one."""
        old = path.with_name(path.name + self.REPLACED)
        if path.exists():
            os.replace(path, old)
        os.replace(partial, path)
        if old.exists():
            self._remove(old)

    def _remove(self, path: Path) -> None:
        # Renamed first: killed within rmtree, it must not look like a
        # checkpoint.
        removed = path.with_name(self.PARTIAL + path.name)
        os.replace(path, removed)
        shutil.rmtree(removed)

    def save_checkpoint(
        self,
        meta: dict[str, Any] = {},
        end_of_epoch: bool = True,
        name: str | None = None,
        verbosity: int = logging.INFO,
    ) -> Checkpoint | None:
        """Saves a checkpoint; arguments as in Checkpointer.

        Raises OSError if the disk is full, for example. What was written is
        removed.
        """
        # numpy's and torch's numbers are Python objects in yaml.
        meta = {
            key: value.item() if hasattr(value, "item") else value
            for key, value in meta.items()
        }
        try:
            saved = super().save_checkpoint(
                meta, end_of_epoch, name, verbosity=logging.DEBUG
            )
        except (OSError, RuntimeError) as error:
            # torch reports a full disk as a RuntimeError.
            free = shutil.disk_usage(self.checkpoints_dir).free
            for leftover in self.checkpoints_dir.glob(self.PARTIAL + "*"):
                shutil.rmtree(leftover, ignore_errors=True)
            raise OSError(
                f"No checkpoint could be saved in {self.checkpoints_dir}, where "
                f"{free / 1e6:.0f} MB were free: {error}. Earlier checkpoints "
                f"are complete. Make room, and run the same command again to go "
                f"on."
            ) from error
        # Wait until all processes have written their part.
        ddp_barrier()
        if saved is not None:
            path = saved.path.with_name(saved.path.name[len(self.PARTIAL) :])
            self._put_in_place(saved.path, path)
            files = {k: path / f.name for k, f in saved.paramfiles.items()}
            saved = Checkpoint(path, saved.meta, files)
            logger.log(verbosity, f"Saved a checkpoint in {path}")
        ddp_barrier()
        return saved

    def save_and_keep_only(
        self,
        meta: dict[str, Any] = {},
        end_of_epoch: bool = True,
        name: str | None = None,
        num_to_keep: int = 1,
        keep_recent: bool = True,
        importance_keys: Iterable[Callable[[Checkpoint], Any]] = (),
        **kwargs: Any,
    ) -> None:
        """Saves a checkpoint, then deletes; arguments as in Checkpointer.

        Checkpointer appends to the list ``importance_keys``, even to its
        default. Each call then takes longer than the last, and after one call
        with ``keep_recent`` recent checkpoints are kept for ever.
        """
        super().save_and_keep_only(
            meta,
            end_of_epoch,
            name,
            num_to_keep,
            keep_recent,
            list(importance_keys),
            **kwargs,
        )


def best_checkpoint(save_folder: str | Path) -> Checkpoint | None:
    """Finds the checkpoint with the lowest ErrorRate.

    Arguments
    ---------
    save_folder : str
        The ``save`` folder of a training.

    Returns
    -------
    Checkpoint or None
        None if no epoch has finished.
    """
    # Checkpointer would create a folder that does not exist.
    if not Path(save_folder).is_dir():
        return None
    return AtomicCheckpointer(save_folder).find_checkpoint(min_key="ErrorRate")


def trained_weights(save_folder: str | Path) -> Path | None:
    """Finds the weights that a training ended with.

    Arguments
    ---------
    save_folder : str
        The ``save`` folder of a training.

    Returns
    -------
    Path or None
        The folder that holds embedding_model.ckpt: save_folder, if the mean of
        checkpoints was saved there, or else the checkpoint with the lowest
        ErrorRate. None if no epoch has finished.
    """
    if (Path(save_folder) / "embedding_model.ckpt").is_file():
        return Path(save_folder)
    checkpoint = best_checkpoint(save_folder)
    return None if checkpoint is None else checkpoint.path
