"""Reads audio files and tables of them; errors name the file.

Authors
 * The sb_memeff authors 2026
"""

import csv
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from speechbrain.dataio import audio_io

from sb_memeff.dataio.preparation import DamagedFile

__all__ = ["check_csv", "load_audio"]


def load_audio(
    path: str | Path,
    sample_rate: int,
    start: int = 0,
    stop: int | None = None,
) -> torch.Tensor:
    """Loads an utterance, or a part of it, as the mean of its channels.

    Arguments
    ---------
    path : str or Path
        The file.
    sample_rate : int
        Required sample rate, in Hz.
    start : int
        First sample.
    stop : int, optional
        End of the part; None for that of the file.

    Returns
    -------
    torch.Tensor
        The waveform [samples].

    Raises
    ------
    DamagedFile
        If the file cannot be read, has another rate or fewer samples than
        that, or values that are not finite.

    Example
    -------
    >>> path = getfixture("tmp_path") / "x.wav"
    >>> import soundfile
    >>> soundfile.write(path, [[0.5, 0.0]] * 8, 16000)
    >>> load_audio(path, 16000, start=6)
    tensor([0.2500, 0.2500])
    """
    number = -1 if stop is None else stop - start
    try:
        signal, rate = audio_io.load(
            path, frame_offset=start, num_frames=number
        )
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).rstrip(".")
        raise DamagedFile(f"{path} cannot be read: {reason}.") from error
    found = signal.shape[-1]
    fault = ""
    if rate != sample_rate:
        fault = f"has {rate} Hz and not {sample_rate}"
    elif not found or (stop is not None and found != number):
        fault = f"ends after {start + found} samples"
        if stop is not None:
            fault += f", before {stop}"
    elif not signal.isfinite().all():
        fault = "has values that are not finite"
    if fault:
        raise DamagedFile(f"{path} {fault}: repair or remove it.")
    return signal.mean(0)


def check_csv(
    path: str | Path, texts: Sequence[str], numbers: Sequence[str]
) -> None:
    """Checks each row of a csv file for DynamicItemDataset.

    Arguments
    ---------
    path : str or Path
        The file.
    texts : list of str
        Columns that must not be empty.
    numbers : list of str
        Columns of numbers of at least 0.

    Raises
    ------
    ValueError
        If a row or a column is missing, a value is bad, or an ID is there
        twice. The message names file and row.

    Example
    -------
    >>> path = getfixture("tmp_path") / "x.csv"
    >>> _ = path.write_text("ID,duration,wav\\na,1.5,a.wav\\nb,two,b.wav\\n")
    >>> check_csv(path, ["wav"], ["duration"])
    Traceback (most recent call last):
        ...
    ValueError: .../x.csv, line 3 (b): duration is 'two', not a number.
    """
    known: set[str] = set()
    with open(path, encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file, skipinitialspace=True)
        names = ["ID", *texts, *numbers]
        try:
            missing = [n for n in names if n not in (rows.fieldnames or ())]
            if missing:
                raise ValueError(f"{path} lacks the column {missing[0]}.")
            for row in rows:
                fault = _fault(row, names, numbers, known)
                if fault:
                    raise ValueError(
                        f"{path}, line {rows.line_num} ({row['ID']}): {fault}."
                    )
                known.add(row["ID"])
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(
                f"{path}, after line {rows.line_num}: {error}."
            ) from error
    if not known:
        raise ValueError(f"{path} has no rows.")


def _fault(
    row: dict[str, str], names: list[str], numbers: Sequence[str], known: set
) -> str:
    # DictReader fills short rows with None, and collects surplus values there.
    if None in row or None in row.values():
        return "it has another number of values than the header"
    if row["ID"] in known:
        return "this ID is there twice"
    for name in names:
        if not row[name].strip():
            return f"{name} is empty"
    for name in numbers:
        try:
            value = float(row[name])
        except ValueError:
            return f"{name} is {row[name]!r}, not a number"
        if not 0 <= value < math.inf:
            return f"{name} is {row[name]}, which must be at least 0"
    return ""
