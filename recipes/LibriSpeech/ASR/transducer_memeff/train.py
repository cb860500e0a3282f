#!/usr/bin/env python3
"""Trains a neural transducer on LibriSpeech, and recognises the test sets.

    python train.py hparams/conformer_transducer.yaml \\
        --data_folder=/path/to/LibriSpeech

The encoder is a conformer, the prediction network an LSTM. The losses are the
transducer loss and, optionally, CTC on the encoder. The logits of the joint
network are computed one tile at a time and never stored. To continue a killed
training from its last checkpoint, run the same command again.

Authors
 * The sb_memeff authors 2026
"""

import copy
import os
import shutil
import sys
from pathlib import Path

import speechbrain as sb
import torch
from hyperpyyaml import load_hyperpyyaml
from librispeech_prepare import prepare_librispeech, split_root
from speechbrain.dataio.dataset import DynamicItemDataset
from speechbrain.dataio.sampler import DynamicBatchSampler
from speechbrain.tokenizers.SentencePiece import SentencePiece
from speechbrain.utils.checkpoints import average_checkpoints
from speechbrain.utils.data_pipeline import provides, takes
from speechbrain.utils.distributed import if_main_process, run_on_main
from speechbrain.utils.logger import get_logger

from sb_memeff.brain import MemEffBrain
from sb_memeff.dataio.audio import check_csv, load_audio
from sb_memeff.utils.launch import init_processes
from sb_memeff.utils.settings import check_switches

logger = get_logger(__name__)


class ASR(MemEffBrain):
    """A transducer whose loss does not store its logits."""

    def compute_forward(self, batch, stage):
        """Computes the inputs of the losses, or the hypotheses."""
        batch = batch.to(self.device)
        wavs, wav_lens = batch.sig
        tokens_bos, _ = batch.tokens_bos
        training = stage == sb.Stage.TRAIN
        epoch = self.hparams.epoch_counter.current

        if training and hasattr(self.hparams, "wav_augment"):
            wavs, wav_lens = self.hparams.wav_augment(wavs, wav_lens)
            tokens_bos = self.hparams.wav_augment.replicate_labels(tokens_bos)
        feats = self.hparams.compute_features(wavs)
        if training and hasattr(self.hparams, "fea_augment"):
            feats, wav_lens = self.hparams.fea_augment(feats, wav_lens)
            tokens_bos = self.hparams.fea_augment.replicate_labels(tokens_bos)
        feats = self.modules.normalize(feats, wav_lens, epoch=epoch)

        chunks = None
        if self.hparams.streaming:
            chunks = self.hparams.dynchunktrain_config_sampler(stage)
        encoded = self.modules.enc(
            self.modules.CNN(feats),
            wav_lens,
            pad_idx=self.hparams.pad_index,
            dynchunktrain_config=chunks,
        )
        encoded = self.modules.proj_enc(encoded)

        embedded = self.modules.emb(tokens_bos)
        embedded = torch.nn.functional.dropout(
            embedded, self.hparams.dec_emb_dropout, training
        )
        predicted, _ = self.modules.dec(embedded)
        predicted = torch.nn.functional.dropout(
            predicted, self.hparams.dec_dropout, training
        )
        predicted = self.modules.proj_dec(predicted)

        outputs = {
            "encoded": encoded,
            "predicted": predicted,
            "wav_lens": wav_lens,
        }
        if training:
            if self.uses_ctc():
                outputs["p_ctc"] = self.hparams.log_softmax(
                    self.modules.proj_ctc(encoded)
                )
            if self.hparams.ce_weight > 0:
                outputs["p_ce"] = self.hparams.log_softmax(
                    self.modules.dec_lin(predicted)
                )
        else:
            searcher = (
                self.hparams.Greedysearcher
                if stage == sb.Stage.VALID
                else self.hparams.Beamsearcher
            )
            outputs["hyps"], *_ = searcher(encoded, wav_lens)
        return outputs

    def uses_ctc(self):
        """Whether this epoch's loss includes CTC."""
        epoch = self.hparams.epoch_counter.current
        return (
            self.hparams.ctc_weight > 0
            and epoch <= self.hparams.number_of_ctc_epochs
        )

    def compute_objectives(self, outputs, batch, stage):
        """Transducer loss, with CTC and cross-entropy in training."""
        wav_lens = outputs["wav_lens"]
        labels = (*batch.tokens, *batch.tokens_eos)
        if stage == sb.Stage.TRAIN:
            for name in ("wav_augment", "fea_augment"):
                if hasattr(self.hparams, name):
                    augment = getattr(self.hparams, name)
                    labels = augment.replicate_multiple_labels(*labels)
        tokens, token_lens, tokens_eos, token_eos_lens = labels

        loss = self.modules.transducer_loss(
            outputs["encoded"],
            outputs["predicted"],
            tokens,
            wav_lens,
            token_lens,
        )
        if stage != sb.Stage.TRAIN:
            words = [
                self.tokenizer.decode_ids(h).split() for h in outputs["hyps"]
            ]
            targets = [wrd.split() for wrd in batch.wrd]
            self.wer_metric.append(batch.id, words, targets)
            self.cer_metric.append(batch.id, words, targets)
            return loss

        others = self.hparams.ctc_weight + self.hparams.ce_weight
        loss = (1 - others) * loss
        if "p_ctc" in outputs:
            loss = loss + self.hparams.ctc_weight * self.hparams.ctc_cost(
                outputs["p_ctc"], tokens, wav_lens, token_lens
            )
        if "p_ce" in outputs:
            loss = loss + self.hparams.ce_weight * self.hparams.ce_cost(
                outputs["p_ce"], tokens_eos, length=token_eos_lens
            )
        return loss

    def on_fit_batch_start(self, batch, should_step):
        """Sets the learning rate of the first step."""
        if self.optimizer_step == 0:
            # A copy: the scheduler counts the steps that are done.
            copy.copy(self.hparams.noam_annealing)(self.optimizer)

    def on_fit_batch_end(self, batch, outputs, loss, should_step):
        """Sets the learning rate of the coming step, as upstream does."""
        if should_step:
            self.hparams.noam_annealing(self.optimizer)

    def on_stage_start(self, stage, epoch=None):
        """Resets the error metrics."""
        if stage != sb.Stage.TRAIN:
            self.wer_metric = self.hparams.error_rate_computer()
            self.cer_metric = self.hparams.cer_computer()

    def on_stage_end(self, stage, stage_loss, epoch=None):
        """Logs, and saves a checkpoint after validation."""
        if stage == sb.Stage.TRAIN:
            self.train_loss = stage_loss
            return
        stats = {
            "loss": stage_loss,
            "CER": self.cer_metric.summarize("error_rate"),
            "WER": self.wer_metric.summarize("error_rate"),
        }
        if stage == sb.Stage.VALID:
            self.hparams.train_logger.log_stats(
                stats_meta={
                    "epoch": epoch,
                    "lr": self.hparams.noam_annealing.current_lr,
                    "steps": self.optimizer_step,
                    "optimizer": type(self.optimizer).__name__,
                },
                train_stats={"loss": self.train_loss},
                valid_stats=stats,
            )
            self.checkpointer.save_and_keep_only(
                meta={"WER": stats["WER"], "epoch": epoch},
                min_keys=["WER"],
                num_to_keep=self.hparams.avg_checkpoints,
            )
            return
        self.hparams.train_logger.log_stats(
            stats_meta={
                "test": self.test_name,
                "averaged checkpoints": self.averaged,
            },
            test_stats=stats,
        )
        if if_main_process():
            path = Path(self.hparams.output_wer_folder)
            with open(
                path / f"wer_{self.test_name}.txt", "w", encoding="utf-8"
            ) as f:
                self.wer_metric.write_stats(f)

    def on_evaluate_start(self, max_key=None, min_key=None):
        """Loads the average of the best checkpoints."""
        super().on_evaluate_start(max_key, min_key)
        checkpoints = self.checkpointer.find_checkpoints(
            max_key=max_key,
            min_key=min_key,
            max_num_checkpoints=self.hparams.avg_checkpoints,
        )
        self.averaged = len(checkpoints)
        self.hparams.model.load_state_dict(
            average_checkpoints(checkpoints, "model")
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
        If the corpus, a csv file or the pretrained model is missing. (The preparation reports
        missing splits, before it writes.)
    ValueError
        If a setting is invalid.
    """
    check_switches(skip_damaged=hparams["skip_damaged"])
    weights = hparams["ctc_weight"], hparams["ce_weight"]
    if min(weights) < 0 or sum(weights) > 1:
        raise ValueError(
            f"ctc_weight={weights[0]} and ce_weight={weights[1]} must not be "
            f"negative, and their sum must not exceed 1: the transducer loss has "
            f"the remaining weight."
        )
    if hparams["ce_weight"] > 0 and "dec_lin" not in hparams["modules"]:
        raise ValueError(
            f"ce_weight={hparams['ce_weight']} needs a dec_lin among the "
            f"modules: see the lines of dec_lin in the yaml file."
        )
    if hparams["sorting"] not in ("random", "ascending", "descending"):
        raise ValueError(
            f"sorting={hparams['sorting']} must be random, ascending or "
            f"descending."
        )
    start = hparams.get("pretrained_model")
    if start and not Path(start).is_file():
        raise FileNotFoundError(
            f"There is no {start}: set pretrained_model to a model.ckpt."
        )
    split_root(hparams["data_folder"])
    keys = {"train_csv": "train_splits", "valid_csv": "dev_splits"}
    for key, paths in csv_files(hparams).items():
        for path in paths:
            if hparams["skip_prep"]:
                if not path.is_file():
                    raise FileNotFoundError(
                        f"There is no {path}: with skip_prep the file of {key} "
                        f"must exist; run without skip_prep to create it."
                    )
            elif path not in prepared_files(hparams):
                splits = keys.get(key, "test_splits")
                raise ValueError(
                    f"{key} is {path}, which is not the csv file of any split: "
                    f"set it to <output_folder>/<split>.csv with one of {splits} "
                    f"({', '.join(hparams[splits])})."
                )


def csv_files(hparams):
    """The csv files of the yaml file.

    Arguments
    ---------
    hparams : dict
        The loaded yaml file.

    Returns
    -------
    dict
        Maps each key to a list of Path.
    """
    return {
        "train_csv": [Path(hparams["train_csv"])],
        "valid_csv": [Path(hparams["valid_csv"])],
        "test_csv": [Path(path) for path in hparams["test_csv"]],
    }


def prepared_files(hparams):
    """The csv files that the preparation writes.

    Arguments
    ---------
    hparams : dict
        The loaded yaml file.

    Returns
    -------
    list of Path
        The files.
    """
    splits = [
        *hparams["train_splits"],
        *hparams["dev_splits"],
        *hparams["test_splits"],
    ]
    folder = Path(hparams["output_folder"])
    return [Path(hparams["train_csv"]), *(folder / f"{s}.csv" for s in splits)]


def prepare_data(hparams):
    """Writes the csv files."""
    prepare_librispeech(
        data_folder=hparams["data_folder"],
        save_folder=hparams["output_folder"],
        tr_splits=hparams["train_splits"],
        dev_splits=hparams["dev_splits"],
        te_splits=hparams["test_splits"],
        merge_lst=hparams["train_splits"],
        merge_name=Path(hparams["train_csv"]).name,
        sample_rate=hparams["sample_rate"],
        skip_prep=hparams["skip_prep"],
    )


def load_tokenizer(hparams):
    """Loads a pretrained tokenizer and language model, or trains a tokenizer.

    Arguments
    ---------
    hparams : dict
        The loaded yaml file.

    Returns
    -------
    sentencepiece.SentencePieceProcessor
        The tokenizer.

    Raises
    ------
    ValueError
        If the training text is too small for so many tokens, or their number
        differs from the network's.
    """
    tokenizer, size = hparams["tokenizer"], hparams["output_neurons"]
    if hparams.get("pretrained_lm_tokenizer_path"):
        run_on_main(hparams["pretrainer"].collect_files)
        hparams["pretrainer"].load_collected()
    else:
        folder = Path(hparams["save_folder"]) / "tokenizer"
        run_on_main(train_tokenizer, [hparams, folder])
        tokenizer.load(str(next(folder.glob("*.model"))))
    if tokenizer.get_piece_size() != size:
        raise ValueError(
            f"The tokenizer has {tokenizer.get_piece_size()} tokens but "
            f"output_neurons is {size}: set "
            f"--output_neurons={tokenizer.get_piece_size()}, or another "
            f"output_folder if the tokenizer comes from an earlier training."
        )
    return tokenizer


def load_pretrained(hparams):
    """Loads a model.ckpt of this recipe or SpeechBrain's; a checkpoint wins.

    Arguments
    ---------
    hparams : dict
        The loaded yaml file.
    """
    if path := hparams.get("pretrained_model"):
        weights = torch.load(path, map_location="cpu", weights_only=True)
        hparams["model"].load_state_dict(weights)


def train_tokenizer(hparams, folder):
    """Trains a tokenizer on the training transcripts, unless it exists.

    Arguments
    ---------
    hparams : dict
        The loaded yaml file.
    folder : Path
        Folder of the tokenizer.

    Raises
    ------
    ValueError
        If the text is too small for so many tokens.
    """
    if folder.is_dir():
        return
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        SentencePiece(
            str(partial),
            vocab_size=hparams["output_neurons"],
            annotation_train=str(hparams["train_csv"]),
            annotation_read="wrd",
            model_type=hparams["token_type"],
            character_coverage=hparams["character_coverage"],
            unk_id=hparams["blank_index"],
        )
    except RuntimeError as error:
        raise ValueError(
            f"Cannot train a tokenizer of "
            f"output_neurons={hparams['output_neurons']} "
            f"{hparams['token_type']} tokens on {hparams['train_csv']}: {error}"
        ) from error
    os.replace(partial, folder)


def dataio_prepare(hparams, tokenizer):
    """Makes the datasets.

    Arguments
    ---------
    hparams : dict
        The loaded yaml file.
    tokenizer : sentencepiece.SentencePieceProcessor
        The tokenizer.

    Returns
    -------
    tuple
        Training set, validation set, dict of test sets.

    Raises
    ------
    ValueError
        If a row of a csv file is bad, or if the tokenizer cannot spell a
        transcript.
    """
    root = str(split_root(hparams["data_folder"]))

    def load(path, **order):
        check_csv(path, ["wav", "wrd"], ["duration"])
        dataset = DynamicItemDataset.from_csv(path, {"data_root": root})
        return dataset.filtered_sorted(**order) if order else dataset

    files = csv_files(hparams)
    order = {}
    if hparams["sorting"] != "random":
        order["sort_key"] = "duration"
        order["reverse"] = hparams["sorting"] == "descending"
    train_data = load(files["train_csv"][0], **order)
    valid_data = load(files["valid_csv"][0], sort_key="duration")
    test_data = {
        path.stem: load(path, sort_key="duration") for path in files["test_csv"]
    }
    datasets = [train_data, valid_data, *test_data.values()]

    @takes("wav")
    @provides("sig")
    def audio_pipeline(wav):
        return load_audio(wav, hparams["sample_rate"])

    @takes("wrd")
    @provides("wrd", "tokens_list", "tokens_bos", "tokens_eos", "tokens")
    def text_pipeline(wrd):
        yield wrd
        tokens = tokenizer.encode_as_ids(wrd)
        yield tokens
        yield torch.LongTensor([hparams["bos_index"], *tokens])
        yield torch.LongTensor([*tokens, hparams["eos_index"]])
        yield torch.LongTensor(tokens)

    sb.dataio.dataset.add_dynamic_item(datasets, audio_pipeline)
    sb.dataio.dataset.add_dynamic_item(datasets, text_pipeline)
    sb.dataio.dataset.set_output_keys(
        datasets, ["id", "sig", "wrd", "tokens_bos", "tokens_eos", "tokens"]
    )
    for dataset in datasets:
        check_transcripts(dataset, tokenizer, hparams["blank_index"])
    return train_data, valid_data, test_data


def check_transcripts(dataset, tokenizer, blank_index):
    """The tokenizer must spell every transcript without the blank.

    Arguments
    ---------
    dataset : DynamicItemDataset
        With "wrd".
    tokenizer : sentencepiece.SentencePieceProcessor
        The tokenizer.
    blank_index : int
        The blank, which is also SentencePiece's unknown token.

    Raises
    ------
    ValueError
        If a transcript has a character outside its vocabulary.
    """
    for name, row in dataset.data.items():
        if blank_index in tokenizer.encode_as_ids(row["wrd"]):
            raise ValueError(
                f"The tokenizer cannot spell the transcript of {name}: "
                f"{row['wrd']!r} has a character outside its vocabulary. "
                f"Correct the transcript, raise character_coverage, or use "
                f"the tokenizer of this text."
            )


def batch_options(hparams, dataset, stage):
    """Arguments of the DataLoader.

    Arguments
    ---------
    hparams : dict
        The loaded yaml file.
    dataset : DynamicItemDataset
        What it loads.
    stage : speechbrain.Stage
        TRAIN or VALID.

    Returns
    -------
    dict
        Keyword arguments.
    """
    name = "train" if stage == sb.Stage.TRAIN else "valid"
    options = dict(hparams[f"{name}_dataloader_opts"])
    if not hparams["dynamic_batching"]:
        if stage == sb.Stage.TRAIN:
            options["shuffle"] = hparams["sorting"] == "random"
        return options
    sizes = dict(hparams["dynamic_batch_sampler"])
    longest = sizes.pop("max_batch_len_val")
    if stage == sb.Stage.TRAIN:
        longest = sizes["max_batch_len"]
    del sizes["max_batch_len"]
    options["batch_sampler"] = DynamicBatchSampler(
        dataset,
        longest,
        num_buckets=sizes.pop("num_buckets"),
        length_func=lambda row: row["duration"],
        shuffle=sizes.pop("shuffle_ex") and stage == sb.Stage.TRAIN,
        seed=hparams["seed"],
        **sizes,
    )
    options.pop("batch_size", None)
    return options


def main(arguments):
    """Trains and tests.

    Arguments
    ---------
    arguments : list of str
        The command line.
    """
    hparams_file, run_opts, overrides = sb.parse_arguments(arguments)
    init_processes(run_opts)
    with open(hparams_file, encoding="utf-8") as f:
        hparams = load_hyperpyyaml(f, overrides)
    check_data(hparams)
    run_on_main(prepare_data, [hparams])
    sb.core.create_experiment_directory(
        experiment_directory=hparams["output_folder"],
        hyperparams_to_save=hparams_file,
        overrides=overrides,
    )
    tokenizer = load_tokenizer(hparams)
    load_pretrained(hparams)
    train_data, valid_data, test_data = dataio_prepare(hparams, tokenizer)

    brain = ASR(
        modules=hparams["modules"],
        opt_class=hparams["opt_class"],
        hparams=hparams,
        run_opts=run_opts,
        checkpointer=hparams["checkpointer"],
    )
    brain.tokenizer = tokenizer
    # The same dropout for every loss and tokenizer, whose initialisation draws
    # random numbers.
    sb.utils.seed.seed_everything(hparams["seed"], verbose=False)
    brain.fit(
        hparams["epoch_counter"],
        train_data,
        valid_data,
        train_loader_kwargs=batch_options(hparams, train_data, sb.Stage.TRAIN),
        valid_loader_kwargs=batch_options(hparams, valid_data, sb.Stage.VALID),
    )
    for name, dataset in test_data.items():
        brain.test_name = name
        brain.evaluate(
            dataset,
            min_key="WER",
            test_loader_kwargs=dict(hparams["test_dataloader_opts"]),
        )


if __name__ == "__main__":
    main(sys.argv[1:])
