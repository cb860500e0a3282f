"""Data preparation for VoxCeleb: csv files for training and verification.

The corpus has the layout of the published VoxCeleb:
``wav/<speaker>/<session>/<utterance>.wav`` (or .flac). VoxCeleb1 and VoxCeleb2
can be merged in one such folder, or given as a list: ``/data/vox1,/data/vox2``.

Nothing is downloaded unless a URL is given. Missing files are reported before
anything is written.

Authors
 * The sb_memeff authors 2026
"""

import hashlib
import json
import random
from collections import Counter
from pathlib import Path

import soundfile
from speechbrain.utils.data_utils import download_file
from speechbrain.utils.logger import get_logger
from tqdm import tqdm

from sb_memeff.dataio.preparation import (
    DamagedFile,
    Prepared,
    atomic_path,
    read_header,
    write_csv,
)

logger = get_logger(__name__)

FIELDS = ["ID", "duration", "wav", "start", "stop", "spk_id"]
OPTIONS_FILE = "voxceleb_prepare.json"
SUFFIXES = (".wav", ".flac")
LEFT_OUT = "left_out.csv"
# Where RIRS_NOISES has noises and impulse responses.
SUBFOLDERS = {
    "data_folder_noise": "pointsource_noises",
    "data_folder_rir": "simulated_rirs",
}
# AddNoise loads whole files: longer ones are cut into pieces of PIECE seconds.
MAX_NOISE = 20
PIECE = 10
# Shorter files are too short to identify a speaker.
MIN_SECONDS = 0.5


def prepare_voxceleb(
    data_folder,
    save_folder,
    verification_file=None,
    splits=("train", "dev"),
    split_ratio=(90, 10),
    seg_dur=3.0,
    amp_th=5e-4,
    sample_rate=16000,
    seed=1986,
    skip_prep=False,
):
    """Writes train.csv and dev.csv, or enrol.csv and test.csv, or all four.

    Utterances are cut into segments of ``seg_dur`` seconds; the remainder at
    the end is dropped. An utterance shorter than ``seg_dur`` is one segment
    (batches are padded and the networks mask the padding); shorter than half
    a second, it is dropped. Segments with a mean amplitude below ``amp_th``
    are dropped as silence, and files that cannot be read. left_out.csv lists
    them all.

    The speakers of ``verification_file`` are excluded from train.csv and
    dev.csv. Utterances are divided at random between the two, but each
    speaker keeps at least one in train.csv.

    Arguments
    ---------
    data_folder : str
        Folder that contains ``wav``, or several separated by commas.
    save_folder : str
        Folder for the csv files.
    verification_file : str, optional
        List of trials: a path or a URL.
    splits : list of str
        Any of train, dev, enrol and test.
    split_ratio : list of int
        Ratio of train to dev.
    seg_dur : float
        Seconds in a segment.
    amp_th : float
        Segments with a lower mean amplitude are dropped. With 0 only the
        files' headers are read, which is much faster.
    sample_rate : int
        Required sample rate of the files.
    seed : int
        Seed of the division into train and dev.
    skip_prep : bool
        If True, do nothing.

    Raises
    ------
    FileNotFoundError
        If the corpus, the list, or a file of the list is missing.
    ValueError
        If the corpus or the list is invalid.

    Example
    -------
    >>> prepare_voxceleb(
    ...     "/data/vox1", "save", "veri_test2.txt"
    ... )  # doctest: +SKIP
    """
    if skip_prep:
        return
    save_folder = Path(save_folder)
    folders = wav_folders(data_folder)
    trials = []
    if verification_file is not None:
        trials = read_trials(fetch_list(verification_file, save_folder))
    options = {
        "folders": [str(folder) for folder in folders],
        "trials": hashlib.sha256(json.dumps(trials).encode()).hexdigest(),
        "splits": sorted(splits),
        "split_ratio": list(split_ratio),
        "seg_dur": seg_dur,
        "amp_th": amp_th,
        "seed": seed,
    }
    files = {split: save_folder / f"{split}.csv" for split in splits}
    prepared = Prepared(save_folder / OPTIONS_FILE, options, files.values())
    if prepared.done():
        logger.info(f"The csv files in {save_folder} are up to date.")
        return

    rows, left_out = {}, []
    if {"train", "dev"} & set(splits):
        held_out = {name.split("/")[0] for t in trials for name in t[1:]}
        utterances = find_utterances(folders, held_out)
        for split, part in zip(
            ("train", "dev"), divide(utterances, split_ratio, seed)
        ):
            if split in splits:
                rows[split] = list_segments(
                    part, seg_dur, amp_th, sample_rate, split, left_out
                )
    for column, split in enumerate(("enrol", "test"), start=1):
        if split in splits:
            names = sorted({trial[column] for trial in trials})
            rows[split] = list_whole(names, folders, sample_rate, split)

    with prepared:
        for split, lines in rows.items():
            write_csv(files[split], FIELDS, lines)
        write_csv(save_folder / LEFT_OUT, ["wav", "reason"], left_out)
    if left_out:
        # A warning is shown even before the recipe has set up its logging.
        reasons = Counter(reason for _, reason in left_out)
        logger.warning(
            f"{save_folder / LEFT_OUT} lists what is left out: "
            + ", ".join(f"{n} {reason}" for reason, n in reasons.items())
        )


def wav_folders(data_folder):
    """The ``wav`` folders of the corpora.

    Arguments
    ---------
    data_folder : str
        One folder, or several separated by commas.

    Returns
    -------
    list of Path
        Absolute paths.

    Raises
    ------
    FileNotFoundError
        If one does not exist.
    """
    folders = []
    for folder in str(data_folder).split(","):
        folder = Path(folder.strip()).expanduser().absolute()
        if not (folder / "wav").is_dir():
            raise FileNotFoundError(
                f"There is no folder {folder / 'wav'}: set data_folder to the "
                f"folder that contains VoxCeleb as "
                f"wav/<speaker>/<session>/<utterance>.wav."
            )
        folders.append(folder / "wav")
    return folders


def check_keys(hparams, keys, path):
    """Checks that a yaml file has the keys that a script uses.

    Arguments
    ---------
    hparams : dict
        The loaded yaml file.
    keys : list of str
        The keys.
    path : str
        The yaml file.

    Raises
    ------
    ValueError
        If keys are missing.
    """
    missing = [key for key in keys if key not in hparams]
    if missing:
        raise ValueError(
            f"{path} lacks {', '.join(missing)}: copy them from the yaml files "
            f"in the recipe's folder hparams."
        )


def check_prepared(hparams, keys):
    """Checks that the csv files exist, which skip_prep does not write.

    Arguments
    ---------
    hparams : dict
        The loaded yaml file.
    keys : list of str
        Its keys of csv files.

    Raises
    ------
    FileNotFoundError
        If one does not exist.
    """
    for key in keys:
        if not Path(hparams[key]).is_file():
            raise FileNotFoundError(
                f"There is no {hparams[key]}: with skip_prep the csv file "
                f"{key} must exist; run without skip_prep to create it."
            )


def fetch_list(verification_file, save_folder):
    """Path of the list of trials, downloaded once if it is a URL.

    Arguments
    ---------
    verification_file : str
        Path or URL.
    save_folder : Path
        Folder for a downloaded list.

    Returns
    -------
    Path
        The list.

    Raises
    ------
    FileNotFoundError
        If it does not exist.
    """
    if str(verification_file).startswith(("http://", "https://")):
        path = Path(save_folder) / str(verification_file).rsplit("/", 1)[-1]
        if not path.is_file():
            with atomic_path(path) as partial:
                download_file(verification_file, partial, replace_existing=True)
        return path
    path = Path(verification_file).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no list of trials {path}: set verification_file to a "
            f"local list or to its URL (the yaml file gives the official ones), "
            f"or to null to exclude no speaker from training."
        )
    return path


def read_trials(path):
    """Reads a list of trials, "1 a.wav b.wav" where a and b are one speaker.

    Arguments
    ---------
    path : str
        The list.

    Returns
    -------
    list of tuple
        Label (0 or 1), enrolment file, test file.

    Raises
    ------
    ValueError
        If a line has another form, or the list is empty.
    """
    trials = []
    with open(path, encoding="utf-8") as f:
        for number, line in enumerate(f, start=1):
            fields = line.split()
            if not fields:
                continue
            if len(fields) != 3 or fields[0] not in ("0", "1"):
                raise ValueError(
                    f"Line {number} of {path} is not a trial: {line.strip()!r} "
                    f"should be '1 a.wav b.wav' or '0 a.wav b.wav' with paths "
                    f"relative to the corpus's wav folder."
                )
            trials.append((int(fields[0]), fields[1], fields[2]))
    if not trials:
        raise ValueError(f"The list of trials {path} is empty.")
    return trials


def find_utterances(folders, held_out):
    """All utterances of the speakers that are not held out.

    Arguments
    ---------
    folders : list of Path
        The ``wav`` folders.
    held_out : set of str
        Speakers to exclude.

    Returns
    -------
    list of tuple
        Speaker, ID and path of each utterance, sorted by ID.

    Raises
    ------
    ValueError
        If nothing is left.
    """
    found, excluded = [], 0
    for folder in folders:
        speakers = (d for d in folder.iterdir() if d.is_dir())
        for speaker in tqdm(sorted(speakers), f"Files of {folder}"):
            label = speaker.name
            if label in held_out:
                excluded += 1
                continue
            for path in speaker.glob("*/*"):
                if path.suffix in SUFFIXES:
                    name = f"{label}--{path.parent.name}--{path.stem}"
                    # A million Path objects would take a GB.
                    found.append((label, name, str(path)))
    if found:
        return sorted(found)
    for folder in folders:
        if next(folder.glob("*/*/*.m4a"), None) is not None:
            raise ValueError(
                f"{folder} contains .m4a files and no .wav: convert them first "
                f"with python voxceleb_convert.py {folder} {folder.parent}."
            )
    if excluded:
        raise ValueError(
            f"All {excluded} speakers below {folders[0]} occur in the list of "
            f"trials, so none is left for training: add other speakers or "
            f"set another verification_file."
        )
    raise ValueError(
        f"There are no files <speaker>/<session>/<utterance>.wav below "
        f"{folders[0]}: check data_folder."
    )


def divide(utterances, split_ratio, seed):
    """Divides utterances into train and dev.

    Arguments
    ---------
    utterances : list of tuple
        Speaker, ID and path.
    split_ratio : list of int
        Ratio of train to dev.
    seed : int
        Seed of the division.

    Returns
    -------
    tuple
        Two sorted lists of utterances.

    Raises
    ------
    ValueError
        If there are too few.
    """
    shuffled = list(utterances)
    # A separate generator, so that the division depends on the seed alone.
    random.Random(seed).shuffle(shuffled)
    dev_size = round(len(shuffled) * split_ratio[1] / sum(split_ratio))
    in_train = Counter(utterance[0] for utterance in shuffled)
    train, dev = [], []
    for utterance in shuffled:
        # A speaker without training data could not be classified.
        if len(dev) < dev_size and in_train[utterance[0]] > 1:
            in_train[utterance[0]] -= 1
            dev.append(utterance)
        else:
            train.append(utterance)
    if split_ratio[1] and not dev:
        raise ValueError(
            f"{len(utterances)} utterances of {len(in_train)} speakers are "
            f"too few to divide {split_ratio[0]}:{split_ratio[1]} into train "
            f"and dev: each speaker needs one in train."
        )
    return sorted(train), sorted(dev)


def list_segments(utterances, seg_dur, amp_th, sample_rate, split, left_out):
    """Rows of train.csv or dev.csv, one at a time.

    Arguments
    ---------
    utterances : list of tuple
        Speaker, ID and path.
    seg_dur : float
        Seconds in a segment.
    amp_th : float
        Lowest mean amplitude.
    sample_rate : int
        Samples per second.
    split : str
        Name for the progress bar.
    left_out : list
        Takes a pair (file, reason) for each utterance or segment that is left
        out.

    Yields
    ------
    tuple
        A row.

    Raises
    ------
    ValueError
        If no segment is left.
    """
    length = round(seg_dur * sample_rate)
    number, left_before = 0, len(left_out)
    for speaker, name, path in tqdm(utterances, f"{split}.csv"):
        samples = None
        try:
            frames = read_header(path, sample_rate)
            if amp_th > 0:
                samples, _ = soundfile.read(
                    path, dtype="float32", always_2d=True
                )
        except (DamagedFile, soundfile.LibsndfileError):
            left_out.append((path, "damaged files"))
            continue
        if frames < MIN_SECONDS * sample_rate:
            left_out.append((path, f"files shorter than {MIN_SECONDS} s"))
            continue
        for start in range(0, max(frames - length, 0) + 1, length):
            stop = min(start + length, frames)
            if samples is not None and abs(samples[start:stop]).mean() < amp_th:
                left_out.append((path, "silent segments"))
                continue
            number += 1
            yield (
                f"{name}_{start}_{stop}",
                frames / sample_rate,
                path,
                start,
                stop,
                speaker,
            )
    if utterances and not number:
        reasons = Counter(reason for _, reason in left_out[left_before:])
        raise ValueError(
            f"No segment is left for {split}.csv: "
            + ", ".join(f"{n} {reason}" for reason, n in reasons.items())
            + f" (a mean amplitude below amp_th={amp_th} is silence)."
        )


def list_whole(names, folders, sample_rate, split):
    """Rows of enrol.csv or test.csv: whole utterances.

    Arguments
    ---------
    names : list of str
        Paths below a ``wav`` folder.
    folders : list of Path
        The ``wav`` folders.
    sample_rate : int
        Samples per second.
    split : str
        Name for the progress bar.

    Returns
    -------
    list of tuple
        The rows.

    Raises
    ------
    FileNotFoundError
        If files are missing.
    """
    paths = {}
    for name in names:
        candidates = [
            (folder / name).with_suffix(suffix)
            for folder in folders
            for suffix in SUFFIXES
        ]
        paths[name] = next((p for p in candidates if p.is_file()), None)
    missing = [name for name, path in paths.items() if path is None]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(names)} files of the list of trials do "
            f"not exist; the first is {folders[0] / missing[0]}: check "
            f"data_folder and verification_file."
        )
    rows = []
    for name, path in tqdm(paths.items(), f"{split}.csv"):
        frames = read_header(path, sample_rate)
        speaker = name.split("/")[0]
        rows.append((name, frames / sample_rate, str(path), 0, frames, speaker))
    return rows


def prepare_noise(folder, csv_file, key, url=None, sample_rate=16000):
    """Writes a csv file of noises or room impulse responses.

    MUSAN (OpenSLR 17) and RIRS_NOISES (OpenSLR 28) are used as they unpack: of
    RIRS_NOISES the point-source noises or the simulated impulse responses.
    Recordings longer than MAX_NOISE seconds, such as MUSAN's music and speech,
    are cut into pieces, which are written to a folder beside the csv file.
    Damaged and silent files are left out, and listed there.

    Arguments
    ---------
    folder : str or None
        Folder with wav files, at any depth. If None, nothing is done.
    csv_file : str
        The csv file, as AddNoise and AddReverb read it.
    key : str
        The folder's key in the yaml file, for messages.
    url : str, optional
        A zip archive, unpacked into the folder if it does not exist.
    sample_rate : int
        Required sample rate of the files.

    Raises
    ------
    FileNotFoundError
        If there is no such folder, or no wav file in it.
    ValueError
        If a URL is given but no folder.
    """
    if folder is None:
        if url is not None:
            raise ValueError(
                f"A URL is given but no folder to unpack it to: set {key}."
            )
        return
    folder = Path(folder).expanduser().absolute()
    if url is not None and not folder.is_dir():
        download_file(url, folder / "data.zip", unpack=True)
    if (folder / SUBFOLDERS[key]).is_dir():
        folder = folder / SUBFOLDERS[key]
    paths = sorted(folder.rglob("*.wav"))
    if not paths:
        raise FileNotFoundError(
            f"There are no wav files below {folder}: set {key} to a folder "
            f"with wav files, or to null to train without."
        )
    csv_file = Path(csv_file)
    # Next to the csv file's: noise.csv has noise/ and noise_left_out.csv.
    pieces_folder = csv_file.with_suffix("")
    left_out = []
    csv_file.parent.mkdir(parents=True, exist_ok=True)
    fields = ["ID", "duration", "wav", "wav_format", "wav_opts"]
    write_csv(
        csv_file,
        fields,
        (
            (name, seconds, path, Path(path).suffix[1:], "")
            for source in tqdm(paths, f"Files of {folder}")
            for name, seconds, path in noises_of(
                source, folder, pieces_folder, sample_rate, left_out
            )
        ),
    )
    if left_out:
        path = csv_file.with_name(f"{csv_file.stem}_{LEFT_OUT}")
        write_csv(path, ["wav", "reason"], left_out)
        logger.warning(
            f"{len(left_out)} files are left out: {path} lists them."
        )


def noises_of(source, folder, pieces_folder, sample_rate, left_out):
    """A noise, or the pieces of a long one.

    Arguments
    ---------
    source : Path
        The recording.
    folder : Path
        Folder above it.
    pieces_folder : Path
        Folder for pieces. Those that exist are kept.
    sample_rate : int
        Required sample rate.
    left_out : list
        Takes a pair (file, reason) if the recording is left out.

    Yields
    ------
    str
        ID.
    float
        Seconds.
    str
        File.
    """
    name = source.relative_to(folder).with_suffix("")
    try:
        frames = read_header(source, sample_rate)
        if frames <= MAX_NOISE * sample_rate:
            samples, _ = soundfile.read(str(source), dtype="float32")
            if not samples.any():
                left_out.append((str(source), "silent"))
                return
            yield str(name), frames / sample_rate, str(source)
            return
        length = PIECE * sample_rate
        for start in range(0, frames - length + 1, length):
            path = pieces_folder / f"{name}_{start}.flac"
            if not path.is_file():
                piece, _ = soundfile.read(
                    str(source), length, start, dtype="int16"
                )
                if not piece.any():
                    left_out.append((str(source), f"silent from {start}"))
                    continue
                path.parent.mkdir(parents=True, exist_ok=True)
                with atomic_path(path) as partial:
                    soundfile.write(partial, piece, sample_rate, format="FLAC")
            yield f"{name}_{start}", PIECE, str(path)
    except (DamagedFile, soundfile.LibsndfileError):
        left_out.append((str(source), "damaged"))
