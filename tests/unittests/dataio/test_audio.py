"""Audio files and csv files that are not as they should be.

Authors
 * The sb_memeff authors 2026
"""

import numpy as np
import pytest
import soundfile
import torch
from speechbrain.dataio.dataset import DynamicItemDataset
from speechbrain.lobes.features import Fbank
from speechbrain.utils.data_pipeline import provides, takes

from sb_memeff.dataio.audio import check_csv, load_audio
from sb_memeff.dataio.preparation import DamagedFile
from sb_memeff.dataio.reproducible import TRIED, SeededDataset

RATE = 16000


def written(path, samples, rate=RATE, **options):
    soundfile.write(path, samples, rate, **options)
    return path


@pytest.mark.parametrize(
    "samples",
    [np.zeros(800), np.ones(800), -np.ones(800), np.zeros(1), np.full(1, 0.5)],
    ids=["silence", "clipping", "negative", "one sample", "one"],
)
def test_what_is_no_fault(tmp_path, samples):
    signal = load_audio(written(tmp_path / "x.wav", samples), RATE)
    assert signal.shape == (len(samples),)
    assert Fbank(n_mels=20)(signal[None]).isfinite().all()


def test_stereo_is_the_mean(tmp_path):
    path = written(tmp_path / "x.flac", [[0.5, 0.0]] * 8)
    assert torch.equal(load_audio(path, RATE, 2, 5), torch.full((3,), 0.25))


def test_another_extension_is_recognised(tmp_path):
    path = written(tmp_path / "x.flac", np.zeros(8))
    path.rename(tmp_path / "x.wav")
    assert len(load_audio(tmp_path / "x.wav", RATE)) == 8


def damaged_files(folder):
    """What is wrong, the file, and the part to load."""
    noise = np.random.default_rng(0).uniform(-1, 1, 16000)
    flac = written(folder / "half.flac", noise)
    flac.write_bytes(flac.read_bytes()[:9000])
    wav = written(folder / "half.wav", noise)
    wav.write_bytes(wav.read_bytes()[:9000])
    nan = noise.copy()
    nan[5] = np.nan
    text = folder / "text.wav"
    text.write_text("not audio")
    return {
        "truncated flac": (flac, 0, 16000),
        "truncated wav": (wav, 0, 16000),
        "nan": (written(folder / "nan.wav", nan, subtype="FLOAT"), 0, None),
        "8 kHz": (written(folder / "8k.wav", noise, 8000), 0, None),
        "empty": (written(folder / "empty.wav", noise[:0]), 0, None),
        "text": (text, 0, None),
        "missing": (folder / "missing.wav", 0, None),
        "folder": (folder, 0, None),
        "beyond": (written(folder / "x.wav", noise), 16000, 16100),
    }


def test_a_fault_names_the_file(tmp_path):
    for kind, (path, start, stop) in damaged_files(tmp_path).items():
        with pytest.raises(DamagedFile) as caught:
            load_audio(path, RATE, start, stop)
        assert str(path) in str(caught.value), kind
        assert "\n" not in str(caught.value), kind


@pytest.mark.parametrize(
    "rows, message",
    [
        ("a,1", r"line 2 \(a\): it has another number"),
        ("a,1,a.wav,more", r"line 2 \(a\): it has another number"),
        ("a,1,a.wav\n\nb,,b.wav", r"\(b\): duration is empty"),
        ("a,1,", r"\(a\): wav is empty"),
        ("a,one,a.wav", r"\(a\): duration is 'one', not a number"),
        ("a,nan,a.wav", r"\(a\): duration is nan"),
        ("a,-1,a.wav", r"\(a\): duration is -1"),
        ("a,1,a.wav\na,1,a.wav", r"line 3 \(a\): this ID is there twice"),
        ("", "has no rows"),
    ],
)
def test_a_bad_row_is_named(tmp_path, rows, message):
    path = tmp_path / "x.csv"
    path.write_text(f"ID,duration,wav\n{rows}\n")
    with pytest.raises(ValueError, match=f"x.csv.*{message}"):
        check_csv(path, ["wav"], ["duration"])


def test_other_bad_tables_are_named(tmp_path):
    path = tmp_path / "x.csv"
    for content in (b"", b"ID,wav\na,a.wav\n", b"ID,duration,wav\n\xff,1,a\n"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="x.csv"):
            check_csv(path, ["wav"], ["duration"])
    path.write_text("ID, duration, wav\na, 1, a.wav\n")
    check_csv(path, ["wav"], ["duration"])


def dataset(paths):
    @takes("wav")
    @provides("sig")
    def load(wav):
        return load_audio(wav, RATE) + torch.rand(())

    items = {str(n): {"wav": str(path)} for n, path in enumerate(paths)}
    return DynamicItemDataset(items, [load], ["id", "sig"])


def test_the_epoch_goes_on_if_the_user_says_so(tmp_path, caplog):
    good = [written(tmp_path / f"{n}.wav", np.zeros(8)) for n in range(2)]
    bad = tmp_path / "bad.wav"
    data = dataset([bad, good[0], good[1], bad])
    with pytest.raises(DamagedFile, match="bad.wav"):
        SeededDataset(data, seed=1)[0, 0]
    skipping = SeededDataset(data, seed=1, skip_damaged=True)
    with caplog.at_level("WARNING"):
        items = [skipping[number, number] for number in range(4)]
    assert [item["id"] for item in items] == ["1", "1", "2", "1"]
    assert caplog.text.count("Skipped:") == 3
    # The random numbers are those of the place in the epoch.
    assert torch.equal(
        items[0]["sig"], SeededDataset(data, seed=1)[0, 1]["sig"]
    )
    with pytest.raises(DamagedFile, match="bad.wav"):
        SeededDataset(dataset([bad] * 2 * TRIED), 1, skip_damaged=True)[0, 0]
    with pytest.raises(TypeError, match="skip_damaged='no'"):
        SeededDataset(data, seed=1, skip_damaged="no")
