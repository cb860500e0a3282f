"""Helpers of the recipes' data preparations.

Authors
 * The sb_memeff authors 2026
"""

import contextlib
import csv
import json
import os
from collections.abc import Generator, Iterable, Sequence
from pathlib import Path
from typing import Any, TextIO

import soundfile

__all__ = [
    "DamagedFile",
    "Prepared",
    "atomic_path",
    "open_atomic",
    "read_header",
    "write_csv",
]


class DamagedFile(ValueError):
    """An audio file that cannot be read."""


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Generator[Path, None, None]:
    """A path to write to; the file then appears under its name at once.

    Nothing is left if an error occurs.

    Arguments
    ---------
    path : str or Path
        The file.

    Yields
    ------
    Path
        Where to write it, in the same folder.

    Example
    -------
    >>> import torch
    >>> path = getfixture("tmp_path") / "x.pt"
    >>> with atomic_path(path) as partial:
    ...     torch.save([1], partial)
    ...     path.exists()
    False
    >>> torch.load(path)
    [1]
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    os.replace(partial, path)


@contextlib.contextmanager
def open_atomic(path: str | Path) -> Generator[TextIO, None, None]:
    """A text file that appears under its name only when it is complete.

    Arguments
    ---------
    path : str or Path
        The file.

    Yields
    ------
    TextIO
        The open file.

    Example
    -------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "x.txt"
    >>> with open_atomic(path) as f:
    ...     _ = f.write("done")
    >>> path.read_text()
    'done'
    """
    with atomic_path(path) as partial:
        with open(partial, "w", encoding="utf-8", newline="") as file:
            yield file


def write_csv(
    path: str | Path, fields: Sequence[str], rows: Iterable[Sequence[object]]
) -> None:
    """Writes a csv file atomically.

    Arguments
    ---------
    path : str or Path
        The file.
    fields : list of str
        The header.
    rows : iterable of tuple
        The rows below it.

    Example
    -------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "x.csv"
    >>> write_csv(path, ["ID", "duration"], [("a", 1.5)])
    >>> path.read_text().split()
    ['ID,duration', 'a,1.5']
    """
    with open_atomic(path) as f:
        writer = csv.writer(f, lineterminator="\n")
        writer.writerow(fields)
        writer.writerows(rows)


class Prepared:
    """Records the options that files were written with.

    Arguments
    ---------
    record : str or Path
        A json file next to the prepared files.
    options : dict
        Everything that the files depend on, of json's types.
    files : list of Path
        The prepared files.

    Example
    -------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> prepared = Prepared(folder / "options.json", {"seed": 1}, [])
    >>> prepared.done()
    False
    >>> with prepared:
    ...     pass  # the files are written
    >>> prepared.done()
    True
    """

    def __init__(
        self,
        record: str | Path,
        options: dict[str, Any],
        files: Iterable[str | Path],
    ):
        self.record = Path(record)
        self.options = options
        self.files = [Path(file) for file in files]

    def done(self) -> bool:
        """Checks that the files exist and were written with these options.

        Returns
        -------
        bool
            True if nothing needs to be prepared.
        """
        try:
            same = json.loads(self.record.read_text("utf-8")) == self.options
        except (FileNotFoundError, json.JSONDecodeError):
            return False
        return same and all(file.is_file() for file in self.files)

    def __enter__(self) -> None:
        self.record.parent.mkdir(parents=True, exist_ok=True)
        # A folder without a record counts as not prepared.
        self.record.unlink(missing_ok=True)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            with open_atomic(self.record) as f:
                json.dump(self.options, f, indent=1)


def read_header(path: str | Path, sample_rate: int) -> int:
    """Reads the length of an audio file from its header.

    Arguments
    ---------
    path : str or Path
        The file.
    sample_rate : int
        Required sample rate, in Hz.

    Returns
    -------
    int
        Number of samples in the file.

    Raises
    ------
    DamagedFile
        If the file cannot be read.
    ValueError
        If it has another rate.
    """
    try:
        info = soundfile.info(str(path))
    except soundfile.LibsndfileError as error:
        raise DamagedFile(
            f"{path} is not a readable audio file ({error}): remove or repair it."
        ) from error
    if info.samplerate != sample_rate:
        raise ValueError(
            f"{path} has {info.samplerate} Hz and not {sample_rate}: convert "
            f"the corpus or set sample_rate."
        )
    return info.frames
