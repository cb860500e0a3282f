"""Conversion of VoxCeleb2, with a stand-in for ffmpeg.

Authors
 * The sb_memeff authors 2026
"""

import csv
import sys

import pytest
import soundfile
import voxceleb_convert

# Called as ffmpeg ... -i SOURCE ... -ar 16000 -ac 1 TARGET. A source holds the
# number of samples, or says what is wrong with it.
FFMPEG = """#!{python}
import sys
from pathlib import Path

arguments = sys.argv[1:]
source, target = arguments[arguments.index("-i") + 1], arguments[-1]
assert arguments[arguments.index("-ar") + 1] == "16000"
text = Path(source).read_text()
with open({log!r}, "a") as f:
    f.write(source + "\\n")
if text == "broken":
    Path(target).write_bytes(b"half a file")
    sys.exit(source + ": Invalid data found")
if text == "empty":
    text = 0
if text == "garbage":
    Path(target).write_bytes(b"not audio")
    sys.exit(0)
import numpy, soundfile
soundfile.write(target, numpy.zeros(int(text)), 16000)
"""


@pytest.fixture
def vox2(tmp_path, monkeypatch):
    """A folder aac, and a PATH with the stand-in alone."""
    log = tmp_path / "log"
    log.touch()
    program = tmp_path / "bin" / "ffmpeg"
    program.parent.mkdir()
    program.write_text(FFMPEG.format(python=sys.executable, log=str(log)))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))
    for number, text in enumerate(
        ["800", "1600", "broken", "empty", "garbage"]
    ):
        path = tmp_path / "aac" / f"id{number % 2}" / "s" / f"{number}.m4a"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def converted(vox2):
    return {
        str(path.relative_to(vox2 / "wav")): soundfile.info(path).frames
        for path in (vox2 / "wav").rglob("*.*")
    }


def test_conversion_continues_and_lists_failures(vox2):
    arguments = [str(vox2 / "aac"), str(vox2), "--jobs=2"]
    message = voxceleb_convert.main(arguments)
    assert message.startswith("3 files could not be converted: ")
    assert converted(vox2) == {"id0/s/0.wav": 800, "id1/s/1.wav": 1600}
    with open(vox2 / "not_converted.csv", newline="") as f:
        reasons = {row["m4a"][-5]: row["reason"] for row in csv.DictReader(f)}
    assert set(reasons) == {"2", "3", "4"}
    assert reasons["2"].endswith("Invalid data found")
    assert reasons["3"] == "the result is empty"
    assert "not a readable audio file" in reasons["4"]
    # The second run does what is left.
    for number in (2, 3, 4):
        path = vox2 / "aac" / f"id{number % 2}" / "s" / f"{number}.m4a"
        path.write_text("80")
    (vox2 / "log").write_text("")
    assert voxceleb_convert.main(arguments) is None
    assert len((vox2 / "log").read_text().split()) == 3
    assert len(converted(vox2)) == 5


def test_flac(vox2):
    path = vox2 / "aac" / "id0" / "s" / "0.m4a"
    target = vox2 / "x" / "0.flac"
    assert voxceleb_convert.convert(path, target) is None
    assert soundfile.info(target).format == "FLAC"


def test_ffmpeg_is_missing(vox2, monkeypatch):
    monkeypatch.setenv("PATH", str(vox2))
    message = voxceleb_convert.main([str(vox2 / "aac"), str(vox2)])
    assert message.startswith("ffmpeg is missing: install it")
    assert not (vox2 / "wav").exists()


def test_no_files(vox2):
    message = voxceleb_convert.main([str(vox2 / "bin"), str(vox2)])
    assert message.startswith("There are no files <speaker>/<session>/")
