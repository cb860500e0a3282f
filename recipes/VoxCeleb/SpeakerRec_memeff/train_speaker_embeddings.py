#!/usr/bin/env python3
"""Trains speaker embeddings on VoxCeleb.

    python train_speaker_embeddings.py hparams/train_revnet.yaml \\
        --data_folder=/path/to/VoxCeleb

To continue a killed training from its last checkpoint, run the same command
again. The large-margin stage follows with

    python train_speaker_embeddings.py hparams/train_revnet.yaml \\
        --data_folder=/path/to/VoxCeleb --out_n_neurons=NUMBER_OF_SPEAKERS \\
        --large_margin=results/.../save

Authors
 * The sb_memeff authors 2026
"""

import re
import sys
from pathlib import Path

import speechbrain as sb
import torch
from hyperpyyaml import load_hyperpyyaml
from speechbrain.augment.time_domain import Resample
from speechbrain.utils.checkpoints import average_checkpoints
from speechbrain.utils.distributed import if_main_process, run_on_main
from speechbrain.utils.logger import get_logger
from voxceleb_prepare import (
    check_keys,
    check_prepared,
    fetch_list,
    prepare_noise,
    prepare_voxceleb,
    read_trials,
    wav_folders,
)

from sb_memeff.brain import MemEffBrain
from sb_memeff.dataio.audio import check_csv, load_audio
from sb_memeff.dataio.preparation import atomic_path
from sb_memeff.utils.atomic_checkpoints import trained_weights
from sb_memeff.utils.launch import init_processes
from sb_memeff.utils.settings import check_switches

logger = get_logger(__name__)

# Keys of the yaml file in the large-margin stage: longer crops and a larger
# margin, few epochs at a low rate, no perturbed speeds, for networks trained
# with SGD. The command line overrides them.
LARGE_MARGIN = {
    "sentence_len": 6.0,
    "margin": 0.5,
    "initial_margin": 0.5,
    "speeds": [100],
    "k_top": 0,
    "batch_size": 64,
    "number_of_epochs": 5,
    "warmup_epochs": 1,
    # From 1e-4 to 2.5e-5 if the decay began with the warm-up.
    "lr": 7.58e-05,
    "decay_factor": 0.33,
    "avg_checkpoints": 1,
}
# Keys that the script uses.
KEYS = """
    NOISE_DATASET_URL RIR_DATASET_URL amp_th angular_margin augment_prob
    avg_checkpoints batch_size checkpointer compute_cost data_folder
    data_folder_noise data_folder_rir dataloader_options epoch_counter
    error_stats initial_margin k_top large_margin lr_annealing margin
    margin_epochs margin_schedule modules noise_annotation number_of_epochs
    opt_class out_n_neurons output_folder random_chunk rir_annotation
    sample_rate save_folder seed sentence_len skip_damaged skip_prep speeds
    split_ratio sub_centers train_annotation train_logger valid_annotation
    verification_file warmup_epochs wav_augment
""".split()
# What a training leaves for verification and for the large-margin stage.
TRAINED = ("embedding_model", "classifier")


class SpeakerBrain(MemEffBrain):
    """Speaker embeddings, trained by classifying the training speakers."""

    def compute_forward(self, batch, stage):
        """Cosines between embeddings and the speakers' prototypes."""
        batch = batch.to(self.device)
        wavs, lens = batch.sig
        if stage == sb.Stage.TRAIN:
            wavs, lens = self.hparams.wav_augment(wavs, lens)
        feats = self.modules.compute_features(wavs)
        feats = self.modules.mean_var_norm(feats, lens)
        embeddings = self.modules.embedding_model(feats, lens)
        # In half precision the rounding of a cosine near 1 is as large as the
        # margin.
        with torch.autocast(self.device_type, enabled=False):
            return self.modules.classifier(embeddings.float())

    def compute_objectives(self, outputs, batch, stage):
        """AAM-softmax loss; in validation the error rate too."""
        speakers, _ = batch.spk_id_encoded
        if stage != sb.Stage.TRAIN:
            self.error_metrics.append(batch.id, outputs, speakers)
        return self.hparams.compute_cost(outputs, speakers)

    def on_fit_batch_start(self, batch, should_step):
        """Sets the margin, and the learning rate of the coming step."""
        self.margin_schedule(self.optimizer_step)
        if should_step:
            self.lr_annealing(self.optimizer)

    def on_epoch_resized(self, before, now, step):
        """Moves the schedules to the same share of the training."""
        logger.warning(
            f"An epoch had {before} optimizer steps and has {now} now: the "
            f"schedules of learning rate and margin continue at the same share."
        )
        schedule = self.lr_annealing
        steps = schedule.n_warmup_steps + schedule.decay_steps
        warmup = round(schedule.n_warmup_steps * now / before)
        schedule.n_warmup_steps = warmup
        schedule.decay_steps = round(steps * now / before) - warmup
        schedule.current_step = self.optimizer_step = step

    def on_stage_start(self, stage, epoch=None):
        """Resets the error metrics."""
        if stage != sb.Stage.TRAIN:
            self.error_metrics = self.hparams.error_stats()

    def on_stage_end(self, stage, stage_loss, epoch=None):
        """Logs, and saves a checkpoint after validation."""
        if stage == sb.Stage.TRAIN:
            self.train_loss = stage_loss
        elif stage == sb.Stage.VALID:
            error_rate = self.error_metrics.summarize("average")
            self.hparams.train_logger.log_stats(
                stats_meta={
                    "epoch": epoch,
                    "lr": self.lr_annealing.current_lr,
                    "margin": self.hparams.angular_margin.margin,
                    "steps": self.optimizer_step,
                },
                train_stats={"loss": self.train_loss},
                valid_stats={"loss": stage_loss, "ErrorRate": error_rate},
            )
            self.checkpointer.save_checkpoint({"ErrorRate": error_rate})
            best = self.checkpointer.find_checkpoint(min_key="ErrorRate")
            kept = [best.path, *(c.path for c in self.last_epochs())]
            self.checkpointer.delete_checkpoints(
                num_to_keep=0, ckpt_predicate=lambda c: c.path not in kept
            )

    def last_epochs(self):
        """The checkpoints whose mean is saved at the end."""
        return self.checkpointer.find_checkpoints(
            max_num_checkpoints=self.hparams.avg_checkpoints,
            # Not those within an epoch.
            ckpt_predicate=lambda c: "ErrorRate" in c.meta,
        )

    def on_fit_start(self):
        """Removes the mean that a shorter training saved."""
        super().on_fit_start()
        for path in map(self.mean_path, TRAINED):
            run_on_main(path.unlink, kwargs={"missing_ok": True})

    def mean_path(self, name):
        """File for the mean of a module's weights."""
        return Path(self.hparams.save_folder) / f"{name}.ckpt"

    def save_mean(self):
        """Saves the mean of the last epochs' weights beside the checkpoints."""
        checkpoints = self.last_epochs()
        for name in TRAINED:
            with atomic_path(self.mean_path(name)) as partial:
                torch.save(average_checkpoints(checkpoints, name), partial)
        logger.info(
            f"{self.hparams.save_folder} has the mean of {len(checkpoints)} "
            f"checkpoints."
        )


def check_data(hparams):
    """Checks settings and files before anything is written.

    Arguments
    ---------
    hparams : dict
        The loaded yaml file.

    Raises
    ------
    FileNotFoundError
        If the corpus, the list of trials or the weights to start from are
        missing.
    ValueError
        If a setting is impossible.
    """
    check_settings(hparams)
    if hparams["large_margin"] is not None:
        find_trained(hparams)
    if hparams["skip_prep"]:
        check_prepared(hparams, ["train_annotation", "valid_annotation"])
        return
    wav_folders(hparams["data_folder"])
    trials = hparams["verification_file"]
    if trials is not None and not str(trials).startswith("http"):
        read_trials(fetch_list(trials, hparams["save_folder"]))


def check_settings(hparams):
    """Checks settings that do not depend on files.

    Arguments
    ---------
    hparams : dict
        The loaded yaml file.

    Raises
    ------
    TypeError
        If skip_damaged is neither True nor False.
    ValueError
        If one is impossible.
    """
    check_switches(skip_damaged=hparams["skip_damaged"])
    epochs, speeds = hparams["number_of_epochs"], hparams["speeds"]
    if not hparams["warmup_epochs"] < epochs:
        raise ValueError(
            f"warmup_epochs={hparams['warmup_epochs']} must be less than "
            f"number_of_epochs={epochs}."
        )
    if not 1 <= hparams["avg_checkpoints"] <= epochs:
        raise ValueError(
            f"avg_checkpoints={hparams['avg_checkpoints']} must be 1 to "
            f"number_of_epochs={epochs}."
        )
    if 100 not in speeds or len(set(speeds)) < len(speeds):
        raise ValueError(
            f"speeds={speeds} must be different percentages, 100 among them."
        )
    start, end = hparams["margin_epochs"]
    if not 0 <= hparams["initial_margin"] <= hparams["margin"]:
        raise ValueError(
            f"initial_margin={hparams['initial_margin']} must be 0 to "
            f"margin={hparams['margin']}."
        )
    if hparams["initial_margin"] < hparams["margin"] and not (
        1 <= start < end <= epochs
    ):
        raise ValueError(
            f"margin_epochs={[start, end]} must be two epochs, the first below "
            f"the second, up to number_of_epochs={epochs}."
        )
    if not 0 <= hparams["augment_prob"] <= 1:
        raise ValueError(
            f"augment_prob={hparams['augment_prob']} must be 0 to 1."
        )
    if not hparams["k_top"] < hparams["out_n_neurons"]:
        raise ValueError(
            f"k_top={hparams['k_top']} must be less than "
            f"out_n_neurons={hparams['out_n_neurons']}."
        )


def find_trained(hparams):
    """Finds the weights that the large-margin stage starts from.

    Arguments
    ---------
    hparams : dict
        The loaded yaml file.

    Returns
    -------
    Path
        Folder with a file for each name in TRAINED.

    Raises
    ------
    FileNotFoundError
        If there are none.
    ValueError
        If they are this training's own.
    """
    save_folder = Path(hparams["large_margin"])
    folder = trained_weights(save_folder)
    if folder is None or not (save_folder / "label_encoder.txt").is_file():
        raise FileNotFoundError(
            f"There is no finished training in {save_folder}: set large_margin "
            f"to the save folder of a training, or to null to train from "
            f"scratch."
        )
    if save_folder.resolve() == Path(hparams["save_folder"]).resolve():
        raise ValueError(
            f"large_margin={save_folder} is the save folder of this training: "
            f"set another output_folder."
        )
    return folder


def load_trained(hparams, encoder):
    """Loads the weights that the large-margin stage starts from.

    Arguments
    ---------
    hparams : dict
        The loaded yaml file.
    encoder : CategoricalEncoder
        The classes of this stage. Weights of others, such as the perturbed
        speeds, are left out.

    Raises
    ------
    ValueError
        If they do not fit.
    """
    folder = find_trained(hparams)
    earlier = sb.dataio.encoder.CategoricalEncoder()
    earlier.load(Path(hparams["large_margin"]) / "label_encoder.txt")
    unknown = set(encoder.lab2ind) - set(earlier.lab2ind)
    if unknown:
        raise ValueError(
            f"The training in {hparams['large_margin']} lacks the speaker "
            f"{min(unknown)}: use its corpus and list of trials."
        )
    states = [
        torch.load(
            folder / f"{name}.ckpt", map_location="cpu", weights_only=True
        )
        for name in TRAINED
    ]
    classes = [earlier.lab2ind[encoder.ind2lab[n]] for n in range(len(encoder))]
    try:
        weight = states[1]["weight"]
        centres = weight.unflatten(0, (-1, hparams["sub_centers"]))[classes]
        states[1]["weight"] = centres.flatten(0, 1)
        for name, state in zip(TRAINED, states):
            hparams["modules"][name].load_state_dict(state)
    except (IndexError, RuntimeError) as error:
        raise ValueError(
            f"The weights in {folder} do not fit the network of this yaml file: "
            f"set preset or channels, the other sizes and sub_centers as in "
            f"training, and out_n_neurons={len(encoder)}."
        ) from error
    logger.info(f"The large-margin stage starts from {folder}")


def prepare_data(hparams):
    """Writes the csv files of the corpus and of the augmentation."""
    prepare_voxceleb(
        data_folder=hparams["data_folder"],
        save_folder=hparams["save_folder"],
        verification_file=hparams["verification_file"],
        split_ratio=hparams["split_ratio"],
        seg_dur=hparams["sentence_len"],
        amp_th=hparams["amp_th"],
        sample_rate=hparams["sample_rate"],
        seed=hparams["seed"],
        skip_prep=hparams["skip_prep"],
    )
    for kind in ("noise", "rir"):
        prepare_noise(
            folder=hparams[f"data_folder_{kind}"],
            csv_file=hparams[f"{kind}_annotation"],
            key=f"data_folder_{kind}",
            url=hparams[f"{kind.upper()}_DATASET_URL"],
            sample_rate=hparams["sample_rate"],
        )


def class_of(speaker, speed):
    """The class of a speaker at a speed: at each speed another voice."""
    return speaker if speed == 100 else f"{speaker}_speed{speed}"


def save_label_encoder(train_data, speeds, path):
    """Numbers the classes, the speakers first, unless the file exists."""
    if not path.is_file():
        encoder = sb.dataio.encoder.CategoricalEncoder()
        encoder.update_from_didataset(train_data, output_key="spk_id")
        speakers = list(encoder.lab2ind)
        for speed in speeds:
            for speaker in speakers:
                encoder.ensure_label(class_of(speaker, speed))
        with atomic_path(path) as partial:
            encoder.save(partial)


class Crop:
    """Loads a crop of an utterance, at one of several speeds.

    Arguments
    ---------
    sample_rate : int
        Samples per second.
    sentence_len : float
        Seconds.
    random_chunk : bool
        If True, the crop is anywhere in the utterance.
    speeds : list of int
        Percentages; each has the same probability.
    """

    def __init__(self, sample_rate, sentence_len, random_chunk, speeds):
        self.sample_rate = sample_rate
        self.length = round(sample_rate * sentence_len)
        self.random_chunk = random_chunk
        self.speeds = speeds
        self.resamplers = {
            speed: Resample(orig_freq=speed, new_freq=100) for speed in speeds
        }

    def __call__(self, wav, start, stop, duration):
        """Loads it.

        Arguments
        ---------
        wav : str
            File.
        start : str
            First sample of the segment.
        stop : str
            Its end.
        duration : float
            Seconds of the utterance.

        Returns
        -------
        torch.Tensor
            The waveform [samples].
        int
            The speed.
        """
        start, stop, speed = int(start), int(stop), 100
        if len(self.speeds) > 1:
            speed = self.speeds[int(torch.randint(len(self.speeds), ()))]
        if self.random_chunk:
            frames = round(float(duration) * self.sample_rate)
            # So many samples have the crop's length at this speed.
            length = -(-self.length * speed // 100)
            start = int(torch.randint(max(frames - length, 0) + 1, ()))
            stop = min(start + length, frames)
        sig = load_audio(wav, self.sample_rate, start, stop)
        sig = self.resamplers[speed](sig[None])[0]
        return (sig[: self.length] if self.random_chunk else sig), speed


def dataio_prep(hparams):
    """Makes the datasets.

    Arguments
    ---------
    hparams : dict
        The loaded yaml file.

    Returns
    -------
    tuple
        Training set, validation set, label encoder.

    Raises
    ------
    ValueError
        If a row of a csv file is bad, or if the output folder is of a
        training with other speakers.
    """
    for key in ("train_annotation", "valid_annotation"):
        check_csv(
            hparams[key], ["wav", "spk_id"], ["duration", "start", "stop"]
        )
    train_data, valid_data = datasets = [
        sb.dataio.dataset.DynamicItemDataset.from_csv(
            csv_path=hparams[key],
            replacements={"data_root": hparams["data_folder"]},
        )
        for key in ("train_annotation", "valid_annotation")
    ]
    encoder = sb.dataio.encoder.CategoricalEncoder()
    options = (
        hparams["sample_rate"],
        hparams["sentence_len"],
        hparams["random_chunk"],
    )
    for dataset, speeds in (
        (train_data, hparams["speeds"]),
        (valid_data, [100]),
    ):
        add_pipeline(dataset, Crop(*options, speeds), encoder)
    path = Path(hparams["save_folder"]) / "label_encoder.txt"
    run_on_main(save_label_encoder, [train_data, hparams["speeds"], path])
    encoder.load(path)
    encoder.expect_len(len(encoder))
    speakers = [
        row["spk_id"]
        for row in (*train_data.data.values(), *valid_data.data.values())
    ]
    for speaker in speakers:
        for speed in hparams["speeds"]:
            if class_of(speaker, speed) not in encoder.lab2ind:
                raise ValueError(
                    f"{path} of an earlier training lacks the speaker "
                    f"{class_of(speaker, speed)}: set another output_folder for "
                    f"other data or speeds."
                )
    sb.dataio.dataset.set_output_keys(datasets, ["id", "sig", "spk_id_encoded"])
    return train_data, valid_data, encoder


def add_pipeline(dataset, crop, encoder):
    """Adds waveform and class to the items of a dataset.

    Arguments
    ---------
    dataset : DynamicItemDataset
        Of a csv file.
    crop : Crop
        Loads the waveform.
    encoder : CategoricalEncoder
        Numbers the classes.
    """

    @sb.utils.data_pipeline.takes("wav", "start", "stop", "duration", "spk_id")
    @sb.utils.data_pipeline.provides("sig", "spk_id_encoded")
    def pipeline(wav, start, stop, duration, spk_id):
        sig, speed = crop(wav, start, stop, duration)
        yield sig
        yield encoder.encode_sequence_torch([class_of(spk_id, speed)])

    dataset.add_dynamic_item(pipeline)


def check_speakers(speakers, out_n_neurons):
    """Checks that the classifier has an output for each training speaker.

    Arguments
    ---------
    speakers : int
        Speakers in train.csv; each counts once for each speed.
    out_n_neurons : int
        Outputs of the classifier.

    Raises
    ------
    ValueError
        If there are fewer outputs than speakers.
    """
    if out_n_neurons < speakers:
        raise ValueError(
            f"The training data has {speakers} speakers (each speed is one) but "
            f"out_n_neurons is {out_n_neurons}: set "
            f"--out_n_neurons={speakers}."
        )
    if out_n_neurons > speakers:
        logger.warning(
            f"The training data has {speakers} speakers; "
            f"{out_n_neurons - speakers} of out_n_neurons={out_n_neurons} "
            f"outputs remain unused."
        )


def schedules(hparams, batches_per_epoch, accumulation):
    """The learning rate and the margin as functions of the optimizer step.

    Arguments
    ---------
    hparams : dict
        The loaded yaml file.
    batches_per_epoch : int
        Batches of each process in an epoch.
    accumulation : int
        Batches in an optimizer step.

    Returns
    -------
    object
        Sets the learning rate of the optimizer that it is called with.
    MarginSchedule
        Sets the margin at the step that it is called with.

    Raises
    ------
    ValueError
        If an epoch has less than one step.
    """
    # Brain drops the gradients of an incomplete accumulation.
    steps = batches_per_epoch // accumulation
    if steps < 1:
        raise ValueError(
            f"An epoch has {batches_per_epoch} full batches, too few for one "
            f"optimizer step: lower batch_size={hparams['batch_size']} or "
            f"grad_accumulation_factor={accumulation}."
        )
    annealing = hparams["lr_annealing"](
        n_warmup_steps=round(hparams["warmup_epochs"] * steps),
        total_steps=hparams["number_of_epochs"] * steps,
    )
    # Epochs are counted from 1.
    start, end = ((epoch - 1) * steps for epoch in hparams["margin_epochs"])
    return annealing, hparams["margin_schedule"](start_step=start, end_step=end)


def with_large_margin(overrides, save_folder):
    """Adds the keys of the large-margin stage to those of the command line.

    Arguments
    ---------
    overrides : str
        Lines ``key: value``.
    save_folder : str
        Of the training to start from.

    Returns
    -------
    str
        The lines of both; the command line's stand for both.
    """
    output_folder = Path(save_folder).parent / "large_margin"
    keys = {**LARGE_MARGIN, "output_folder": output_folder}
    given = re.findall(r"^(\w+):", overrides, re.MULTILINE)
    lines = [f"{k}: {v}" for k, v in keys.items() if k not in given]
    return "\n".join([*lines, overrides])


def main(arguments):
    """Trains.

    Arguments
    ---------
    arguments : list of str
        The command line.
    """
    hparams_file, run_opts, overrides = sb.parse_arguments(arguments)
    init_processes(run_opts)
    with open(hparams_file, encoding="utf-8") as f:
        hparams = load_hyperpyyaml(f, overrides)
        check_keys(hparams, KEYS, hparams_file)
        if hparams["large_margin"] is not None:
            overrides = with_large_margin(overrides, hparams["large_margin"])
            f.seek(0)
            hparams = load_hyperpyyaml(f, overrides)
    # cuDNN's benchmark chooses algorithms by time, so the choice varies.
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.backends.cudnn.benchmark = not deterministic
    check_data(hparams)
    run_on_main(prepare_data, [hparams])
    sb.core.create_experiment_directory(
        experiment_directory=hparams["output_folder"],
        hyperparams_to_save=hparams_file,
        overrides=overrides,
    )
    train_data, valid_data, encoder = dataio_prep(hparams)
    check_speakers(len(encoder), hparams["out_n_neurons"])
    logger.info(
        f"{len(train_data)} training segments, {len(encoder)} classes, "
        f"{len(valid_data)} for validation."
    )
    if hparams["large_margin"] is not None:
        load_trained(hparams, encoder)

    brain = SpeakerBrain(
        modules=hparams["modules"],
        opt_class=hparams["opt_class"],
        hparams=hparams,
        run_opts=run_opts,
        checkpointer=hparams["checkpointer"],
    )
    options = hparams["dataloader_options"]
    train_loader = brain.make_dataloader(train_data, sb.Stage.TRAIN, **options)
    brain.lr_annealing, brain.margin_schedule = schedules(
        hparams, len(train_loader), brain.grad_accumulation_factor
    )
    brain.checkpointer.add_recoverable("lr_annealing", brain.lr_annealing)
    # The same augmentation for every network, whose initialisation draws random
    # numbers.
    sb.utils.seed.seed_everything(hparams["seed"], verbose=False)
    brain.fit(
        hparams["epoch_counter"],
        train_loader,
        valid_data,
        valid_loader_kwargs={**options, "shuffle": False, "drop_last": False},
    )
    if hparams["avg_checkpoints"] > 1:
        run_on_main(brain.save_mean)
    if if_main_process():
        logger.info(f"Finished: {hparams['output_folder']}")


if __name__ == "__main__":
    main(sys.argv[1:])
