#!/usr/bin/env python3
"""Speaker verification: scores, calibration and error rates.

    python speaker_verification_cosine.py hparams/verification_revnet.yaml \\
        --data_folder=/path/to/VoxCeleb --pretrain_path=results/.../save

Each utterance is embedded once. Embeddings are kept, so that a killed run
continues, and other lists of trials need only the utterances that are new. With
torchrun each process computes a share of them, and the first one the scores.

Authors
 * The sb_memeff authors 2026
"""

import csv
import json
import sys
from pathlib import Path

import speechbrain as sb
import torch
from hyperpyyaml import load_hyperpyyaml
from speechbrain.dataio.dataio import load_data_csv
from speechbrain.utils.distributed import if_main_process, run_on_main
from speechbrain.utils.logger import get_logger
from tqdm import tqdm
from voxceleb_prepare import (
    check_keys,
    check_prepared,
    fetch_list,
    prepare_voxceleb,
    read_trials,
    wav_folders,
)

from sb_memeff.dataio.audio import check_csv, load_audio
from sb_memeff.dataio.preparation import open_atomic
from sb_memeff.utils.atomic_checkpoints import trained_weights
from sb_memeff.utils.launch import init_processes
from sb_memeff.verification.calibration import (
    Calibration,
    calibration_trials,
    check_scikit_learn,
    quality_measures,
)
from sb_memeff.verification.det import check_picture, plot_det
from sb_memeff.verification.embeddings import EmbeddingStore, fingerprint
from sb_memeff.verification.errors import evaluate
from sb_memeff.verification.scoring import (
    SCORE_NORMS,
    CohortStatistics,
    cosine_scores,
    normalize_scores,
    speaker_means,
)

logger = get_logger(__name__)

# Keys that the script uses.
KEYS = """
    batch_size calibration_trials cohort_size compute_features data_folder
    det_curve embedding_model embeddings_folder enrol_data mean_var_norm
    n_train_snts num_workers output_folder pretrain_path sample_rate
    save_folder score_norm seed skip_prep test_data train_data
    verification_file
""".split()
# From waveform to embedding.
MODULES = ("compute_features", "mean_var_norm", "embedding_model")


def find_weights(pretrain_path):
    """Finds the weights of the embedding model.

    Arguments
    ---------
    pretrain_path : str or None
        Folder with embedding_model.ckpt, or the ``save`` folder of a
        training. Without a mean of checkpoints there, the checkpoint with the
        lowest ErrorRate is used.

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
    folder = trained_weights(pretrain_path)
    if folder is None:
        raise FileNotFoundError(
            f"There is neither an embedding_model.ckpt nor a checkpoint of a "
            f"finished epoch in {pretrain_path}: set pretrain_path to the save "
            f"folder of a training, or to null for an untrained network."
        )
    return folder / "embedding_model.ckpt"


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


def make_loader(items, sample_rate, batch_size, num_workers):
    """Makes a loader of whole utterances, with similar lengths in a batch.

    Arguments
    ---------
    items : dict
        Rows of the csv files by ID.
    sample_rate : int
        Of the files, in Hz.
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
        return load_audio(wav, sample_rate, int(start), int(stop))

    dataset = sb.dataio.dataset.DynamicItemDataset(
        items, [audio_pipeline], ["id", "sig"]
    ).filtered_sorted(sort_key="duration", reverse=True)
    return sb.dataio.dataloader.make_dataloader(
        dataset, batch_size=batch_size, num_workers=num_workers
    )


@torch.inference_mode()
def compute_embeddings(params, items, device):
    """Computes embeddings, with a progress bar.

    Arguments
    ---------
    params : dict
        The loaded yaml file.
    items : dict
        Rows of csv files by ID.
    device : str
        Where to compute.

    Yields
    ------
    list of str
        IDs of a batch.
    torch.Tensor
        Their embeddings [batch, dimensions].
    """
    loader = make_loader(
        items,
        params["sample_rate"],
        params["batch_size"],
        params["num_workers"],
    )
    bar = {"dynamic_ncols": True, "disable": not if_main_process()}
    for batch in tqdm(loader, "Embeddings", **bar):
        wavs, lens = batch.sig
        wavs, lens = wavs.to(device), lens.to(device)
        feats = params["compute_features"](wavs)
        feats = params["mean_var_norm"](feats, lens)
        embeddings = params["embedding_model"](feats, lens)
        yield batch.id, embeddings.reshape(len(wavs), -1)


def embed(params, items, device):
    """Reads the embeddings of utterances, and computes those that are missing.

    Arguments
    ---------
    params : dict
        The loaded yaml file.
    items : list of dict
        Rows of csv files.
    device : str
        Where to compute.

    Returns
    -------
    torch.Tensor
        Embeddings [items, dimensions], on the CPU.
    """
    modules = [params[key] for key in MODULES]
    store = EmbeddingStore(
        Path(params["embeddings_folder"]) / fingerprint(modules)
    )
    # By file, so that other lists of trials and cohorts find it.
    names = [f"{row['wav']}:{row['start']}:{row['stop']}" for row in items]
    by_name = dict(zip(names, items))
    # As in make_loader: batches are the same for any number of processes.
    by_length = sorted(
        by_name, key=lambda n: float(by_name[n]["duration"]), reverse=True
    )
    embeddings = store.get(
        by_length,
        lambda missing: compute_embeddings(
            params, {name: by_name[name] for name in missing}, device
        ),
        params["batch_size"],
    )
    rows = {name: row for row, name in enumerate(by_length)}
    return embeddings[[rows[name] for name in names]]


def rows_of(items, files):
    """The rows of the embeddings of files.

    Arguments
    ---------
    items : dict
        Rows of the csv files by ID, in the order of the embeddings.
    files : list of str
        Files of the list of trials. In csv files that SpeechBrain has prepared
        an ID lacks the file's suffix.

    Returns
    -------
    torch.Tensor
        [files].

    Raises
    ------
    ValueError
        If the csv files lack a file.
    """
    rows = {name: row for row, name in enumerate(items)}
    found = []
    for name in files:
        row = rows.get(name, rows.get(str(Path(name).with_suffix(""))))
        if row is None:
            raise ValueError(
                f"enrol_data and test_data lack {name} of the list of trials: "
                f"run without skip_prep to write them for this list."
            )
        found.append(row)
    return torch.tensor(found)


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
    list of dict
        The training utterances; none without score_norm.

    Raises
    ------
    FileNotFoundError
        If the corpus, a list or the weights are missing.
    ImportError
        If a setting needs a package that is missing.
    ValueError
        If a setting or a list is invalid.
    """
    norm = params["score_norm"]
    if norm is not None and norm not in SCORE_NORMS:
        raise ValueError(
            f"score_norm must be {', '.join(SCORE_NORMS)} or null, got "
            f"{norm!r}."
        )
    if params["calibration_trials"]:
        check_scikit_learn()
        if norm is None:
            raise ValueError(
                f"calibration_trials={params['calibration_trials']} calibrates "
                f"normalized scores: set score_norm to s-norm, or "
                f"calibration_trials to 0."
            )
    if params["det_curve"] is not None:
        check_picture(params["det_curve"])
    if params["skip_prep"]:
        check_prepared(params, ["enrol_data", "test_data"])
    else:
        wav_folders(params["data_folder"])
    path = fetch_list(params["verification_file"], params["save_folder"])
    trials = read_trials(path)
    if len({label for label, _, _ in trials}) < 2:
        raise ValueError(
            f"All trials of {path} have the label {trials[0][0]}, but EER needs "
            f"trials of both kinds."
        )
    training = []
    if norm is not None:
        tested = {name.split("/")[0] for trial in trials for name in trial[1:]}
        training = training_utterances(params, tested)
    return trials, find_weights(params["pretrain_path"]), training


def training_utterances(params, tested):
    """The first n_train_snts utterances of a seeded shuffle of train_data.

    Arguments
    ---------
    params : dict
        The loaded yaml file.
    tested : set of str
        Speakers of the trials, who are left out.

    Returns
    -------
    list of dict
        Rows like those of train.csv, but each with a whole utterance.

    Raises
    ------
    FileNotFoundError
        If there is no train_data.
    ValueError
        If there are too few speakers for a cohort.
    """
    path = Path(params["train_data"])
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no {path}: score_norm needs the training speakers, so "
            f"set train_data to the train.csv in the save folder of the "
            f"training, or score_norm to null."
        )
    # Of a million utterances and their segments, a dict for each row would take
    # gigabytes.
    whole = {}
    with open(path, newline="", encoding="utf-8") as f:
        for row in csv.DictReader(f, skipinitialspace=True):
            if row["spk_id"] not in tested:
                speaker = sys.intern(row["spk_id"])
                whole[row["wav"]] = float(row["duration"]), speaker
    files = list(whole)
    order = torch.randperm(
        len(files), generator=torch.Generator().manual_seed(params["seed"])
    )
    chosen = []
    for number in order[: params["n_train_snts"]].tolist():
        duration, speaker = whole[files[number]]
        wav = files[number].replace("$data_root", str(params["data_folder"]))
        chosen.append(
            {
                "wav": wav,
                "start": "0",
                "stop": str(round(duration * params["sample_rate"])),
                "duration": duration,
                "spk_id": speaker,
            }
        )
    speakers = {row["spk_id"] for row in chosen}
    size = params["cohort_size"]
    # Of one score there is no deviation, and in calibration a speaker is not
    # an impostor to itself.
    if len(speakers) < 3 or (size is not None and size < 2):
        raise ValueError(
            f"score_norm needs a cohort of three speakers and cohort_size of "
            f"two, got cohort_size={size} and {len(speakers)} speakers of "
            f"{path} that do not occur in the trials."
        )
    return chosen


class Cohort:
    """The training speakers: impostors, and trials for the calibration.

    Arguments
    ---------
    params : dict
        The loaded yaml file.
    utterances : list of dict
        Result of ``training_utterances``.
    device : str
        Where to compute.
    """

    def __init__(self, params, utterances, device):
        self.params = params
        self.utterances = utterances
        self.embeddings = embed(params, utterances, device)
        names = sorted({row["spk_id"] for row in utterances})
        numbers = {name: number for number, name in enumerate(names)}
        self.speakers = torch.tensor(
            [numbers[row["spk_id"]] for row in utterances]
        )
        self.means = speaker_means(self.embeddings, self.speakers)

    def measures(self, embeddings, items, enrol, test, own=None):
        """Normalized scores of trials, and their quality measures.

        Arguments
        ---------
        embeddings : torch.Tensor
            [utterances, dimensions].
        items : list of dict
            Their rows of the csv files.
        enrol : torch.Tensor
            Row of each trial's first utterance.
        test : torch.Tensor
            Row of its second.
        own : torch.Tensor, optional
            Speaker of each utterance, if they are of this cohort.

        Returns
        -------
        torch.Tensor
            The scores [trials].
        torch.Tensor
            The measures [trials, measures].
        """
        statistics = CohortStatistics.of(
            embeddings, self.means, self.params["cohort_size"], own
        )
        scores = normalize_scores(
            cosine_scores(embeddings, enrol, test),
            enrol,
            test,
            statistics,
            self.params["score_norm"],
        )
        return scores, quality_measures(
            scores,
            enrol,
            test,
            torch.tensor([row["duration"] for row in items]),
            embeddings.norm(dim=1),
            statistics.mean,
        )

    def calibration(self):
        """Learns the calibration from trials of the training speakers.

        Returns
        -------
        Calibration
            Maps measures to scores.
        """
        labels, enrol, test = calibration_trials(
            self.speakers,
            self.params["calibration_trials"],
            self.params["seed"],
        )
        _, measures = self.measures(
            self.embeddings, self.utterances, enrol, test, self.speakers
        )
        return Calibration(measures, labels)


def prepare_data(params):
    """Writes the csv files of the trials."""
    prepare_voxceleb(
        data_folder=params["data_folder"],
        save_folder=params["save_folder"],
        verification_file=params["verification_file"],
        splits=["enrol", "test"],
        sample_rate=params["sample_rate"],
        skip_prep=params["skip_prep"],
    )


def verify(params, trials, weights, training, device):
    """Scores the trials and writes scores.txt and results.json.

    Arguments
    ---------
    params : dict
        The loaded yaml file.
    trials : list of tuple
        Label, first and second utterance.
    weights : Path or None
        State of the embedding model.
    training : list of dict
        Result of ``training_utterances``; only used with score_norm.
    device : str
        Where to compute.

    Returns
    -------
    dict or None
        Contents of results.json; None on other processes than the first.
    """
    load_weights(params["embedding_model"], weights)
    for key in MODULES:
        params[key].to(device).eval()
    replacements = {"data_root": params["data_folder"]}
    for key in ("enrol_data", "test_data"):
        check_csv(params[key], ["wav"], ["duration", "start", "stop"])
    items = load_data_csv(params["enrol_data"], replacements)
    items.update(load_data_csv(params["test_data"], replacements))
    labels, enrol, test = zip(*trials)
    labels = torch.tensor(labels)
    enrol, test = rows_of(items, enrol), rows_of(items, test)
    embeddings = embed(params, items.values(), device)
    norm = params["score_norm"]
    cohort = None if norm is None else Cohort(params, training, device)
    if not if_main_process():
        return None
    # Each stage replaces the scores of the one before.
    stages = {"cosine": cosine_scores(embeddings, enrol, test)}
    if cohort is not None:
        stages[norm], measures = cohort.measures(
            embeddings, items.values(), enrol, test
        )
        if params["calibration_trials"]:
            stages["qmf"] = cohort.calibration()(measures)
    figures = {name: evaluate(s, labels) for name, s in stages.items()}
    last = list(stages)[-1]
    output_folder = Path(params["output_folder"])
    with open_atomic(output_folder / "scores.txt") as f:
        for trial, score in zip(trials, stages[last].tolist()):
            f.write(f"{trial[1]} {trial[2]} {trial[0]} {score:.6f}\n")
    results = {
        **figures[last],
        "trials": len(trials),
        "utterances": len(items),
        "score_norm": norm,
        "model": None if weights is None else str(weights),
        "verification_file": str(params["verification_file"]),
        "stages": figures,
    }
    with open_atomic(output_folder / "results.json") as f:
        json.dump(results, f, indent=1)
    if params["det_curve"] is not None:
        plot_det(stages, labels, params["det_curve"])
    return results


def main(arguments):
    """Verifies.

    Arguments
    ---------
    arguments : list of str
        The command line.
    """
    params_file, run_opts, overrides = sb.parse_arguments(arguments)
    init_processes(run_opts)
    with open(params_file, encoding="utf-8") as f:
        params = load_hyperpyyaml(f, overrides)
    check_keys(params, KEYS, params_file)
    trials, weights, training = run_on_main(check_params, [params])
    run_on_main(prepare_data, [params])
    sb.core.create_experiment_directory(
        experiment_directory=params["output_folder"],
        hyperparams_to_save=params_file,
        overrides=overrides,
    )
    device = run_opts["device"] or sb.utils.distributed.infer_device()
    results = verify(params, trials, weights, training, device)
    if results is None:
        return
    for stage, figures in results["stages"].items():
        logger.info(
            f"{stage}: EER(%)={figures['eer']:.2f} "
            f"minDCF={figures['min_dcf']:.4f} Cllr={figures['cllr']:.3f} "
            f"({results['trials']} trials)"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
