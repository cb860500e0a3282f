"""The data preparation of the VoxCeleb recipe.

Authors
 * The sb_memeff authors 2026
"""

import csv
import random
from pathlib import Path

import numpy as np
import pytest
import soundfile
from voxceleb_prepare import (
    check_keys,
    divide,
    prepare_noise,
    prepare_voxceleb,
)

RATE = 16000


def write(path, seconds, rate=RATE, gain=0.1):
    """A file of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(str(path)))
    samples = gain * rng.standard_normal(int(seconds * rate))
    soundfile.write(path, samples, rate)


def rows(path):
    with open(path, newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f))


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "vox"
    for speaker in ("a", "b", "c"):
        for n in range(5):
            write(folder / "wav" / speaker / "s" / f"{n}.wav", 2.6)
    trials = "1 c/s/0.wav c/s/1.wav\n0 c/s/0.wav b/s/1.wav\n"
    (folder / "veri.txt").write_text(trials)
    return folder


def prepare(corpus, **options):
    save = corpus.parent / "save"
    options = {"verification_file": corpus / "veri.txt", **options}
    options = {"seg_dur": 1.0, "split_ratio": [80, 20], **options}
    prepare_voxceleb(str(corpus), str(save), **options)
    return save


def test_segments_and_speakers(corpus):
    (corpus / "veri.txt").write_text("1 c/s/0.wav c/s/1.wav\n")
    save = prepare(corpus)
    train, dev = rows(save / "train.csv"), rows(save / "dev.csv")
    assert list(train[0]) == [
        "ID",
        "duration",
        "wav",
        "start",
        "stop",
        "spk_id",
    ]
    assert {r["spk_id"] for r in train} == {"a", "b"}
    # 2 of 10 utterances in dev; 2.6 s make two segments of 1 s.
    assert len(train) == 16 and len(dev) == 4
    assert not {r["wav"] for r in train} & {r["wav"] for r in dev}
    assert [(r["start"], r["stop"]) for r in train[:2]] == [
        ("0", "16000"),
        ("16000", "32000"),
    ]
    assert {float(r["duration"]) for r in train} == {2.6}
    assert len({r["ID"] for r in train + dev}) == 20


def test_own_random_stream(corpus):
    state = random.getstate()
    first = (prepare(corpus) / "train.csv").read_text()
    assert random.getstate() == state
    random.seed(5)
    (corpus.parent / "save" / "voxceleb_prepare.json").unlink()
    assert (prepare(corpus) / "train.csv").read_text() == first
    assert (prepare(corpus, seed=7) / "train.csv").read_text() != first


def test_done_once(corpus, monkeypatch):
    path = prepare(corpus) / "train.csv"
    path.write_text("kept")
    prepare(corpus)
    assert path.read_text() == "kept"
    prepare(corpus, seg_dur=0.5)
    assert path.read_text() != "kept"


def test_an_interrupted_preparation_is_repeated(corpus):
    save = prepare(corpus)
    (save / "dev.csv").unlink()
    (save / "train.csv").write_text("stale")
    prepare(corpus)
    assert (save / "dev.csv").is_file()
    assert (save / "train.csv").read_text() != "stale"


def test_short_and_silent(corpus):
    write(corpus / "wav" / "a" / "s" / "short.wav", 0.7)
    write(corpus / "wav" / "a" / "s" / "tiny.wav", 0.3)
    write(corpus / "wav" / "a" / "s" / "silent.wav", 2.6, gain=1e-5)
    names = []
    for amp_th in (5e-4, 0):
        save = prepare(corpus, amp_th=amp_th)
        both = rows(save / "train.csv") + rows(save / "dev.csv")
        names.append([Path(r["wav"]).stem for r in both])
        short = [r for r in both if Path(r["wav"]).stem == "short"]
        assert [r["stop"] for r in short] == [str(int(0.7 * RATE))]
    assert "tiny" not in names[0] + names[1]
    assert "silent" not in names[0] and names[1].count("silent") == 2


def test_each_speaker_keeps_training_data():
    utterances = [(f"s{n}", str(n), None) for n in range(9)]
    utterances += [("many", f"m{n}", None) for n in range(3)]
    for seed in range(20):
        train, dev = divide(utterances, [10, 90], seed)
        assert {u[0] for u in train} == {u[0] for u in utterances}
        assert {u[0] for u in dev} == {"many"}
    with pytest.raises(ValueError, match="9 utterances of 9 speakers"):
        divide(utterances[:9], [90, 10], 0)


def test_verification_files(corpus):
    save = prepare(corpus, splits=["enrol", "test"])
    assert [r["ID"] for r in rows(save / "enrol.csv")] == ["c/s/0.wav"]
    test = rows(save / "test.csv")
    assert [r["ID"] for r in test] == ["b/s/1.wav", "c/s/1.wav"]
    assert test[0]["stop"] == str(int(2.6 * RATE))
    assert not (save / "train.csv").exists()


def test_several_folders(corpus, tmp_path):
    other = tmp_path / "vox2"
    for n in range(5):
        write(other / "wav" / "d" / "s" / f"{n}.wav", 1.5)
    save = tmp_path / "merged"
    prepare_voxceleb(f"{corpus},{other}", save, seg_dur=1.0)
    both = rows(save / "train.csv") + rows(save / "dev.csv")
    assert {r["spk_id"] for r in both} == {"a", "b", "c", "d"}


def test_no_corpus(tmp_path):
    with pytest.raises(FileNotFoundError, match="set data_folder"):
        prepare_voxceleb(tmp_path, tmp_path / "save")
    (tmp_path / "wav").mkdir()
    with pytest.raises(ValueError, match="no files <speaker>"):
        prepare_voxceleb(tmp_path, tmp_path / "save")
    assert not (tmp_path / "save").exists()


def test_m4a(tmp_path):
    path = tmp_path / "wav" / "a" / "s" / "1.m4a"
    path.parent.mkdir(parents=True)
    path.touch()
    with pytest.raises(ValueError, match="convert them first"):
        prepare_voxceleb(tmp_path, tmp_path / "save")


@pytest.mark.parametrize(
    ("text", "error", "sentence"),
    [
        ("", ValueError, "is empty"),
        ("1 a b\n2 a b\n", ValueError, "Line 2 of .* is not a trial"),
        (
            "1 a/s/0.wav a/s/9.wav\n",
            FileNotFoundError,
            "1 of 1 files .* first is .*a/s/9.wav",
        ),
    ],
)
def test_bad_list(corpus, text, error, sentence):
    (corpus / "veri.txt").write_text(text)
    with pytest.raises(error, match=sentence):
        prepare(corpus, splits=["enrol", "test"])
    assert not (corpus.parent / "save").exists()


def test_no_speaker_left(corpus):
    trials = "1 a/s/0.wav a/s/1.wav\n0 b/s/0.wav c/s/1.wav\n"
    (corpus / "veri.txt").write_text(trials)
    with pytest.raises(ValueError, match="All 3 speakers .* none is left"):
        prepare(corpus)


def test_damaged_and_silent_files_are_listed(corpus):
    path = corpus / "wav" / "a" / "s" / "bad.wav"
    path.write_bytes(b"not audio")
    silent = corpus / "wav" / "a" / "s" / "silent.wav"
    write(silent, 2.6, gain=1e-5)
    tiny = corpus / "wav" / "b" / "s" / "tiny.wav"
    write(tiny, 0.3)
    save = prepare(corpus, verification_file=None)
    both = rows(save / "train.csv") + rows(save / "dev.csv")
    assert len({r["wav"] for r in both}) == 15
    found = sorted((r["wav"], r["reason"]) for r in rows(save / "left_out.csv"))
    assert found == [
        (str(path), "damaged files"),
        (str(silent), "silent segments"),
        (str(silent), "silent segments"),
        (str(tiny), "files shorter than 0.5 s"),
    ]


def test_a_damaged_file_of_the_trials(corpus):
    """A trial cannot be left out."""
    (corpus / "wav" / "c" / "s" / "0.wav").write_bytes(b"not audio")
    with pytest.raises(ValueError, match="0.wav is not a readable audio"):
        prepare(corpus, splits=["enrol", "test"])


def test_another_sample_rate(corpus):
    path = corpus / "wav" / "a" / "s" / "bad.wav"
    write(path, 2.0, rate=8000)
    with pytest.raises(ValueError, match="bad.wav has 8000 Hz and not 16000"):
        prepare(corpus, verification_file=None)
    assert not list((corpus.parent / "save").glob("*.csv*"))


def test_nothing_but_damaged_files(tmp_path):
    for n in range(3):
        path = tmp_path / "wav" / "a" / "s" / f"{n}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"not audio")
    with pytest.raises(ValueError, match="train.csv: 2 damaged files"):
        prepare_voxceleb(tmp_path, tmp_path / "save", split_ratio=[67, 33])


def test_flac(corpus):
    for path in (corpus / "wav" / "c").rglob("*.wav"):
        samples, rate = soundfile.read(path)
        soundfile.write(path.with_suffix(".flac"), samples, rate)
        path.unlink()
    save = prepare(corpus, splits=["train", "dev", "enrol", "test"])
    assert rows(save / "enrol.csv")[0]["wav"].endswith("c/s/0.flac")
    save = prepare(corpus, verification_file=None)
    both = rows(save / "train.csv") + rows(save / "dev.csv")
    assert len({r["wav"] for r in both}) == 15


def test_noise(tmp_path):
    csv_file = tmp_path / "save" / "noise.csv"
    prepare_noise(None, csv_file, "data_folder_noise")
    assert not csv_file.exists()
    write(tmp_path / "noise" / "deep" / "n.1.wav", 1.0)
    prepare_noise(tmp_path / "noise", csv_file, "data_folder_noise")
    (row,) = rows(csv_file)
    assert row["ID"] == "deep/n.1" and row["wav_format"] == "wav"
    with pytest.raises(FileNotFoundError, match="set data_folder_noise"):
        prepare_noise(tmp_path / "no", csv_file, "data_folder_noise")
    with pytest.raises(ValueError, match="set data_folder_noise"):
        prepare_noise(None, csv_file, "data_folder_noise", url="http://x")


def test_musan_and_rirs_noises_as_they_unpack(tmp_path):
    musan, rirs = tmp_path / "musan", tmp_path / "RIRS_NOISES"
    write(musan / "noise" / "free-sound" / "short.wav", 3)
    write(musan / "music" / "fma" / "long.wav", 25)
    write(musan / "speech" / "librivox" / "silent.wav", 1, gain=0)
    (musan / "noise" / "bad.wav").write_bytes(b"not audio")
    (musan / "README").write_text("Several wav files")
    csv_file = tmp_path / "save" / "noise.csv"
    prepare_noise(musan, csv_file, "data_folder_noise")
    found = rows(csv_file)
    assert [(r["ID"], float(r["duration"])) for r in found] == [
        ("music/fma/long_0", 10),
        ("music/fma/long_160000", 10),
        ("noise/free-sound/short", 3),
    ]
    source, _ = soundfile.read(musan / "music" / "fma" / "long.wav")
    piece, _ = soundfile.read(found[1]["wav"])
    assert found[1]["wav_format"] == "flac"
    assert np.abs(piece - source[160000:320000]).max() < 1e-4
    left_out = rows(tmp_path / "save" / "noise_left_out.csv")
    names = sorted((Path(r["wav"]).stem, r["reason"]) for r in left_out)
    assert names == [("bad", "damaged"), ("silent", "silent")]

    write(rirs / "simulated_rirs" / "smallroom" / "Room001" / "a.wav", 0.5)
    write(rirs / "pointsource_noises" / "b.wav", 1)
    write(rirs / "real_rirs_isotropic_noises" / "c.wav", 1)
    for key, name in (
        ("data_folder_rir", "smallroom/Room001/a"),
        ("data_folder_noise", "b"),
    ):
        path = tmp_path / "save" / f"{key}.csv"
        prepare_noise(rirs, path, key)
        assert [r["ID"] for r in rows(path)] == [name]


def test_a_yaml_file_without_a_key():
    check_keys({"lr": 1, "speeds": [100]}, ["lr", "speeds"], "my.yaml")
    with pytest.raises(ValueError, match="my.yaml lacks speeds, k_top: copy"):
        check_keys({"lr": 1}, ["lr", "speeds", "k_top"], "my.yaml")
