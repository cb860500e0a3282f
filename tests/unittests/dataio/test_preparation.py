"""Files that are complete or not there."""

import numpy as np
import pytest
import soundfile

from sb_memeff.dataio.preparation import (
    Prepared,
    atomic_path,
    open_atomic,
    read_header,
    write_csv,
)


def test_no_file_is_half_written(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("old")
    with pytest.raises(KeyError), open_atomic(path) as f:
        f.write("new")
        raise KeyError
    assert path.read_text() == "old"
    assert [*tmp_path.iterdir()] == [path]


def test_a_path_that_is_written_by_others(tmp_path):
    path = tmp_path / "x.pt"
    with pytest.raises(KeyError), atomic_path(path) as partial:
        raise KeyError  # before anything is written
    assert not [*tmp_path.iterdir()]
    with atomic_path(path) as partial:
        partial.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new" and not partial.exists()


def test_csv_with_commas(tmp_path):
    write_csv(tmp_path / "x.csv", ["a", "b"], [("1,5", 2)])
    assert (tmp_path / "x.csv").read_text() == 'a,b\n"1,5",2\n'


def test_prepared_until_something_changes(tmp_path):
    file, other = (tmp_path / "deep" / name for name in ("x.csv", "y.csv"))

    def prepared(**options):
        files = [other, file]
        return Prepared(tmp_path / "deep" / "options.json", options, files)

    with prepared(seed=1):
        file.write_text("x")
        other.write_text("y")
    assert prepared(seed=1).done()
    assert not prepared(seed=2).done()
    with pytest.raises(KeyError), prepared(seed=1):
        raise KeyError
    assert not prepared(seed=1).done()
    with prepared(seed=1):
        pass
    file.unlink()
    assert not prepared(seed=1).done()
    (tmp_path / "deep" / "options.json").write_text("{half")
    file.write_text("x")
    assert not prepared(seed=1).done()


def test_headers(tmp_path):
    path = tmp_path / "x.wav"
    soundfile.write(path, np.zeros(800), 8000)
    assert read_header(path, 8000) == 800
    with pytest.raises(ValueError, match="x.wav has 8000 Hz and not 16000"):
        read_header(path, 16000)
    path.write_bytes(b"not audio")
    with pytest.raises(ValueError, match="x.wav is not a readable audio"):
        read_header(path, 8000)
