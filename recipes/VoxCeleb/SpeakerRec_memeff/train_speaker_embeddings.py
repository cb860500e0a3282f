#!/usr/bin/env python3
"""Trains speaker embeddings on VoxCeleb.

    python train_speaker_embeddings.py hparams/train_revnet.yaml \\
        --data_folder=/path/to/VoxCeleb

To continue a killed training from its last checkpoint, run the same command
again.

Authors
 * The sb_memeff authors 2026
"""

import os
import sys
from pathlib import Path

import speechbrain as sb
import torch
from hyperpyyaml import load_hyperpyyaml
from speechbrain.dataio import audio_io
from speechbrain.utils.distributed import if_main_process, run_on_main
from speechbrain.utils.logger import get_logger
from voxceleb_prepare import (
    check_prepared,
    fetch_list,
    prepare_noise,
    prepare_voxceleb,
    read_trials,
    wav_folders,
)

from sb_memeff.brain import MemEffBrain

logger = get_logger(__name__)


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
        """Sets the learning rate of the coming step."""
        if should_step:
            self.lr_annealing(self.optimizer)

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
                    "steps": self.optimizer_step,
                },
                train_stats={"loss": self.train_loss},
                valid_stats={"loss": stage_loss, "ErrorRate": error_rate},
            )
            self.checkpointer.save_and_keep_only(
                meta={"ErrorRate": error_rate}, min_keys=["ErrorRate"]
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
        If the corpus or the list of trials is missing.
    ValueError
        If the schedule is impossible.
    """
    if not hparams["warmup_epochs"] < hparams["number_of_epochs"]:
        raise ValueError(
            f"warmup_epochs={hparams['warmup_epochs']} must be less than "
            f"number_of_epochs={hparams['number_of_epochs']}."
        )
    if hparams["skip_prep"]:
        check_prepared(hparams, ["train_annotation", "valid_annotation"])
        return
    wav_folders(hparams["data_folder"])
    trials = hparams["verification_file"]
    if trials is not None and not str(trials).startswith("http"):
        read_trials(fetch_list(trials, hparams["save_folder"]))


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


def save_label_encoder(train_data, path):
    """Numbers the training speakers, unless the file exists."""
    if not path.is_file():
        encoder = sb.dataio.encoder.CategoricalEncoder()
        encoder.update_from_didataset(train_data, output_key="spk_id")
        partial = path.with_name(path.name + ".partial")
        encoder.save(partial)
        os.replace(partial, path)


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
        If the output folder is of a training with other speakers.
    """
    train_data, valid_data = datasets = [
        sb.dataio.dataset.DynamicItemDataset.from_csv(
            csv_path=hparams[key],
            replacements={"data_root": hparams["data_folder"]},
        )
        for key in ("train_annotation", "valid_annotation")
    ]
    length = round(hparams["sample_rate"] * hparams["sentence_len"])
    random_chunk = hparams["random_chunk"]

    @sb.utils.data_pipeline.takes("wav", "start", "stop", "duration")
    @sb.utils.data_pipeline.provides("sig")
    def audio_pipeline(wav, start, stop, duration):
        start, stop = int(start), int(stop)
        if random_chunk:
            frames = round(float(duration) * hparams["sample_rate"])
            start = int(torch.randint(max(frames - length, 0) + 1, ()))
            stop = min(start + length, frames)
        sig, _ = audio_io.load(wav, frame_offset=start, num_frames=stop - start)
        return sig.mean(0)

    encoder = sb.dataio.encoder.CategoricalEncoder()

    @sb.utils.data_pipeline.takes("spk_id")
    @sb.utils.data_pipeline.provides("spk_id", "spk_id_encoded")
    def label_pipeline(spk_id):
        yield spk_id
        yield encoder.encode_sequence_torch([spk_id])

    sb.dataio.dataset.add_dynamic_item(datasets, audio_pipeline)
    sb.dataio.dataset.add_dynamic_item(datasets, label_pipeline)
    path = Path(hparams["save_folder"]) / "label_encoder.txt"
    run_on_main(save_label_encoder, [train_data, path])
    encoder.load(path)
    encoder.expect_len(len(encoder))
    for row in (*train_data.data.values(), *valid_data.data.values()):
        if row["spk_id"] not in encoder.lab2ind:
            raise ValueError(
                f"{path} of an earlier training lacks the speaker "
                f"{row['spk_id']}: set another output_folder for other data."
            )
    sb.dataio.dataset.set_output_keys(datasets, ["id", "sig", "spk_id_encoded"])
    return train_data, valid_data, encoder


def check_speakers(speakers, out_n_neurons):
    """Checks that the classifier has an output for each training speaker.

    Arguments
    ---------
    speakers : int
        Speakers in train.csv.
    out_n_neurons : int
        Outputs of the classifier.

    Raises
    ------
    ValueError
        If there are fewer outputs than speakers.
    """
    if out_n_neurons < speakers:
        raise ValueError(
            f"The training data has {speakers} speakers but out_n_neurons is "
            f"{out_n_neurons}: set --out_n_neurons={speakers}."
        )
    if out_n_neurons > speakers:
        logger.warning(
            f"The training data has {speakers} speakers; "
            f"{out_n_neurons - speakers} of out_n_neurons={out_n_neurons} "
            f"outputs remain unused."
        )


def schedule(hparams, batches_per_epoch, accumulation):
    """The learning rate as a function of the optimizer step.

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
    return hparams["lr_annealing"](
        n_warmup_steps=round(hparams["warmup_epochs"] * steps),
        total_steps=hparams["number_of_epochs"] * steps,
    )


def main(arguments):
    """Trains.

    Arguments
    ---------
    arguments : list of str
        The command line.
    """
    hparams_file, run_opts, overrides = sb.parse_arguments(arguments)
    sb.utils.distributed.ddp_init_group(run_opts)
    with open(hparams_file, encoding="utf-8") as f:
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
        f"{len(train_data)} training segments of {len(encoder)} speakers, "
        f"{len(valid_data)} for validation."
    )

    brain = SpeakerBrain(
        modules=hparams["modules"],
        opt_class=hparams["opt_class"],
        hparams=hparams,
        run_opts=run_opts,
        checkpointer=hparams["checkpointer"],
    )
    options = hparams["dataloader_options"]
    train_loader = brain.make_dataloader(train_data, sb.Stage.TRAIN, **options)
    brain.lr_annealing = schedule(
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
    if if_main_process():
        logger.info(f"Finished: {hparams['output_folder']}")


if __name__ == "__main__":
    main(sys.argv[1:])
