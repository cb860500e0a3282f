#!/usr/bin/env python3
"""Speaker verification with the cosine of two embeddings: EER and minDCF.

    python speaker_verification_cosine.py hparams/verification_revnet.yaml \\
        --data_folder=/path/to/VoxCeleb --pretrain_path=results/.../save

Each utterance of the list of trials is embedded once.

Authors
 * The sb_memeff authors 2026
"""

import json
import sys
from pathlib import Path

import speechbrain as sb
import torch
import torch.nn.functional as F
from hyperpyyaml import load_hyperpyyaml
from speechbrain.dataio import audio_io
from speechbrain.dataio.dataio import load_data_csv
from speechbrain.utils.logger import get_logger
from tqdm import tqdm
from voxceleb_prepare import (
    check_prepared,
    fetch_list,
    prepare_voxceleb,
    read_trials,
    wav_folders,
)

from sb_memeff.dataio.preparation import open_atomic
from sb_memeff.utils.atomic_checkpoints import best_checkpoint

logger = get_logger(__name__)

SCORE_NORMS = ("z-norm", "t-norm", "s-norm")
# Rows of a matrix product computed at a time; bounds the memory.
ROWS = 4096
# Prior of a target trial in minDCF, SpeechBrain's default.
P_TARGET = 0.01


def find_weights(pretrain_path):
    """Finds the weights of the embedding model.

    Arguments
    ---------
    pretrain_path : str or None
        Folder with embedding_model.ckpt, or the ``save`` folder of a
        training, whose checkpoint with the lowest ErrorRate is used.

    Returns
    -------
    Path or None
        The file; None for an untrained network.

    Raises
    ------
    FileNotFoundError
        If there are no weights.
    """
    if pretrain_path is None:
        return None
    path = Path(pretrain_path) / "embedding_model.ckpt"
    if path.is_file():
        return path
    checkpoint = best_checkpoint(pretrain_path)
    if checkpoint is None:
        raise FileNotFoundError(
            f"There is neither an embedding_model.ckpt nor a checkpoint of a "
            f"finished epoch in {pretrain_path}: set pretrain_path to the save "
            f"folder of a training, or to null for an untrained network."
        )
    return checkpoint.path / "embedding_model.ckpt"


def load_weights(model, path):
    """Loads the weights, or warns that there are none.

    Arguments
    ---------
    model : torch.nn.Module
        The embedding model.
    path : Path or None
        Its state_dict.

    Raises
    ------
    ValueError
        If they are of another network.
    """
    if path is None:
        logger.warning(
            "pretrain_path is null: THE NETWORK IS UNTRAINED and the scores "
            "are meaningless."
        )
        return
    weights = torch.load(path, map_location="cpu", weights_only=True)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(
            f"{path} does not fit the network of this yaml file: set preset or "
            f"channels, the other sizes and n_mels as in training."
        ) from error
    logger.info(f"Weights from {path}")


def make_loader(items, batch_size, num_workers):
    """Makes a loader of whole utterances, with similar lengths in a batch.

    Arguments
    ---------
    items : dict
        Rows of the csv files by ID.
    batch_size : int
        Utterances in a batch.
    num_workers : int
        Worker processes.

    Returns
    -------
    DataLoader
        Its batches have id and sig.
    """

    @sb.utils.data_pipeline.takes("wav", "start", "stop")
    @sb.utils.data_pipeline.provides("sig")
    def audio_pipeline(wav, start, stop):
        start, stop = int(start), int(stop)
        sig, _ = audio_io.load(wav, frame_offset=start, num_frames=stop - start)
        return sig.mean(0)

    dataset = sb.dataio.dataset.DynamicItemDataset(
        items, [audio_pipeline], ["id", "sig"]
    ).filtered_sorted(sort_key="duration", reverse=True)
    return sb.dataio.dataloader.make_dataloader(
        dataset, batch_size=batch_size, num_workers=num_workers
    )


@torch.inference_mode()
def embed(params, items, device):
    """Computes embeddings of norm 1.

    Arguments
    ---------
    params : dict
        The loaded yaml file.
    items : dict
        Rows of csv files by ID.
    device : str
        Where to compute.

    Returns
    -------
    dict
        Maps each ID to its row.
    torch.Tensor
        Embeddings [utterances, dimensions], on the CPU.
    """
    ids, embeddings = [], []
    loader = make_loader(items, params["batch_size"], params["num_workers"])
    for batch in tqdm(loader, "Embeddings", dynamic_ncols=True):
        wavs, lens = batch.sig
        wavs, lens = wavs.to(device), lens.to(device)
        feats = params["compute_features"](wavs)
        feats = params["mean_var_norm"](feats, lens)
        out = params["embedding_model"](feats, lens).reshape(len(wavs), -1)
        ids += batch.id
        embeddings.append(F.normalize(out.float(), dim=1).cpu())
    return {name: n for n, name in enumerate(ids)}, torch.cat(embeddings)


def cohort_statistics(embeddings, cohort, cohort_size):
    """Mean and deviation of each embedding's scores against a cohort.

    Arguments
    ---------
    embeddings : torch.Tensor
        [utterances, dimensions], of norm 1.
    cohort : torch.Tensor
        [impostors, dimensions], of norm 1.
    cohort_size : int or None
        Number of highest scores to use; None for all.

    Returns
    -------
    tuple of torch.Tensor
        Mean and standard deviation, [utterances] each.
    """
    means, deviations = [], []
    for rows in embeddings.split(ROWS):
        scores = rows @ cohort.T
        if cohort_size is not None and cohort_size < len(cohort):
            scores = scores.topk(cohort_size, dim=1).values
        means.append(scores.mean(1))
        deviations.append(scores.std(1))
    return torch.cat(means), torch.cat(deviations)


def rows_of(rows, files):
    """The rows of the embeddings of files.

    Arguments
    ---------
    rows : dict
        Maps each ID to its row.
    files : list of str
        Files of the list of trials. In csv files that SpeechBrain has prepared
        an ID lacks the file's suffix.

    Returns
    -------
    torch.Tensor
        [files].
    """
    return torch.tensor(
        [
            rows[name if name in rows else str(Path(name).with_suffix(""))]
            for name in files
        ]
    )


def score_trials(embeddings, enrol, test, score_norm=None, statistics=None):
    """Computes the scores of all trials.

    Arguments
    ---------
    embeddings : torch.Tensor
        [utterances, dimensions], of norm 1.
    enrol : torch.Tensor
        Row of each trial's first utterance.
    test : torch.Tensor
        Row of its second.
    score_norm : str, optional
        z-norm, t-norm or s-norm.
    statistics : tuple of torch.Tensor, optional
        Result of ``cohort_statistics``, for score_norm.

    Returns
    -------
    torch.Tensor
        [trials].
    """
    scores = torch.cat(
        [
            (embeddings[a] * embeddings[b]).sum(1)
            for a, b in zip(enrol.split(ROWS), test.split(ROWS))
        ]
    )
    if score_norm is None:
        return scores
    mean, deviation = statistics
    z = (scores - mean[enrol]) / deviation[enrol]
    t = (scores - mean[test]) / deviation[test]
    return {"z-norm": z, "t-norm": t, "s-norm": (z + t) / 2}[score_norm]


def error_rates(positive, negative):
    """EER and minDCF as SpeechBrain defines them.

    SpeechBrain's functions compare every score with every threshold: the
    580 818 trials of VoxCeleb1-E would take days and hundreds of GB. Sorting
    gives the same result. If miss and false alarm are equally close at two
    thresholds, the lower threshold is used; in SpeechBrain the rounding of
    float32 decides.

    Arguments
    ---------
    positive : torch.Tensor
        Scores of trials with one speaker.
    negative : torch.Tensor
        Scores of trials with two speakers.

    Returns
    -------
    tuple of float
        EER and minDCF (c_miss=1, c_fa=1, p_target=0.01).

    Raises
    ------
    ValueError
        If there are no trials of one kind, or scores that are not finite.

    Example
    -------
    >>> error_rates(torch.tensor([0.6, 0.7, 0.1]), torch.tensor([0.2, 0.3]))
    (0.4166..., 0.0033...)
    """
    if not len(positive) or not len(negative):
        raise ValueError(
            f"EER needs trials of both kinds, got {len(positive)} trials with "
            f"one speaker and {len(negative)} with two."
        )
    scores = torch.cat([positive, negative])
    broken = int((~scores.isfinite()).sum())
    if broken:
        raise ValueError(
            f"{broken} of {len(scores)} scores are not finite: the embeddings "
            f"or the statistics of the cohort contain NaN. Did the "
            f"training diverge, or is cohort_size 1?"
        )
    positive, negative = positive.sort().values, negative.sort().values
    # The rates change only at scores.
    thresholds = scores.unique()
    missed = torch.searchsorted(positive, thresholds, right=True)
    accepted = len(negative) - torch.searchsorted(
        negative, thresholds, right=True
    )
    # In integers, so that rounding does not decide between two thresholds.
    gap = (accepted * len(positive) - missed * len(negative)).abs()
    best = (gap == gap.min()).nonzero()[0]
    miss = missed.double() / len(positive)
    alarm = accepted.double() / len(negative)
    cost = miss * P_TARGET + alarm * (1 - P_TARGET)
    return float((alarm + miss)[best] / 2), float(cost.min())


def check_params(params):
    """Checks settings and files before anything is computed or written.

    Arguments
    ---------
    params : dict
        The loaded yaml file.

    Returns
    -------
    list of tuple
        The trials.
    Path or None
        The weights.

    Raises
    ------
    FileNotFoundError
        If the corpus, the list or the weights are missing.
    ValueError
        If a setting or the list is invalid.
    """
    norm = params["score_norm"]
    if norm is not None and norm not in SCORE_NORMS:
        raise ValueError(
            f"score_norm must be {', '.join(SCORE_NORMS)} or null, got "
            f"{norm!r}."
        )
    if params["skip_prep"]:
        keys = ["enrol_data", "test_data"]
        check_prepared(params, keys + ["train_data"] * (norm is not None))
    else:
        wav_folders(params["data_folder"])
    path = fetch_list(params["verification_file"], params["save_folder"])
    trials = read_trials(path)
    if len({label for label, _, _ in trials}) < 2:
        raise ValueError(
            f"All trials of {path} have the label {trials[0][0]}, but EER needs "
            f"trials of both kinds."
        )
    return trials, find_weights(params["pretrain_path"])


def prepare_data(params):
    """Writes the csv files of the trials and, if needed, of the cohort."""
    common = {
        "data_folder": params["data_folder"],
        "save_folder": params["save_folder"],
        "verification_file": params["verification_file"],
        "split_ratio": params["split_ratio"],
        "seg_dur": params["sentence_len"],
        "amp_th": params["amp_th"],
        "sample_rate": params["sample_rate"],
        "seed": params["seed"],
        "skip_prep": params["skip_prep"],
    }
    splits = ["enrol", "test"]
    if params["score_norm"] is not None:
        splits += ["train", "dev"]
    prepare_voxceleb(splits=splits, **common)


def cohort_items(params):
    """The first n_train_snts segments of a seeded shuffle of train.csv."""
    rows = load_data_csv(params["train_data"])
    order = torch.randperm(
        len(rows), generator=torch.Generator().manual_seed(params["seed"])
    )
    names = list(rows)
    chosen = [names[n] for n in order[: params["n_train_snts"]]]
    return {name: rows[name] for name in chosen}


def verify(params, trials, weights, device):
    """Scores the trials and writes scores.txt and results.json.

    Arguments
    ---------
    params : dict
        The loaded yaml file.
    trials : list of tuple
        Label, first and second utterance.
    weights : Path or None
        State of the embedding model.
    device : str
        Where to compute.

    Returns
    -------
    dict
        Contents of results.json.
    """
    load_weights(params["embedding_model"], weights)
    for key in ("compute_features", "mean_var_norm", "embedding_model"):
        params[key].to(device).eval()
    replacements = {"data_root": params["data_folder"]}
    items = load_data_csv(params["enrol_data"], replacements)
    items.update(load_data_csv(params["test_data"], replacements))
    rows, embeddings = embed(params, items, device)
    statistics = None
    if params["score_norm"] is not None:
        _, cohort = embed(params, cohort_items(params), device)
        statistics = cohort_statistics(
            embeddings, cohort, params["cohort_size"]
        )
    labels = torch.tensor([label for label, _, _ in trials])
    scores = score_trials(
        embeddings,
        rows_of(rows, [enrol for _, enrol, _ in trials]),
        rows_of(rows, [test for _, _, test in trials]),
        params["score_norm"],
        statistics,
    )
    output_folder = Path(params["output_folder"])
    with open_atomic(output_folder / "scores.txt") as f:
        for (label, enrol, test), score in zip(trials, scores.tolist()):
            f.write(f"{enrol} {test} {label} {score:.6f}\n")
    eer, min_dcf = error_rates(scores[labels == 1], scores[labels == 0])
    results = {
        "eer": round(100 * eer, 4),
        # Divided by the cost of rejecting everything, as papers state it.
        "min_dcf": round(min_dcf / P_TARGET, 4),
        "trials": len(trials),
        "utterances": len(items),
        "score_norm": params["score_norm"],
        "model": None if weights is None else str(weights),
        "verification_file": str(params["verification_file"]),
    }
    with open_atomic(output_folder / "results.json") as f:
        json.dump(results, f, indent=1)
    return results


def main(arguments):
    """Verifies.

    Arguments
    ---------
    arguments : list of str
        The command line.
    """
    params_file, run_opts, overrides = sb.parse_arguments(arguments)
    with open(params_file, encoding="utf-8") as f:
        params = load_hyperpyyaml(f, overrides)
    trials, weights = check_params(params)
    prepare_data(params)
    sb.core.create_experiment_directory(
        experiment_directory=params["output_folder"],
        hyperparams_to_save=params_file,
        overrides=overrides,
    )
    device = run_opts["device"] or sb.utils.distributed.infer_device()
    results = verify(params, trials, weights, device)
    logger.info(
        f"EER(%)={results['eer']:.2f} minDCF={results['min_dcf']:.4f} "
        f"({results['trials']} trials)"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
