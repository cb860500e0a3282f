"""Data preparation for LibriSpeech: a csv file for each split.

The corpus has the layout of the published LibriSpeech:
``<split>/<speaker>/<chapter>/<speaker>-<chapter>-<number>.flac`` with the
transcripts beside them in ``<speaker>-<chapter>.trans.txt``. Any corpus with
that layout works, and splits may have any names.

Nothing is downloaded. Missing files are reported before anything is written.

Authors
 * The sb_memeff authors 2026
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from speechbrain.utils.logger import get_logger
from tqdm import tqdm

from sb_memeff.dataio.preparation import Prepared, read_header, write_csv

logger = get_logger(__name__)

FIELDS = ["ID", "duration", "wav", "spk_id", "wrd"]
OPTIONS_FILE = "librispeech_prepare.json"


def prepare_librispeech(
    data_folder,
    save_folder,
    tr_splits=(),
    dev_splits=(),
    te_splits=(),
    select_n_sentences=None,
    merge_lst=(),
    merge_name=None,
    sample_rate=16000,
    skip_prep=False,
):
    """Writes <split>.csv for each split, and optionally a merged file.

    Paths in the csv files begin with ``$data_root``, the folder of the
    splits, so the corpus can be moved.

    Arguments
    ---------
    data_folder : str
        Folder of the splits, or the folder that contains ``LibriSpeech``.
    save_folder : str
        Folder for the csv files.
    tr_splits : list of str
        Training splits.
    dev_splits : list of str
        Validation splits.
    te_splits : list of str
        Test splits.
    select_n_sentences : list of int or int, optional
        Number of utterances of each split, the first ones by name; default
        all.
    merge_lst : list of str
        Splits to merge.
    merge_name : str, optional
        Name of the merged file.
    sample_rate : int
        Required sample rate of the files.
    skip_prep : bool
        If True, do nothing.

    Raises
    ------
    FileNotFoundError
        If the corpus, a split or a file of a transcript is missing.
    ValueError
        If an argument or a file of the corpus is invalid.

    Example
    -------
    >>> prepare_librispeech(
    ...     "/data/LibriSpeech", "save", tr_splits=["train-clean-100"]
    ... )  # doctest: +SKIP
    """
    if skip_prep:
        return
    root = split_root(data_folder)
    splits = [*tr_splits, *dev_splits, *te_splits]
    check_splits(root, splits)
    if not isinstance(select_n_sentences, (list, tuple)):
        select_n_sentences = [select_n_sentences] * len(splits)
    if len(select_n_sentences) != len(splits):
        raise ValueError(
            f"select_n_sentences={select_n_sentences} must have one number for "
            f"each of the splits {', '.join(splits)}."
        )
    unknown = set(merge_lst) - set(splits)
    if unknown:
        raise ValueError(
            f"merge_lst names {', '.join(sorted(unknown))}, but the splits are "
            f"{', '.join(splits)}."
        )
    options = {
        "root": str(root),
        "splits": splits,
        "select_n_sentences": list(select_n_sentences),
        "merge_lst": list(merge_lst),
        "merge_name": merge_name,
    }
    save_folder = Path(save_folder)
    files = {split: save_folder / f"{split}.csv" for split in splits}
    merged = save_folder / merge_name if merge_lst else None
    if merge_lst and [files[split] for split in merge_lst] == [merged]:
        merged = None  # one split under its own name
    written = [*files.values(), *([merged] if merged else [])]
    if len(set(written)) < len(written):
        raise ValueError(
            f"Two of the splits {', '.join(splits)} and merge_name={merge_name}"
            f" would write the same file: name them differently."
        )
    prepared = Prepared(save_folder / OPTIONS_FILE, options, written)
    if prepared.done():
        logger.info(f"The csv files in {save_folder} are up to date.")
        return

    rows = {}
    for split, limit in zip(splits, select_n_sentences):
        rows[split] = list_split(root, split, limit, sample_rate)
    with prepared:
        for split, lines in rows.items():
            write_csv(files[split], FIELDS, lines)
        if merged:
            lines = [line for split in merge_lst for line in rows[split]]
            write_csv(merged, FIELDS, lines)


def split_root(data_folder):
    """The folder that contains the splits.

    Arguments
    ---------
    data_folder : str
        That folder, or its parent.

    Returns
    -------
    Path
        Absolute path.

    Raises
    ------
    FileNotFoundError
        If there is no such folder.
    """
    folder = Path(data_folder).expanduser().absolute()
    if (folder / "LibriSpeech").is_dir():
        folder = folder / "LibriSpeech"
    if not folder.is_dir():
        raise FileNotFoundError(
            f"There is no folder {folder}: set data_folder to the folder of "
            f"the splits, for example /data/LibriSpeech."
        )
    return folder


def check_splits(root, splits):
    """Checks that all splits exist, before any file is read.

    Arguments
    ---------
    root : Path
        Folder of the splits.
    splits : list of str
        Their names.

    Raises
    ------
    FileNotFoundError
        If a split has no folder.
    """
    missing = [split for split in splits if not (root / split).is_dir()]
    if missing:
        there = sorted(p.name for p in root.iterdir() if p.is_dir())
        raise FileNotFoundError(
            f"{root} has no split {', '.join(missing)}; it has "
            f"{', '.join(there) or 'no folders at all'}."
        )


def list_split(root, split, limit, sample_rate):
    """Rows of a split's csv file.

    Arguments
    ---------
    root : Path
        Folder of the splits.
    split : str
        Its name.
    limit : int or None
        Maximum number of utterances.
    sample_rate : int
        Required sample rate of the files.

    Returns
    -------
    list of tuple
        The rows, sorted by name of the utterance.

    Raises
    ------
    FileNotFoundError
        If an audio file is missing.
    ValueError
        If the split is empty or a file is unreadable.
    """
    transcripts = {}
    for path in (root / split).glob("*/*/*.trans.txt"):
        transcripts.update(read_transcripts(path))
    if not transcripts:
        raise ValueError(
            f"{root / split} has no files <speaker>/<chapter>/"
            f"<speaker>-<chapter>.trans.txt: does it have LibriSpeech's layout?"
        )
    names = sorted(transcripts)[:limit]
    for name in names:
        path = transcripts[name][0]
        if not path.is_file():
            raise FileNotFoundError(
                f"{name} has a transcript but no audio file {path}."
            )

    def row(name):
        path, words = transcripts[name]
        seconds = read_header(path, sample_rate) / sample_rate
        wav = Path("$data_root") / path.relative_to(root)
        return name, seconds, str(wav), "-".join(name.split("-")[:2]), words

    # Threads, because reading headers mostly waits for the disk.
    with ThreadPoolExecutor() as pool:
        return list(tqdm(pool.map(row, names), f"{split}.csv", len(names)))


def read_transcripts(path):
    """The utterances of a chapter.

    Arguments
    ---------
    path : Path
        A file of lines "<name> <words>".

    Returns
    -------
    dict
        Maps each name to the path of its audio file and its words.

    Raises
    ------
    ValueError
        If a line has no words.
    """
    utterances = {}
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        name, *words = line.split()
        if not words:
            raise ValueError(f"Line {number} of {path} has no words: {line!r}.")
        utterances[name] = path.parent / f"{name}.flac", " ".join(words)
    return utterances
