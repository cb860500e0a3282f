"""A Brain whose trainings can be killed and resumed with the same result.

Authors
 * The sb_memeff authors 2026
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Generator, Iterable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import speechbrain as sb
import torch
import yaml
from speechbrain.augment.time_domain import AddNoise, AddReverb
from speechbrain.dataio.batch import PaddedBatch
from speechbrain.dataio.dataloader import SaveableDataLoader
from speechbrain.dataio.dataset import DynamicItemDataset
from speechbrain.dataio.sampler import DistributedSamplerWrapper
from speechbrain.utils.checkpoints import (
    mark_as_loader,
    mark_as_saver,
    register_checkpoint_hooks,
)
from speechbrain.utils.distributed import is_distributed_initialized
from speechbrain.utils.logger import get_logger
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler
from torch.utils.data.distributed import DistributedSampler

from sb_memeff.dataio.recoverables import (
    NoisePosition,
    RandomState,
    SamplerPosition,
)
from sb_memeff.dataio.reproducible import (
    NumberedSampler,
    SeededDataset,
    SeededSampler,
    SharedSampler,
    set_epoch,
)
from sb_memeff.nnet.replay.mismatch import read_mismatches
from sb_memeff.optim import keep_32bit_states
from sb_memeff.optim.misfit import name_parameters

__all__ = ["MemEffBrain"]

logger = get_logger(__name__)


@register_checkpoint_hooks
class MemEffBrain(sb.core.Brain):
    """A Brain for long runs; use it in place of SpeechBrain's.

    It differs from SpeechBrain 1.1.2 as follows:

    * A resumed training ends with the weights of an uninterrupted one, bit for
      bit on a CPU: checkpoints include the random states and the positions in
      the lists of noises and room impulse responses, and random numbers in the
      data pipeline depend only on the seed, the epoch and the item's number.
    * No checkpoint is saved within a gradient accumulation, whose gradients a
      checkpoint does not contain.
    * Gradients of all parameter groups are clipped, not only of the first. A
      negative max_grad_norm disables clipping (in SpeechBrain it reverses the
      gradient).
    * Distributed training on CPUs does not convert BatchNorm to SyncBatchNorm,
      which needs a GPU.
    * The epoch of samplers and batch samplers is set on one GPU too. (In
      SpeechBrain, DynamicBatchSampler then repeats its batches in every epoch,
      and ReproducibleRandomSampler its order.) A sampler that draws from the
      global generators yields the same order on all processes. With several
      processes the order depends on the seed of the run too.
    * A training that is resumed with another number of processes or another
      batch size continues its epoch at the same share, and a warning says so.
    * A mismatch between forward and recomputation, which a GPU reports late,
      raises its error in the step where it occurs.
    * skip_nonfinite_grads checks gradients before clipping, which would spread
      one NaN to all of them, and names the parameter.
    * On SIGTERM, with which a cluster announces the end of a job, a single
      process saves a checkpoint after the current optimizer step and ends,
      with a message that says how to go on.
    * With ``skip_damaged: True`` in the yaml file, training items whose file
      is damaged (DamagedFile, as load_audio raises) are replaced by the next
      ones, and logged.
    * --optimizer_step_limit works on the command line.
    * 8-bit optimizers keep 32-bit states for embeddings.
    * An optimizer's checkpoint that does not fit the modules is refused. The
      error names the parameter.

    Use it with AtomicCheckpointer (sb_memeff.utils.atomic_checkpoints), whose
    checkpoints cannot be half-written. The random numbers of an
    IterableDataset, a LoopedLoader, a DataLoader not made by
    ``make_dataloader`` and shuffled validation data are left unchanged.

    Arguments
    ---------
    *args : tuple
        As Brain's.
    **kwargs : dict
        As Brain's.

    Raises
    ------
    ValueError
        If max_grad_norm is 0.

    Example
    -------
    >>> class Regression(MemEffBrain):
    ...     def compute_forward(self, batch, stage):
    ...         return self.modules.net(batch[0])
    ...
    ...     def compute_objectives(self, predictions, batch, stage):
    ...         return torch.nn.functional.mse_loss(predictions, batch[1])
    >>> brain = Regression(
    ...     {"net": torch.nn.Linear(4, 1)},
    ...     opt_class=lambda params: torch.optim.SGD(params, lr=0.1),
    ...     run_opts={"device": "cpu", "max_grad_norm": -1},
    ... )
    >>> data = [[torch.randn(8, 4), torch.randn(8, 1)]]
    >>> brain.fit(range(1), data, progressbar=False)
    >>> brain.optimizer_step
    1
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.max_grad_norm == 0:
            raise ValueError(
                "max_grad_norm=0 would make all gradients 0. A negative value "
                "disables clipping."
            )
        if self.optimizer_step_limit is not None:
            # A string if given on the command line.
            self.optimizer_step_limit = int(self.optimizer_step_limit)
        self._stops = False
        # Loaded with a checkpoint, but used only to continue training.
        self._positions = {}
        self._saved_epoch: dict[str, int] | None = None
        # The loader of the training data, and its batches in an epoch.
        self._train_loader: SaveableDataLoader | None = None
        self._batches = 0
        if self.checkpointer is not None:
            self.checkpointer.add_recoverable(
                "random_state", RandomState(), optional_load=True
            )
            for number, noise in enumerate(self._noises()):
                position = NoisePosition(noise, self.device)
                self._add_position(f"noise_position_{number}", position)

    def _add_position(
        self, name: str, position: NoisePosition | SamplerPosition
    ) -> None:
        self._positions[name] = position
        self.checkpointer.add_recoverable(name, position, optional_load=True)

    def _noises(self) -> list[AddNoise | AddReverb]:
        """The augmentations that read a list of files."""
        hparams = vars(getattr(self, "hparams", SimpleNamespace()))
        return [
            module
            for module in _modules_in([hparams, self.modules], set())
            if isinstance(module, (AddNoise, AddReverb)) and module.csv_file
        ]

    def init_optimizers(self) -> None:
        """Makes the optimizer, with 32-bit states for embeddings."""
        keep_32bit_states(self.modules)
        super().init_optimizers()
        for optimizer in (self.optimizers_dict or {}).values():
            name_parameters(optimizer, self.modules)

    def on_fit_start(self) -> None:
        """Prepares the modules, loads a checkpoint and logs its position."""
        super().on_fit_start()
        for position in self._positions.values():
            position.resume()
        self._resume_epoch()
        if self.optimizer_step:
            logger.info(
                f"Resumed: {self.step} batches of the epoch and "
                f"{self.optimizer_step} optimizer steps are done."
            )

    def _resume_epoch(self) -> None:
        """Continues at the same share of an epoch that has other batches now."""
        saved, self._saved_epoch = self._saved_epoch, None
        if saved is None or self._train_loader is None or not self._batches:
            return
        accumulation = self.grad_accumulation_factor
        before, now = saved["batches"], self._batches
        # In optimizer steps.
        sizes = before // saved["accumulation"], now // accumulation
        earlier = self.optimizer_step - self.step // saved["accumulation"]
        done = self.step * now // before
        done -= done % accumulation
        if self.step and done != self.step:
            logger.warning(
                f"The checkpoint has {self.step} of {before} batches of its "
                f"epoch (processes: {saved['processes']}). Now an epoch has "
                f"{now} (processes: {_processes()}): training continues after "
                f"{done}, and this epoch repeats some items and omits others."
            )
            self.step = self._train_loader._speechbrain_recovery_skip_to = done
        if sizes[0] != sizes[1] and min(sizes) and self.optimizer_step:
            step = round(earlier * sizes[1] / sizes[0]) + done // accumulation
            self.on_epoch_resized(*sizes, step)

    def on_epoch_resized(self, before: int, now: int, step: int) -> None:
        """Called if a resumed training has other steps in an epoch.

        By default schedules that count optimizer steps continue at their step,
        and a warning says so.

        Arguments
        ---------
        before : int
            Optimizer steps in an epoch of the checkpoint's training.
        now : int
            Optimizer steps in an epoch of this training.
        step : int
            Optimizer steps in the part of the training that is done, if all its
            epochs had as many as now.
        """
        logger.warning(
            f"An epoch had {before} optimizer steps and has {now} now. Schedules "
            f"that count steps continue at step {self.optimizer_step}. For as "
            f"many steps as before keep processes times batch size times "
            f"grad_accumulation_factor."
        )

    @mark_as_saver
    def _save(self, path: str) -> None:
        super()._save(path)
        with open(path, "a", encoding="utf-8") as f:
            epoch = {
                "accumulation": self.grad_accumulation_factor,
                "batches": self._batches,
                "processes": _processes(),
            }
            yaml.dump({"epoch": epoch}, f)

    @mark_as_loader
    def _recover(self, path: str, end_of_epoch: bool) -> None:
        super()._recover(path, end_of_epoch)
        with open(path, encoding="utf-8") as f:
            # SpeechBrain's checkpoints have none.
            epoch = yaml.safe_load(f).get("epoch")
        self._saved_epoch = epoch if epoch and epoch["batches"] else None

    def fit(self, *args: Any, **kwargs: Any) -> None:
        """Fits, as Brain does, until SIGTERM.

        Arguments
        ---------
        *args : tuple
            As Brain's.
        **kwargs : dict
            As Brain's.

        Raises
        ------
        SystemExit
            With 143, after a checkpoint was saved because of SIGTERM.
        """
        with self._saving_on_sigterm():
            super().fit(*args, **kwargs)

    @contextlib.contextmanager
    def _saving_on_sigterm(self) -> Generator[None, None, None]:
        if (
            self.checkpointer is None
            # All processes would have to stop at the same step.
            or self.distributed_launch
            or threading.current_thread() is not threading.main_thread()
            # A handler of the user's.
            or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        ):
            yield
            return
        process = os.getpid()

        def stop(number: int, frame: object) -> None:
            if os.getpid() != process:
                # Forked processes inherit the handler.
                os._exit(128 + number)
            logger.info("SIGTERM: saving after the current optimizer step.")
            self._stops = True

        signal.signal(signal.SIGTERM, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def make_dataloader(
        self,
        dataset: Any,
        stage: sb.Stage,
        ckpt_prefix: str | None = "dataloader-",
        **loader_kwargs: Any,
    ) -> Any:
        """Makes a DataLoader; arguments as Brain's.

        The random numbers of an item depend on the seed, the epoch (in
        training) and the item's number in the epoch. In training, the order
        depends on the seed and the epoch, with any sampler.
        """
        shuffled = stage != sb.Stage.TRAIN and loader_kwargs.get("shuffle")
        if not isinstance(dataset, IterableDataset) and not shuffled:
            if isinstance(dataset, DynamicItemDataset):
                loader_kwargs.setdefault("collate_fn", PaddedBatch)
            rank = int(os.environ.get("RANK", 0))
            # Not in validation, whose figures would be of other items.
            hparams = getattr(self, "hparams", None)
            skip = getattr(hparams, "skip_damaged", False)
            dataset = SeededDataset(
                dataset, _run_seed(), rank, stage == sb.Stage.TRAIN and skip
            )
            if stage != sb.Stage.TRAIN:
                loader_kwargs = _numbered(loader_kwargs, dataset)
        loader = super().make_dataloader(
            dataset, stage, ckpt_prefix, **loader_kwargs
        )
        if (
            self.checkpointer is not None
            and ckpt_prefix is not None
            and stage == sb.Stage.TRAIN
            # A LoopedLoader's epochs begin anywhere in its sampler's order.
            and isinstance(loader, SaveableDataLoader)
            and isinstance(dataset, SeededDataset)
        ):
            # Of the first epoch: they may vary from epoch to epoch.
            self._train_loader, self._batches = loader, len(loader)
            self._add_position(
                f"{ckpt_prefix}{stage.name}-sampler",
                SamplerPosition(_sampler_of(loader)),
            )
        return loader

    def _train_loader_specifics(
        self, dataset: Any, loader_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        loader_kwargs = super()._train_loader_specifics(dataset, loader_kwargs)
        sampler = self.train_sampler
        if isinstance(sampler, DistributedSamplerWrapper):
            self.train_sampler = SharedSampler(sampler, _run_seed())
            kind = "sampler" if "sampler" in loader_kwargs else "batch_sampler"
            loader_kwargs[kind] = self.train_sampler
        elif isinstance(sampler, DistributedSampler):
            sampler.seed = _run_seed()
        if isinstance(dataset, SeededDataset):
            loader_kwargs = _numbered(loader_kwargs, dataset, _run_seed())
        return loader_kwargs

    def _fit_train(
        self, train_set: Iterable[Any], epoch: int, enable: bool
    ) -> None:
        loader = getattr(train_set, "loader", train_set)
        if isinstance(loader, DataLoader):
            if isinstance(loader.dataset, SeededDataset):
                loader.dataset.set_epoch(epoch)
            # Brain does not set the epoch of all samplers, nor of those within
            # others.
            if loader.batch_sampler is None:
                set_epoch(loader.sampler, epoch)
            else:
                set_epoch(loader.batch_sampler, epoch)
            if loader.generator is None:
                # Starting an iteration draws a number. With the global
                # generator, a resumed training would draw one more.
                loader.generator = torch.Generator().manual_seed(_run_seed())
        super()._fit_train(train_set, epoch, enable)

    def fit_batch(self, batch: Any) -> torch.Tensor:
        """Fits one batch, as Brain does.

        Arguments
        ---------
        batch : object
            A batch of the train loader.

        Returns
        -------
        torch.Tensor
            The loss, detached, on the CPU.

        Raises
        ------
        RuntimeError
            If recomputation in backward differs from forward.
        """
        loss = super().fit_batch(batch)
        # The loss is on the CPU, so reading does not wait for the device.
        read_mismatches()
        return loss

    def _should_save_intra_epoch_ckpt(
        self, last_ckpt_time: float, steps_since_ckpt: int
    ) -> bool:
        accumulating = self.step % self.grad_accumulation_factor != 0
        if accumulating:
            return False
        return self._stops or super()._should_save_intra_epoch_ckpt(
            last_ckpt_time, steps_since_ckpt
        )

    def _save_intra_epoch_ckpt(self) -> None:
        super()._save_intra_epoch_ckpt()
        if self._stops:
            logger.warning(
                f"Stopped by SIGTERM after {self.optimizer_step} optimizer "
                f"steps; a checkpoint is in {self.checkpointer.checkpoints_dir}."
                f" Run the same command again to go on."
            )
            sys.exit(128 + signal.SIGTERM)

    def _wrap_distributed(self) -> None:
        if not (self.distributed_launch and self.device_type == "cpu"):
            super()._wrap_distributed()
            return
        for name, module in self.modules.items():
            if any(p.requires_grad for p in module.parameters()):
                self.modules[name] = DistributedDataParallel(
                    module, find_unused_parameters=self.find_unused_parameters
                )

    def check_gradients(self) -> None:
        """Drops gradients with NaN or infinity, and names their parameters."""
        for name, param in self.modules.named_parameters():
            if param.grad is not None and not param.grad.isfinite().all():
                param.grad = None
                logger.warning(
                    f"The gradient of {name} is not finite and is skipped."
                )

    def optimizers_step(self) -> None:
        """Unscales and clips the gradients, updates the parameters."""
        if self.optimizers_dict is not None:
            optimizers = self.freeze_optimizers(self.optimizers_dict).values()
        elif self.opt_class is not None:
            optimizers = [self.optimizer]
        else:
            return
        for optimizer in optimizers:
            self.scaler.unscale_(optimizer)
        if self.skip_nonfinite_grads and not self.scaler.is_enabled():
            self.check_gradients()
        if self.max_grad_norm > 0:
            for optimizer in optimizers:
                torch.nn.utils.clip_grad_norm_(
                    [p for g in optimizer.param_groups for p in g["params"]],
                    self.max_grad_norm,
                )
        for optimizer in optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        self.optimizer_step += 1


def _modules_in(value: object, found: set[int]) -> Iterator[torch.nn.Module]:
    """Yields all modules within a value, recursively.

    ``modules()`` would miss the augmentations of SpeechBrain's Augmenter, which
    are in a dict.
    """
    if id(value) in found:
        return
    if isinstance(value, torch.nn.Module):
        yield value
        children = vars(value).values()
    elif isinstance(value, dict):
        children = value.values()
    elif isinstance(value, (list, tuple)):
        children = value
    else:
        return
    found.add(id(value))
    for child in children:
        yield from _modules_in(child, found)


def _numbered(
    loader_kwargs: dict[str, Any], dataset: Any, seed: int | None = None
) -> dict[str, Any]:
    """Wraps the sampler among a DataLoader's arguments in a NumberedSampler.

    With a seed, its order depends on the seed and the epoch.
    """
    kind = "batch_sampler"
    sampler = loader_kwargs.get(kind)
    if sampler is None:
        kind = "sampler"
        sampler = loader_kwargs.get(kind)
    if sampler is None:
        sampler = SequentialSampler(dataset)
    if seed is not None:
        size = loader_kwargs.get("batch_size", 1)
        ahead = 1 if kind == "batch_sampler" or size is None else size
        sampler = SeededSampler(sampler, seed, ahead)
    return {**loader_kwargs, kind: NumberedSampler(sampler)}


def _sampler_of(loader: DataLoader[Any]) -> SeededSampler:
    """The SeededSampler of a loader that was made with ``_numbered``."""
    numbered = loader.batch_sampler
    if not isinstance(numbered, NumberedSampler):
        numbered = loader.sampler
    return cast(SeededSampler, cast(NumberedSampler, numbered).sampler)


def _processes() -> int:
    return (
        torch.distributed.get_world_size()
        if is_distributed_initialized()
        else 1
    )


def _run_seed() -> int:
    # Set by seed_everything; SpeechBrain's samplers use it too.
    return int(os.environ.get("SB_GLOBAL_SEED", 563375142))
