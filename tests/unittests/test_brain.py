"""How MemEffBrain differs from Brain, and that Brain still needs it.

Authors
 * The sb_memeff authors 2026
"""

import functools
import logging
import os
import random
import signal

import numpy as np
import pytest
import soundfile
import speechbrain as sb
import torch
from speechbrain.augment.augmenter import Augmenter
from speechbrain.augment.time_domain import AddNoise, AddReverb
from speechbrain.dataio.dataset import DynamicItemDataset
from speechbrain.dataio.sampler import (
    BalancingDataSampler,
    ConcatDatasetBatchSampler,
    DistributedSamplerWrapper,
    DynamicBatchSampler,
    ReproducibleRandomSampler,
    ReproducibleWeightedRandomSampler,
)
from speechbrain.nnet.schedulers import NoamScheduler
from speechbrain.utils.epoch_loop import EpochCounter
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from sb_memeff.brain import MemEffBrain
from sb_memeff.dataio.preparation import DamagedFile
from sb_memeff.nnet.replay import mismatch
from sb_memeff.ops.blocks_8bit import Quantized8bit
from sb_memeff.optim import Adam8bit, AdamW8bit, SGD8bit
from sb_memeff.utils.atomic_checkpoints import AtomicCheckpointer
from tests.processes import context
from tests.unittests.two_processes import run_in_two_processes

OPTIMIZERS = {
    "SGD": (torch.optim.SGD, {"momentum": 0.9}),
    "SGD8bit": (SGD8bit, {"momentum": 0.9, "nesterov": True}),
    "Adam8bit": (Adam8bit, {"weight_decay": 0.01}),
    "AdamW8bit": (AdamW8bit, {}),
}
BOTH = pytest.mark.parametrize("base", [MemEffBrain, sb.Brain])
ITEMS = 40


class Regression:
    """Forward and loss for either Brain, with dropout and augmentation."""

    stop_at = None
    augment = True

    def compute_forward(self, batch, stage):
        """Predictions."""
        x = batch.x.data
        if stage == sb.Stage.TRAIN and self.augment:
            x = x + 0.1 * torch.randn_like(x)
        return self.modules.net(x)

    def compute_objectives(self, predictions, batch, stage):
        """Squared error."""
        return nn.functional.mse_loss(predictions, batch.y.data)

    def on_fit_batch_start(self, batch, should_step):
        """Sets the learning rate."""
        if should_step and getattr(self, "schedule", None):
            self.schedule(self.optimizer)

    def on_fit_batch_end(self, batch, outputs, loss, should_step):
        """Kills the process, as the power does."""
        if self.optimizer_step == self.stop_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_stage_end(self, stage, stage_loss, epoch=None):
        """Saves at the end of an epoch."""
        if stage == sb.Stage.VALID and self.checkpointer is not None:
            self.checkpointer.save_and_keep_only(num_to_keep=1)


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(16, 256),
        nn.BatchNorm1d(256),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(256, 4),
    )


def dataset():
    """A pipeline that crops at random, with Python's and torch's numbers."""
    generator = torch.Generator().manual_seed(0)
    data = {
        str(n): {
            "long": torch.randn(20, generator=generator),
            "y": torch.randn(4, generator=generator),
            "duration": 1 + n % 3,
        }
        for n in range(ITEMS)
    }
    items = DynamicItemDataset(data)

    @sb.utils.data_pipeline.takes("long")
    @sb.utils.data_pipeline.provides("x")
    def crop(long):
        start = random.randint(0, 2) + int(torch.randint(3, ()))
        return long[start : start + 16]

    items.add_dynamic_item(crop)
    items.set_output_keys(["id", "x", "y"])
    return items


def brain(base=MemEffBrain, optimizer="SGD", folder=None, net=None, **run_opts):
    kind, options = OPTIMIZERS[optimizer]
    hparams = {"counter": EpochCounter(3), "schedule": NoamScheduler(0.01, 5)}
    net = network() if net is None else net
    checkpointer = None
    if folder is not None:
        checkpointer = AtomicCheckpointer(folder, {"net": net, **hparams})
    made = type("Made", (Regression, base), {})(
        {"net": net},
        lambda params: kind(params, lr=0.01, **options),
        hparams,
        {"device": "cpu", "noprogressbar": True, **run_opts},
        checkpointer,
    )
    made.schedule = hparams["schedule"]
    return made


def fit(made, workers=0, **options):
    options = {"batch_size": 4, "shuffle": True, **options}
    if workers:
        # A process that the forkserver started would ask it for workers.
        options["multiprocessing_context"] = "fork"
    made.fit(
        made.hparams.counter,
        dataset(),
        dataset(),
        train_loader_kwargs={"num_workers": workers, **options},
        valid_loader_kwargs={"batch_size": 20},
    )
    return [value.clone() for value in made.modules.state_dict().values()]


def run(queue, arguments, stop_at, workers):
    """One process: trains until it ends or is killed."""
    # Each process would compile the kernels of 8-bit optimizers.
    os.environ["SB_MEMEFF_KERNELS"] = "0"
    torch.set_num_threads(1)
    sb.utils.seed.seed_everything(7, verbose=False)
    made = brain(**arguments)
    made.stop_at = stop_at
    queue.put([value.numpy() for value in fit(made, workers)])


def in_new_process(arguments, stop_at=None, workers=0):
    """Weights at the end; None if the process was killed."""
    queue = context().SimpleQueue()
    process = context().Process(
        target=run, args=(queue, arguments, stop_at, workers)
    )
    process.start()
    if stop_at is not None:
        process.join()
        assert process.exitcode == -signal.SIGKILL
        return None
    weights = queue.get()
    process.join()
    return weights


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_killed_five_times(optimizer, tmp_path):
    """SIGKILL at random steps: bit-equal weights; batch norm's numbers too."""
    workers = 1 if optimizer == "SGD8bit" else 0
    arguments = {"optimizer": optimizer, "ckpt_interval_steps": 3}
    straight = in_new_process(arguments)
    stops = sorted(random.Random(optimizer).sample(range(1, 30), 5))
    arguments["folder"] = str(tmp_path)
    for stop in stops:
        in_new_process(arguments, stop, workers)
    resumed = in_new_process(arguments, workers=workers)
    assert len(straight) == len(resumed)
    for a, b in zip(straight, resumed):
        assert (a == b).all()


def fit_and_resume(base, folder, accumulation=1, every=3, **options):
    """Largest difference of a run that was interrupted from one that was not.

    The interruption, by default an exception, is in the middle of the second
    epoch.
    """
    kind = options.get("kind", Interrupted)

    def stop(batch, outputs, loss, should_step):
        if made.step == 7 and made.hparams.counter.current == 2:
            if kind is Interrupted:
                raise Interrupted
            os.kill(os.getpid(), signal.SIGTERM)

    found = []
    for interrupted in (False, True):
        sb.utils.seed.seed_everything(7, verbose=False)
        arguments = {
            "base": base,
            "grad_accumulation_factor": accumulation,
            "ckpt_interval_steps": every,
            "folder": folder / str(interrupted),
        }
        made = brain(**arguments)
        made.augment = options.get("augment", True)
        if interrupted:
            made.on_fit_batch_end = stop
            with pytest.raises(kind):
                fit(made)
            torch.manual_seed(1234)
            made = brain(**arguments)
            made.augment = options.get("augment", True)
        found.append(fit(made))
    return max(
        (a - b).abs().max().item()
        for a, b in zip(*found)
        if a.is_floating_point()
    )


def test_brain_does_not_recover_random_numbers(tmp_path):
    """RandomState can go when the second one is 0."""
    assert fit_and_resume(MemEffBrain, tmp_path / "ours") == 0
    assert fit_and_resume(sb.Brain, tmp_path / "theirs") > 1e-3


@pytest.mark.parametrize("accumulation", [1, 2])
def test_sigterm_saves_and_says_how_to_go_on(tmp_path, caplog, accumulation):
    """No checkpoint is due, nor within an accumulation (of 7 batches)."""
    options = {"every": -1, "kind": SystemExit}
    assert fit_and_resume(MemEffBrain, tmp_path, accumulation, **options) == 0
    steps = 10 // accumulation + -(-7 // accumulation)
    assert f"Stopped by SIGTERM after {steps} optimizer steps" in caplog.text
    assert "Run the same command again" in caplog.text
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_damaged_files_are_skipped_in_training_only():
    items = dataset()

    @sb.utils.data_pipeline.takes("id")
    @sb.utils.data_pipeline.provides("z")
    def load(id):
        if id == "3":
            raise DamagedFile("3.wav is damaged.")
        return torch.zeros(1)

    items.add_dynamic_item(load)
    items.set_output_keys(["id", "z"])
    made = brain()
    made.hparams.skip_damaged = True
    loader = made.make_dataloader(items, sb.Stage.TRAIN, batch_size=4)
    names = [name for batch in loader for name in batch.id]
    assert names == [str(4 if n == 3 else n) for n in range(ITEMS)]
    with pytest.raises(DamagedFile, match="3.wav"):
        list(made.make_dataloader(items, sb.Stage.VALID, batch_size=4))
    made.hparams.skip_damaged = False
    with pytest.raises(DamagedFile, match="3.wav"):
        list(made.make_dataloader(items, sb.Stage.TRAIN, batch_size=4))
    made.hparams.skip_damaged = "no"
    with pytest.raises(TypeError, match="skip_damaged='no'"):
        made.make_dataloader(items, sb.Stage.TRAIN)


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    """A list of seven sounds in csv."""
    folder = tmp_path_factory.mktemp("sounds")
    rng = np.random.default_rng(0)
    lines = ["ID,duration,wav,wav_format,wav_opts"]
    for n in range(7):
        path = folder / f"{n}.wav"
        soundfile.write(path, 0.3 * rng.standard_normal(64), 16000)
        lines.append(f"{n},{64 / 16000},{path},wav,")
    (folder / "sounds.csv").write_text("\n".join(lines) + "\n")
    return str(folder / "sounds.csv")


@pytest.mark.parametrize("kind", [AddNoise, AddReverb])
@pytest.mark.parametrize("place", ["augmenter", "list", "modules", "key"])
def test_noises_and_echoes_go_on_where_they_were(kind, place, sounds, tmp_path):
    """Wherever the augmentation is kept: a run that was interrupted."""

    def build(folder):
        sb.utils.seed.seed_everything(7, verbose=False)
        augmentation = kind(sounds)
        made = brain(folder=folder, ckpt_interval_steps=3)
        hparams, modules = vars(made.hparams), {"net": made.modules.net}
        if place == "augmenter":
            hparams["augment"] = Augmenter(augmentations=[augmentation])
        elif place == "list":
            hparams["augment"] = {"all": [augmentation]}
        elif place == "modules":
            modules["augment"] = augmentation
        else:
            hparams["augment"] = augmentation
        used = []

        def forward(batch, stage):
            x = batch.x.data
            if stage == sb.Stage.TRAIN:
                lengths = [torch.ones(len(x))] if kind is AddNoise else []
                x = augmentation(x, *lengths)
                used.append(x.detach().clone())
            return made.modules.net(x)

        # The network is the same: only its companions have changed.
        made = type(made)(
            modules,
            made.opt_class,
            hparams,
            {
                "device": "cpu",
                "noprogressbar": True,
                "ckpt_interval_steps": 3,
            },
            made.checkpointer,
        )
        made.schedule = made.hparams.schedule
        made.compute_forward = forward
        return made, used

    straight, expected = build(tmp_path / "straight")
    fit(straight)
    made, _ = build(tmp_path / "run")

    def stop(batch, outputs, loss, should_step):
        if made.step == 5 and made.hparams.counter.current == 2:
            raise Interrupted

    made.on_fit_batch_end = stop
    with pytest.raises(Interrupted):
        fit(made)
    resumed, used = build(tmp_path / "run")
    fit(resumed)
    assert len(used) == 17
    for a, b in zip(used, expected[13:], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("size", "accumulation", "step", "sizes"),
    [
        (4, 1, 6, None),  # As before.
        (2, 1, 12, (10, 20, 52)),
        (2, 2, 12, None),  # As many steps of as many items.
        (8, 1, 3, (10, 5, 13)),
        (4, 4, 4, (10, 2, 5)),  # Not within an accumulation.
    ],
)
def test_resumed_with_other_batches(tmp_path, size, accumulation, step, sizes):
    """At the same share of the epoch; the number of processes acts alike."""

    def stop(batch, outputs, loss, should_step):
        if made.step == 7 and made.hparams.counter.current == 3:
            raise Interrupted

    made = brain(folder=tmp_path, ckpt_interval_steps=3)
    made.on_fit_batch_end = stop
    with pytest.raises(Interrupted):
        fit(made)
    made = brain(folder=tmp_path, grad_accumulation_factor=accumulation)
    resized, begins = [], []
    made.on_epoch_resized = lambda *numbers: resized.append(numbers)
    made.on_fit_batch_start = lambda *_: begins.append(made.step)
    fit(made, batch_size=size)
    assert begins == list(range(step + 1, ITEMS // size + 1))
    assert resized == ([] if sizes is None else [sizes])


def test_the_schedule_of_other_batches_is_announced(tmp_path, caplog):
    made = brain(folder=tmp_path)
    made.hparams.counter.limit = 1
    fit(made)
    with caplog.at_level("WARNING"):
        fit(brain(folder=tmp_path), batch_size=8)
    assert "had 10 optimizer steps and has 5 now. Schedules" in caplog.text
    assert "repeats some items" not in caplog.text


def test_no_checkpoint_within_an_accumulation(tmp_path):
    """_should_save_intra_epoch_ckpt can go when Brain gets it right."""
    ours = fit_and_resume(MemEffBrain, tmp_path / "ours", 2, every=3)
    assert ours == 0
    saved = []
    for base in (MemEffBrain, sb.Brain):
        made = brain(
            base,
            folder=tmp_path / base.__name__,
            grad_accumulation_factor=2,
            ckpt_interval_steps=3,
        )
        made._save_intra_epoch_ckpt = lambda made=made: saved[-1].append(
            made.step
        )
        saved.append([])
        fit(made)
    # Brain's come after three batches: the third is not in the weights yet.
    assert saved == [[4, 8] * 3, [3, 6, 9] * 3]


class Interrupted(Exception):
    """Ends a training at a point chosen by the test."""


class Lazy(Sampler):
    """Draws each index only when it is asked for it."""

    def __init__(self, draw, **generators):
        self.draw = draw
        vars(self).update(generators)

    def __len__(self):
        return ITEMS

    def __iter__(self):
        for _ in range(ITEMS):
            yield self.draw(self) % ITEMS


class Rotated:
    """No torch Sampler; its order depends on set_epoch alone."""

    epoch = 0

    def set_epoch(self, epoch):
        """Begins an epoch."""
        self.epoch = epoch

    def __len__(self):
        return ITEMS

    def __iter__(self):
        return iter((n + self.epoch) % ITEMS for n in range(ITEMS))


class Counting:
    """Rotates further each time; its counter is not visible outside."""

    count = 0

    def __len__(self):
        return ITEMS

    def __iter__(self):
        self.count += 1
        return iter((n + self.count) % ITEMS for n in range(ITEMS))


def seeded_generator():
    return torch.Generator().manual_seed(5)


def dynamic(data):
    return DynamicBatchSampler(
        data, 8, num_buckets=2, length_func=lambda x: x["duration"]
    )


def wrapped(sampler):
    return DistributedSamplerWrapper(sampler, num_replicas=2, rank=1)


WEIGHTS = [1.0] * ITEMS
# Each gives another order in each epoch.
SAMPLERS = {
    "random": lambda d: RandomSampler(d),
    "random_own": lambda d: RandomSampler(d, generator=seeded_generator()),
    "replacement": lambda d: RandomSampler(d, replacement=True),
    "weighted": lambda d: WeightedRandomSampler(WEIGHTS, ITEMS),
    "weighted_own": lambda d: WeightedRandomSampler(
        WEIGHTS, ITEMS, generator=seeded_generator()
    ),
    "subset": lambda d: SubsetRandomSampler(range(ITEMS)),
    "subset_own": lambda d: SubsetRandomSampler(
        range(ITEMS), generator=seeded_generator()
    ),
    "reproducible": lambda d: ReproducibleRandomSampler(d),
    "reproducible_weighted": lambda d: ReproducibleWeightedRandomSampler(
        WEIGHTS, ITEMS, True
    ),
    "balancing": lambda d: BalancingDataSampler(d, "duration"),
    "distributed": lambda d: DistributedSampler(d, num_replicas=2, rank=1),
    "wrapped_random": lambda d: wrapped(RandomSampler(d)),
    "wrapped_own": lambda d: wrapped(
        RandomSampler(d, generator=seeded_generator())
    ),
    "wrapped_reproducible": lambda d: wrapped(ReproducibleRandomSampler(d)),
    "set_epoch": lambda d: Rotated(),
    "python": lambda d: Lazy(lambda s: random.randrange(ITEMS)),
    "numpy": lambda d: Lazy(lambda s: np.random.randint(ITEMS)),
    "torch": lambda d: Lazy(lambda s: int(torch.randint(ITEMS, ()))),
    "python_own": lambda d: Lazy(
        lambda s: s.rng.randrange(ITEMS), rng=random.Random(5)
    ),
    "numpy_own": lambda d: Lazy(
        lambda s: s.rng.integers(ITEMS), rng=np.random.default_rng(5)
    ),
    "numpy_mt19937": lambda d: Lazy(
        lambda s: s.rng.integers(ITEMS),
        rng=np.random.Generator(np.random.MT19937(5)),
    ),
    "numpy_old": lambda d: Lazy(
        lambda s: s.rng.randint(ITEMS), rng=np.random.RandomState(5)
    ),
}
BATCH_SAMPLERS = {
    "batches_of_random": lambda d: BatchSampler(RandomSampler(d), 4, False),
    "batches_of_own": lambda d: BatchSampler(
        RandomSampler(d, generator=seeded_generator()), 4, False
    ),
    "batches_of_reproducible": lambda d: BatchSampler(
        ReproducibleRandomSampler(d), 4, False
    ),
    "batches_of_set_epoch": lambda d: BatchSampler(Rotated(), 4, False),
    "wrapped_batches": lambda d: wrapped(
        BatchSampler(ReproducibleRandomSampler(d), 2, False)
    ),
    "dynamic": dynamic,
    "wrapped_dynamic": lambda d: wrapped(dynamic(d)),
    "concatenated": lambda d: ConcatDatasetBatchSampler(
        [RandomSampler(range(20)), ReproducibleRandomSampler(range(20))],
        [2, 2],
    ),
}


def epochs_of(folder, options, stop=None):
    """Items of each batch by epoch and step, until a batch to stop at."""
    sb.utils.seed.seed_everything(7, verbose=False)
    made = brain(folder=folder, ckpt_interval_steps=3)
    data = dataset()
    seen = {}

    def look(batch, should_step):
        place = made.hparams.counter.current, made.step
        if place == stop:
            raise Interrupted
        seen[place] = batch.id

    made.on_fit_batch_start = look
    options = {
        kind: value(data) if callable(value) else value
        for kind, value in options.items()
    }
    try:
        made.fit(made.hparams.counter, data, data, train_loader_kwargs=options)
    except Interrupted:
        pass
    return seen


ALL_SAMPLERS = {
    **{n: {"sampler": s, "batch_size": 4} for n, s in SAMPLERS.items()},
    **{n: {"batch_sampler": s} for n, s in BATCH_SAMPLERS.items()},
    "random_dropped": {
        "sampler": RandomSampler,
        "batch_size": 3,
        "drop_last": True,
    },
}


@pytest.mark.parametrize("options", ALL_SAMPLERS.values(), ids=ALL_SAMPLERS)
def test_order_of_any_sampler(options, tmp_path, caplog):
    """Another one in each epoch, and the same after an interruption.

    Interrupted within an epoch, where a checkpoint was one batch ago, and then
    at the beginning of one.
    """
    straight = epochs_of(tmp_path / "straight", options)
    epochs = [
        [ids for place, ids in straight.items() if place[0] == n]
        for n in (1, 2, 3)
    ]
    assert all(len(e) > 4 for e in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    seen = epochs_of(tmp_path / "run", options, (2, 5))
    for first, stop in (((2, 4), (3, 1)), ((3, 1), None)):
        resumed = epochs_of(tmp_path / "run", options, stop)
        assert min(resumed) == first
        seen.update(resumed)
    assert seen == straight
    assert "another order" not in caplog.text


def test_order_twice_interrupted_and_with_workers(tmp_path):
    """The second time before the epoch of the first is over."""
    options = ALL_SAMPLERS["random_own"]
    straight = epochs_of(tmp_path / "straight", options)
    workers = {"num_workers": 2, "multiprocessing_context": "fork"}
    options = {**options, **workers}
    seen = epochs_of(tmp_path / "run", options, (2, 5))
    for stop in ((2, 8), (3, 1), (3, 6), None):
        seen.update(epochs_of(tmp_path / "run", options, stop))
    assert seen == straight


def test_a_list_is_a_sampler(tmp_path):
    options = {"sampler": lambda d: [*range(7, 27)], "batch_size": 5}
    seen = epochs_of(tmp_path, options)
    ids = [i for (epoch, _), batch in seen.items() if epoch == 3 for i in batch]
    assert ids == [str(n) for n in range(7, 27)]


def test_an_empty_sampler_yields_no_batch():
    made = brain()
    for stage in (sb.Stage.TRAIN, sb.Stage.VALID):
        loader = made.make_dataloader(dataset(), stage, sampler=[])
        assert list(loader) == []


def test_an_order_that_cannot_be_recovered_logs_a_warning(tmp_path, caplog):
    options = {"sampler": lambda d: Counting(), "batch_size": 4}
    straight = epochs_of(tmp_path / "straight", options)
    begun = epochs_of(tmp_path / "run", options, (2, 5))
    assert "another order" not in caplog.text
    resumed = epochs_of(tmp_path / "run", options)
    assert {**begun, **resumed} != straight
    assert "Counting gives epoch 2 another order" in caplog.text


def test_sampler_of_the_users_own_loader():
    """Its epoch is set too; a generator of the user is kept."""
    made, data, seen = brain(), dataset(), [[]]
    generator = torch.Generator()
    loader = DataLoader(
        data,
        sampler=ReproducibleRandomSampler(data),
        batch_size=4,
        collate_fn=sb.dataio.batch.PaddedBatch,
        generator=generator,
    )
    made.on_fit_batch_start = lambda batch, _: seen[-1].extend(batch.id)
    made.on_stage_end = lambda *_: seen.append([])
    made.fit(range(1, 4), loader)
    assert seen[0] != seen[1] != seen[2] != seen[0]
    assert loader.generator is generator


def test_a_noise_that_is_found_twice_has_one_position(sounds, tmp_path):
    """In a module and in a list of it, say; they may hold each other."""
    noise = AddNoise(sounds)
    net = nn.ModuleDict({"net": network(), "noise": noise})
    net.steps = [noise, net]
    made = MemEffBrain(
        {"net": net},
        hparams={"noise": noise},
        run_opts={"device": "cpu"},
        checkpointer=AtomicCheckpointer(tmp_path),
    )
    names = [n for n in made.checkpointer.recoverables if "noise" in n]
    assert names == ["noise_position_0"]


def test_noise_without_files_has_no_position(tmp_path):
    net = nn.ModuleDict({"net": network(), "noise": AddNoise()})
    made = brain(net=net, folder=tmp_path)
    assert not any("noise" in n for n in made.checkpointer.recoverables)


def test_validation_with_a_random_sampler_is_another_one_each_time():
    """As with Brain, whose order is drawn from the global generator."""
    made, data = brain(), dataset()
    loader = made.make_dataloader(
        data, sb.Stage.VALID, batch_size=4, sampler=RandomSampler(data)
    )
    first, second = ([b.id for b in loader] for _ in range(2))
    assert first != second


@BOTH
def test_a_difference_on_a_device_stops_that_step(base, monkeypatch):
    """read_mismatches in fit_batch: Brain trains on."""

    class Event:
        def query(self):
            return False

        def synchronize(self):
            pass

    pending = mismatch._Pending(lambda differs: (differs, Event()))
    monkeypatch.setattr(mismatch, "_pending", pending)
    made = brain(base)
    steps = []

    def objectives(predictions, batch, stage):
        loss = nn.functional.mse_loss(predictions, batch.y.data)
        if stage == sb.Stage.TRAIN:
            steps.append(made.step)
            differs = torch.tensor([False, len(steps) == 3])
            if len(steps) <= 3:
                loss.register_hook(
                    lambda _: mismatch.report_mismatches(
                        differs, "block {}".format
                    )
                )
        return loss

    made.compute_objectives = objectives
    if base is MemEffBrain:
        with pytest.raises(RuntimeError, match="^block 1$"):
            fit(made)
        assert steps == [1, 2, 3]
    else:
        fit(made)
        assert len(steps) == 3 * ITEMS / 4


def groups_of(norm):
    """Two parameters with large gradients, in groups of their own."""
    parameters = [nn.Parameter(torch.zeros(4)) for _ in range(2)]
    for p in parameters:
        p.grad = torch.full((4,), norm)
    return parameters


@pytest.mark.parametrize("norm", [5.0, 0.5])
@BOTH
def test_clipping_covers_all_groups(base, norm):
    """optimizers_step can go when Brain clips the second group too."""
    made = brain(base, max_grad_norm=norm)
    parameters = groups_of(100.0)
    made.optimizer = torch.optim.SGD([{"params": [p]} for p in parameters], 1.0)
    made.optimizers_dict = {"opt_class": made.optimizer}
    made.optimizers_step()
    steps = torch.stack([p.detach() for p in parameters])
    if base is MemEffBrain:
        assert steps.norm().item() == pytest.approx(norm, rel=1e-3)
    else:
        assert steps[0].norm() < 1.01 * norm and steps[1].norm() == 200.0
    assert made.optimizer_step == 1
    assert all(p.grad is None for p in parameters)


@BOTH
def test_negative_max_grad_norm_switches_clipping_off(base):
    """optimizers_step can go when Brain does not go uphill."""
    made = brain(base, max_grad_norm=-1.0)
    parameters = groups_of(100.0)
    made.optimizer = torch.optim.SGD(parameters, 1.0)
    made.optimizers_dict = {"opt_class": made.optimizer}
    made.optimizers_step()
    descends = (parameters[0] == -100.0).all()
    assert descends if base is MemEffBrain else (parameters[0] > 0).all()


def test_max_grad_norm_0():
    with pytest.raises(ValueError, match="max_grad_norm=0"):
        brain(max_grad_norm=0)


@BOTH
def test_one_gradient_that_is_not_finite(base, caplog):
    """check_gradients can go when Brain drops one gradient, not all."""
    made = brain(base, skip_nonfinite_grads=True)
    made.init_optimizers()
    for p in made.modules.parameters():
        p.grad = torch.ones_like(p)
    before = [p.detach().clone() for p in made.modules.parameters()]
    made.modules.net[0].bias.grad[3] = torch.nan
    with caplog.at_level(logging.WARNING):
        made.optimizers_step()
    changed = [
        not torch.equal(a, b) for a, b in zip(before, made.modules.parameters())
    ]
    if base is MemEffBrain:
        assert changed == [True, False, True, True, True, True]
        assert "gradient of net.0.bias is not finite" in caplog.text
    else:
        assert not any(changed)


@pytest.mark.parametrize("max_grad_norm", [-1.0, 5.0])
@BOTH
def test_a_loss_scale_that_is_too_large_is_halved(base, max_grad_norm):
    """Its step is left out; gradients are clipped without their scale."""
    if base is sb.Brain and max_grad_norm < 0:
        pytest.skip("would go uphill")
    made = brain(base, max_grad_norm=max_grad_norm, skip_nonfinite_grads=True)
    made.scaler = torch.GradScaler("cpu", init_scale=4.0)
    parameters = groups_of(0.0)
    made.optimizer = torch.optim.SGD(parameters, 1.0)
    made.optimizers_dict = {"opt_class": made.optimizer}
    for slopes, scale in (((torch.inf, 100), 2.0), ((100, 100), 2.0)):
        before = torch.stack([p.detach().clone() for p in parameters])
        loss = sum(s * p.sum() for s, p in zip(slopes, parameters))
        made.scaler.scale(loss).backward()
        made.optimizers_step()
        assert made.scaler.get_scale() == scale
        moved = (torch.stack([*parameters]) - before).norm().item()
        expected = max_grad_norm if max_grad_norm > 0 else 100 * 8**0.5
        if torch.inf in slopes:
            expected = 0
        assert moved == pytest.approx(expected, rel=1e-3)


@BOTH
def test_without_an_optimizer_no_step_is_taken(base):
    made = type("Made", (Regression, base), {})(
        {"net": network()}, run_opts={"device": "cpu"}
    )
    made.init_optimizers()
    made.optimizers_step()
    assert made.optimizer_step == 0


def test_optimizers_can_be_frozen():
    made = brain()
    made.init_optimizers()
    made.freeze_optimizers = lambda optimizers: {}
    for p in made.modules.parameters():
        p.grad = torch.ones_like(p)
    before = made.modules.net[0].weight.detach().clone()
    made.optimizers_step()
    assert torch.equal(before, made.modules.net[0].weight)


@BOTH
def test_optimizer_step_limit_of_the_command_line(base, tmp_path):
    """int() can go when Brain's own works."""
    _, run_opts, _ = sb.parse_arguments(["x.yaml", "--optimizer_step_limit=4"])
    made = brain(base, optimizer_step_limit=run_opts["optimizer_step_limit"])
    if base is sb.Brain:
        with pytest.raises(TypeError, match="'int' and 'str'"):
            fit(made)
    else:
        fit(made)
        assert made.optimizer_step == 4


@BOTH
def test_8bit_optimizer_with_either_brain(base):
    made = brain(base, "Adam8bit")
    before = made.modules.net[0].weight.clone()
    fit(made)
    assert (made.modules.net[0].weight - before).abs().max() > 0.01
    state = made.optimizer.state[made.modules.net[0].weight]
    assert isinstance(state["exp_avg"], Quantized8bit)


def test_embeddings_keep_32bit_states():
    made = brain(optimizer="SGD8bit", net=nn.Embedding(100, 64))
    made.init_optimizers()
    made.modules.net.weight.grad = torch.ones(100, 64)
    made.optimizers_step()
    state = made.optimizer.state[made.modules.net.weight]
    assert state["momentum_buffer"].dtype == torch.float32


@pytest.mark.parametrize("optimizer", ["SGD", "Adam8bit"])
def test_an_optimizer_that_does_not_fit_names_the_parameter(
    optimizer, tmp_path
):
    made = brain(optimizer=optimizer, folder=tmp_path)
    made.init_optimizers()
    for p in made.modules.parameters():
        p.grad = torch.ones_like(p)
    made.optimizers_step()
    made.checkpointer.save_checkpoint()
    other = network()
    other[4] = nn.Linear(256, 5)
    made = brain(optimizer=optimizer, folder=tmp_path, net=other)
    made.checkpointer.recoverables.pop("net")
    with pytest.raises(ValueError, match=r"net.4.weight has the shape \(5, 2"):
        made.on_fit_start()


@BOTH
def test_dynamic_batches_of_each_epoch(base):
    """Brain tells its batch sampler the epoch only when distributed."""
    made = brain(base)
    data = dataset()
    sampler = DynamicBatchSampler(
        data, 8, num_buckets=2, length_func=lambda x: x["duration"]
    )
    epochs = [set()]
    made.on_fit_batch_end = lambda batch, *_: epochs[-1].add(tuple(batch.id))
    made.on_stage_end = lambda *_: epochs.append(set())
    made.fit(range(1, 3), data, train_loader_kwargs={"batch_sampler": sampler})
    first, second, _ = epochs
    assert {i for b in first for i in b} == {i for b in second for i in b}
    # Not the batches alone: which items meet in a batch.
    assert (first == second) == (base is sb.Brain)
    if base is MemEffBrain:
        # A process that begins with the second epoch finds its batches.
        sampler.set_epoch(2)
        assert {tuple(str(i) for i in batch) for batch in sampler} == second


def loaded(workers, epochs=1, **options):
    """Items of an epoch as the train loader gives them."""
    sb.utils.seed.seed_everything(7, verbose=False)
    made = brain()
    data = dataset()
    if options.pop("dynamic", False):
        options["batch_sampler"] = DynamicBatchSampler(
            data,
            8,
            num_buckets=2,
            shuffle=True,
            length_func=lambda x: x["duration"],
        )
    else:
        options = {"batch_size": 4, "shuffle": True, **options}
    loader = made.make_dataloader(
        data, sb.Stage.TRAIN, num_workers=workers, **options
    )
    seen = []
    made.fit_batch = lambda batch: (
        seen.append([list(batch.id), batch.x.data]) or torch.zeros(())
    )
    made.on_fit_start()
    for epoch in range(1, epochs + 1):
        made._fit_train(loader, epoch, enable=False)
    return seen


def test_validation_repeats_its_numbers_and_leaves_global_states():
    made = brain()
    loader = made.make_dataloader(dataset(), sb.Stage.VALID, batch_size=8)
    seen = []
    for _ in range(2):
        state = torch.get_rng_state()
        iterator = iter(loader)
        begun = torch.get_rng_state()
        seen.append(torch.cat([batch.x.data for batch in iterator]))
        assert torch.equal(begun, torch.get_rng_state())
        torch.set_rng_state(state)
        random.random()
    assert torch.equal(*seen)


@pytest.mark.parametrize(
    "options", [{}, {"shuffle": False}, {"dynamic": True}, {"drop_last": True}]
)
def test_data_does_not_depend_on_the_workers(options):
    alone, helped = loaded(0, **options), loaded(2, **options)
    assert len(alone) == len(helped) > 1
    for (ids, x), (other_ids, other_x) in zip(alone, helped):
        assert ids == other_ids and torch.equal(x, other_x)


@pytest.mark.parametrize("looped", [None, ITEMS // 4])
def test_every_epoch_has_crops_of_its_own(looped):
    """A LoopedLoader too, whose epochs have any number of batches."""
    seen = loaded(0, epochs=2, shuffle=False, looped_nominal_epoch=looped)
    assert len(seen) == 2 * ITEMS / 4
    first, second = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert [ids for ids, _ in first] == [ids for ids, _ in second]
    different = [not torch.equal(a, b) for (_, a), (_, b) in zip(first, second)]
    assert sum(different) > 8


def test_a_looped_loader_is_saved_without_its_order(tmp_path):
    """Its epochs begin anywhere in one."""
    made = brain(folder=tmp_path)
    options = {"batch_size": 4, "shuffle": True}
    made.make_dataloader(
        dataset(), sb.Stage.TRAIN, looped_nominal_epoch=2, **options
    )
    assert "dataloader-TRAIN" in made.checkpointer.recoverables
    assert not any("-sampler" in n for n in made.checkpointer.recoverables)
    made.checkpointer.save_checkpoint()
    made.make_dataloader(dataset(), sb.Stage.TRAIN, "other-", **options)
    assert "other-TRAIN-sampler" in made.checkpointer.recoverables


@pytest.mark.parametrize("stage", [sb.Stage.TRAIN, sb.Stage.VALID])
def test_loaders_take_the_options_of_torchs(stage):
    loader = brain().make_dataloader(
        dataset(),
        stage,
        batch_size=4,
        shuffle=True,
        collate_fn=lambda items: [item["id"] for item in items],
    )
    ids = [i for batch in loader for i in batch]
    assert sorted(ids) == sorted(dataset().data_ids) != ids


def test_processes_have_crops_of_their_own(monkeypatch):
    seen = []
    for rank in ("0", "1"):
        with monkeypatch.context() as patch:
            # Not distributed: SpeechBrain would share out the items.
            patch.setenv("RANK", rank)
            seen.append(loaded(0, shuffle=False))
    for (ids, x), (other_ids, other_x) in zip(*seen):
        assert ids == other_ids and not torch.equal(x, other_x)


def shared_out():
    """The one batch of this process's share; its order with two seeds."""
    made, orders = brain(distributed_backend="gloo"), []
    batches = [list(range(20)), list(range(20, 40))]
    loader = made.make_dataloader(
        dataset(), sb.Stage.TRAIN, batch_sampler=batches
    )
    (batch,) = [batch.id for batch in loader]
    for seed in ("1", "2"):
        os.environ["SB_GLOBAL_SEED"] = seed
        loader = made.make_dataloader(dataset(), sb.Stage.TRAIN, shuffle=True)
        orders.append([i for batch in loader for i in batch.id])
    return batch, orders


def train_in_one_of_two(folder, rank):
    """States and random numbers after training with either Brain."""
    found = {}
    for base in (MemEffBrain, sb.Brain):
        sb.utils.seed.seed_everything(7, verbose=False)
        made = brain(
            base, "SGD8bit", f"{folder}/saved", distributed_backend="gloo"
        )
        try:
            found[base.__name__] = fit(made)
        except ValueError as error:
            found[base.__name__] = str(error)
        if base is MemEffBrain:
            torch.manual_seed(100 + rank)
            made.checkpointer.save_checkpoint()
            found["expected"] = torch.rand(3)
            torch.manual_seed(0)
            made.checkpointer.recover_if_possible()
            found["recovered"] = torch.rand(3)
            loader = made.make_dataloader(
                dataset(),
                sb.Stage.TRAIN,
                batch_size=4,
                sampler=RandomSampler(range(ITEMS)),
            )
            found["items"] = [i for batch in loader for i in batch.id]
            found["batch"], found["order"] = shared_out()
    return found


def test_two_processes_on_the_cpu(tmp_path):
    """_wrap_distributed can go when Brain trains BatchNorm there."""
    ours = run_in_two_processes(
        functools.partial(train_in_one_of_two, str(tmp_path)), tmp_path
    )
    for name, a, b in zip(
        network().state_dict(), ours[0]["MemEffBrain"], ours[1]["MemEffBrain"]
    ):
        if "running" not in name:
            assert torch.equal(a, b), name
    for found in ours:
        assert "SyncBatchNorm" in found["Brain"]
        # Each process has its own random state back.
        assert torch.equal(found["recovered"], found["expected"])
    assert not torch.equal(ours[0]["expected"], ours[1]["expected"])
    # Each gets its half of one order, though their generators differ.
    items = [set(found["items"]) for found in ours]
    assert len(items[0]) == len(items[1]) == ITEMS / 2
    assert not items[0] & items[1]
    # One batch each; and the order is that of the run's seed.
    assert len({*ours[0]["batch"], *ours[1]["batch"]}) == ITEMS
    assert ours[0]["order"][0] != ours[0]["order"][1]
