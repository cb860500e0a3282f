"""A Brain that can be stopped at any time and goes on as if it had not been.

Authors
 * The sb_memeff authors 2026
"""

import os
from types import SimpleNamespace

import speechbrain as sb
import torch
from speechbrain.augment.time_domain import AddNoise, AddReverb
from speechbrain.dataio.batch import PaddedBatch
from speechbrain.dataio.dataset import DynamicItemDataset
from speechbrain.utils.logger import get_logger
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler

from sb_memeff.dataio.reproducible import NumberedSampler, SeededDataset
from sb_memeff.optim import keep_32bit_states
from sb_memeff.utils.checkpoints import NoisePosition, RandomState

__all__ = ["MemEffBrain"]

logger = get_logger(__name__)


class MemEffBrain(sb.core.Brain):
    """A Brain for long runs; use it in place of SpeechBrain's.

    What it does differently (in SpeechBrain 1.1.2):

    * a run that is resumed ends with the weights that it would have had, bit
      for bit on a CPU: the random state and the position in the lists of
      noises and echoes are part of the checkpoint, random numbers in the
      data pipeline depend on the seed and the place in the epoch alone;
    * no checkpoint falls between two batches whose gradients are accumulated
      (they are not saved);
    * gradients are clipped over all parameter groups, not the first one, and a
      negative max_grad_norm switches clipping off (there it turns the
      gradient round);
    * on the CPU, distributed training leaves BatchNorm alone (SyncBatchNorm
      needs a GPU);
    * a batch sampler learns which epoch it is, on one GPU too (there
      DynamicBatchSampler makes the same batches in every epoch);
    * skip_nonfinite_grads looks before clipping, which would spread one NaN
      to all gradients, and names the parameter;
    * --optimizer_step_limit works on the command line;
    * 8-bit optimizers keep 32-bit states for embeddings.

    Use AtomicCheckpointer (sb_memeff.utils.checkpoints) with it, whose
    checkpoints cannot be half-written. An IterableDataset, a DataLoader not
    made by ``make_dataloader`` and shuffled validation data keep random
    numbers of their own.

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

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.max_grad_norm == 0:
            raise ValueError(
                "max_grad_norm=0 would make all gradients 0. A negative value "
                "switches clipping off."
            )
        if self.optimizer_step_limit is not None:
            # The command line gives a string.
            self.optimizer_step_limit = int(self.optimizer_step_limit)
        self._noise_positions = [
            NoisePosition(noise, self.device) for noise in self._noises()
        ]
        if self.checkpointer is not None:
            add = self.checkpointer.add_recoverable
            add("random_state", RandomState(), optional_load=True)
            for number, position in enumerate(self._noise_positions):
                add(f"noise_position_{number}", position, optional_load=True)

    def _noises(self):
        """The augmentations that go through a list of files."""
        hparams = vars(getattr(self, "hparams", SimpleNamespace())).values()
        owners = torch.nn.ModuleList(
            value
            for value in (*hparams, self.modules)
            if isinstance(value, torch.nn.Module)
        )
        return [
            module
            for module in owners.modules()
            if isinstance(module, (AddNoise, AddReverb)) and module.csv_file
        ]

    def init_optimizers(self):
        """Makes the optimizer, embeddings marked."""
        keep_32bit_states(self.modules)
        super().init_optimizers()

    def on_fit_start(self):
        """Prepares the modules, loads a checkpoint and logs where it stands."""
        super().on_fit_start()
        for position in self._noise_positions:
            position.resume()
        if self.optimizer_step:
            logger.info(
                f"Resumed: {self.step} batches of the epoch and "
                f"{self.optimizer_step} optimizer steps are done."
            )

    def make_dataloader(
        self, dataset, stage, ckpt_prefix="dataloader-", **loader_kwargs
    ):
        """Makes a DataLoader; arguments as Brain's.

        The random numbers that an item draws depend on the seed, the epoch
        (in training) and the item's place in it.
        """
        shuffled = stage != sb.Stage.TRAIN and loader_kwargs.get("shuffle")
        if not isinstance(dataset, IterableDataset) and not shuffled:
            if isinstance(dataset, DynamicItemDataset):
                loader_kwargs.setdefault("collate_fn", PaddedBatch)
            rank = int(os.environ.get("RANK", 0))
            dataset = SeededDataset(dataset, _run_seed(), rank)
            if stage != sb.Stage.TRAIN:
                loader_kwargs = _numbered(dataset, loader_kwargs)
        return super().make_dataloader(
            dataset, stage, ckpt_prefix, **loader_kwargs
        )

    def _train_loader_specifics(self, dataset, loader_kwargs):
        loader_kwargs = super()._train_loader_specifics(dataset, loader_kwargs)
        if not self.distributed_launch and "batch_sampler" in loader_kwargs:
            self.train_sampler = loader_kwargs["batch_sampler"]
        if isinstance(dataset, SeededDataset):
            loader_kwargs = _numbered(dataset, loader_kwargs)
        return loader_kwargs

    def _fit_train(self, train_set, epoch, enable):
        loader = getattr(train_set, "loader", train_set)
        if isinstance(loader, DataLoader):
            if isinstance(loader.dataset, SeededDataset):
                loader.dataset.set_epoch(epoch)
            if loader.generator is None:
                # Beginning to iterate draws a number. From the global
                # generator, a resumed run would draw one more.
                loader.generator = torch.Generator().manual_seed(_run_seed())
        super()._fit_train(train_set, epoch, enable)

    def _should_save_intra_epoch_ckpt(self, last_ckpt_time, steps_since_ckpt):
        accumulating = self.step % self.grad_accumulation_factor != 0
        return not accumulating and super()._should_save_intra_epoch_ckpt(
            last_ckpt_time, steps_since_ckpt
        )

    def _wrap_distributed(self):
        if not (self.distributed_launch and self.device_type == "cpu"):
            super()._wrap_distributed()
            return
        for name, module in self.modules.items():
            if any(p.requires_grad for p in module.parameters()):
                self.modules[name] = DistributedDataParallel(
                    module, find_unused_parameters=self.find_unused_parameters
                )

    def check_gradients(self):
        """Drops gradients that hold NaN or infinity, and says whose."""
        for name, param in self.modules.named_parameters():
            if param.grad is not None and not param.grad.isfinite().all():
                param.grad = None
                logger.warning(
                    f"The gradient of {name} is not finite: it is not used."
                )

    def optimizers_step(self):
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


def _numbered(dataset, loader_kwargs):
    """The arguments of a DataLoader, with a numbered sampler."""
    kind = "batch_sampler"
    sampler = loader_kwargs.get(kind)
    if sampler is None:
        kind = "sampler"
        sampler = loader_kwargs.get(kind) or SequentialSampler(dataset)
    return {**loader_kwargs, kind: NumberedSampler(sampler)}


def _run_seed():
    # What seed_everything leaves behind; SpeechBrain's samplers use it too.
    return int(os.environ.get("SB_GLOBAL_SEED", 563375142))
