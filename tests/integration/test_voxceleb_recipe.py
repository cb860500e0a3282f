"""The VoxCeleb recipe, run as a user runs it, on eight synthetic voices.

The lines of tests/recipes/VoxCeleb.csv are for the samples in SpeechBrain's
repository. Here most run on a corpus with the layout of VoxCeleb, which

    python tests/integration/test_voxceleb_recipe.py data/tiny_voxceleb

writes.

Authors
 * The sb_memeff authors 2026
"""

import csv
import itertools
import json
import re
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import speaker_verification_cosine as verification
import speechbrain as sb
import torch
import train_speaker_embeddings as training
import yaml
from hyperpyyaml import load_hyperpyyaml

from tests.integration.as_one import train_as_one, train_in_two_processes
from tests.integration.runs import (
    DEVICE,
    Recipe,
    check_files,
    deterministic,
    last_checkpoint,
    output_of,
    start,
    steps_of,
)

RECIPE = Recipe("VoxCeleb/SpeakerRec_memeff", "VoxCeleb.csv")


RATE = 16000
SPEAKERS = 8
TEST_SPEAKERS = 2
UTTERANCES = 5
# Of the killed run. So many sounds that no checkpoint of it falls on the start
# of a list.
BATCH = 8
SOUNDS = 25
RESNETS = ["resnet", "revnet", "dfresnet", "dfrevnet"]
NETWORKS = [*RESNETS, "ecapa", "revecapa"]
SHALLOW = "{block_sizes: [1, 1, 1, 1]}"
NETWORK = [
    "--base_channels=2",
    "--lin_neurons=16",
    "--n_mels=24",
    f"--embedding_model={SHALLOW}",
]
RUN = [*NETWORK, "--num_workers=0", f"--device={DEVICE}"]
FAST = [*RUN, "--sentence_len=0.5"]


def voice(rng, pitch, formants, seconds):
    """A buzz at a pitch through resonances, in syllables."""
    time_axis = np.arange(int(seconds * RATE)) / RATE
    pitch = pitch * (
        1 + 0.05 * np.sin(2 * np.pi * rng.uniform(2, 4) * time_axis)
    )
    phase = 2 * np.pi * np.cumsum(pitch) / RATE
    samples = np.zeros_like(time_axis)
    for harmonic in range(1, 25):
        frequency = harmonic * pitch.mean()
        gain = sum(
            1 / (1 + ((frequency - formant) / 120) ** 2)
            for formant in formants * rng.uniform(0.95, 1.05)
        )
        samples += gain * np.sin(harmonic * phase)
    samples *= 0.3 + 0.7 * (np.sin(2 * np.pi * 3 * time_axis) > -0.5)
    samples += 0.01 * rng.standard_normal(len(samples))
    return (0.3 * samples / np.abs(samples).max()).astype("float32")


def make_corpus(folder):
    """Writes a corpus in the layout of VoxCeleb, noises and echoes too."""
    rng = np.random.default_rng(1)
    tests = []
    for speaker in range(SPEAKERS):
        pitch = 90 + 20 * speaker
        formants = rng.uniform([300, 900, 2200], [800, 1900, 3200])
        for utterance in range(UTTERANCES):
            name = f"id{speaker:05d}/session{utterance % 2}/{utterance:05d}.wav"
            path = folder / "wav" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            seconds = rng.uniform(2, 3)
            soundfile.write(path, voice(rng, pitch, formants, seconds), RATE)
            if speaker >= SPEAKERS - TEST_SPEAKERS:
                tests.append(name)
    with open(folder / "veri_test2.txt", "w", encoding="utf-8") as f:
        for a, b in itertools.combinations(tests, 2):
            f.write(f"{int(a.split('/')[0] == b.split('/')[0])} {a} {b}\n")
    for kind in ("noise", "rir"):
        (folder / kind).mkdir()
    for n in range(SOUNDS):
        noise = 0.1 * rng.standard_normal(RATE)
        soundfile.write(folder / "noise" / f"{n}.wav", noise, RATE)
        echo = rng.standard_normal(800) * np.exp(-np.arange(800) / 100)
        echo[0] = 5
        soundfile.write(folder / "rir" / f"{n}.wav", echo / 8, RATE)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A working folder with the corpus."""
    place = tmp_path_factory.mktemp("voxceleb")
    make_corpus(place / "data" / "tiny_voxceleb")
    return place


def test_table():
    RECIPE.check_table()


def test_every_key_is_used():
    RECIPE.check_keys(
        {
            'f"data_folder_{kind}"': ["data_folder_noise", "data_folder_rir"],
            'f"{kind}_annotation"': ["noise_annotation", "rir_annotation"],
            'f"{kind.upper()}_DATASET_URL"': [
                "NOISE_DATASET_URL",
                "RIR_DATASET_URL",
            ],
        }
    )


@pytest.mark.parametrize("script", [training, verification])
def test_the_scripts_list_their_keys(script):
    """All that they index with, so that a missing one has a sentence."""
    text = Path(script.__file__).read_text()
    used = set(re.findall(r'\bh?params\["(\w+)"\]', text))
    used |= set(re.findall(r"\.hparams\.(\w+)", text))
    assert used <= set(script.KEYS)


ON_SAMPLES = ["train_revnet.yaml", "verification_revnet.yaml"]


@pytest.fixture(scope="module")
def runs(place):
    """Every line of the table, run on the corpus, and two on samples."""

    def corpus(hparams):
        flags = {"--data_folder": "data/tiny_voxceleb"}
        if "ecapa" not in hparams:
            flags["--embedding_model"] = SHALLOW
        if hparams.startswith("train"):
            small = hparams == "train_resnet.yaml"
            flags["--batch_size"] = 8 if small else 16
            flags["--out_n_neurons"] = SPEAKERS - TEST_SPEAKERS
            if "ecapa" not in hparams:
                # At the recipe's rate the loss falls in so few steps by luck.
                flags["--lr"] = 0.01
        return flags

    return RECIPE.run_table(place, corpus, ON_SAMPLES)


@pytest.mark.parametrize("name", ON_SAMPLES)
def test_lines_on_samples(runs, name):
    row, folder, _ = runs[f"samples/{name}"]
    check_files(row, folder)
    assert not list(folder.glob("save/*.csv"))


@pytest.mark.parametrize("kind", NETWORKS)
def test_lines_on_the_corpus(runs, kind):
    for task, splits in (
        ("train", ["train", "dev"]),
        ("verification", ["enrol", "test"]),
    ):
        row, folder, _ = runs[f"{task}_{kind}.yaml"]
        check_files(row, folder)
        for split in splits:
            assert (folder / "save" / f"{split}.csv").is_file()
    _, folder, _ = runs[f"train_{kind}.yaml"]
    log = (folder / "train_log.txt").read_text()
    losses = [float(x) for x in re.findall(r"train loss: ([\d.e+-]+)", log)]
    steps = steps_of(log)
    assert len(losses) == 2 and losses[1] < losses[0]
    assert steps[0] > 0 and steps[1] == 2 * steps[0]
    with open(folder / "save" / "train.csv", newline="") as f:
        speakers = {row["spk_id"] for row in csv.DictReader(f)}
    assert len(speakers) == SPEAKERS - TEST_SPEAKERS


@pytest.mark.parametrize("kind", NETWORKS)
def test_untrained_verification(runs, kind):
    _, folder, text = runs[f"verification_{kind}.yaml"]
    assert "THE NETWORK IS UNTRAINED" in text
    results = json.loads((folder / "results.json").read_text())
    pairs = UTTERANCES * TEST_SPEAKERS
    assert results["trials"] == pairs * (pairs - 1) // 2
    assert results["utterances"] == pairs
    assert results["model"] is None
    assert f"EER(%)={results['eer']:.2f}" in text
    scores = (folder / "scores.txt").read_text().splitlines()
    assert len(scores) == results["trials"]


def test_trained_verification_with_score_norm(place, runs):
    _, trained, _ = runs["train_revnet.yaml"]
    folder = place / "results" / "normed"
    RECIPE.run(
        place,
        "speaker_verification_cosine.py",
        "verification_revnet.yaml",
        *RUN,
        "--data_folder=data/tiny_voxceleb",
        f"--pretrain_path={trained / 'save'}",
        f"--output_folder={folder}",
        "--score_norm=s-norm",
        "--n_train_snts=30",
        "--cohort_size=4",
        "--calibration_trials=100",
        f"--det_curve={folder / 'det.png'}",
    )
    assert (folder / "det.png").is_file()
    results = json.loads((folder / "results.json").read_text())
    checkpoint = Path(results["model"]).parent
    rates = [
        yaml.safe_load(path.read_text())["ErrorRate"]
        for path in trained.glob("save/CKPT*/CKPT.yaml")
    ]
    chosen = yaml.safe_load((checkpoint / "CKPT.yaml").read_text())
    assert chosen["ErrorRate"] == min(rates)
    assert list(results["stages"]) == ["cosine", "s-norm", "qmf"]
    plain = runs["verification_revnet.yaml"][1] / "scores.txt"
    assert plain.read_text() != (folder / "scores.txt").read_text()


def test_killed_run_continues(place):
    """SIGKILL within an epoch, then the same command again.

    Noise, echo, dropped frequencies and chunks in every batch, other speeds, a
    rising margin, an 8-bit optimizer: the weights are those of a run that was
    not interrupted, bit for bit. So is the mean of both epochs.
    """
    folder, straight = (place / "results" / n for n in ("killed", "straight"))
    data = place / "data" / "tiny_voxceleb"
    argv = RECIPE.argv(
        "train_speaker_embeddings.py",
        deterministic(place, RECIPE.folder / "hparams" / "train_revnet.yaml"),
        *RUN,
        "--sentence_len=1.0",
        f"--data_folder={data}",
        f"--data_folder_noise={data / 'noise'}",
        f"--data_folder_rir={data / 'rir'}",
        "--out_n_neurons=18",
        "--number_of_epochs=2",
        "--warmup_epochs=1",
        f"--batch_size={BATCH}",
        "--ckpt_interval_minutes=0",
        "--ckpt_interval_steps=3",
        "--wav_augment={min_augmentations: 4, max_augmentations: 4}",
        "--augment_prob=1.0",
        "--speeds=[100, 90, 110]",
        "--initial_margin=0.0",
        "--margin_epochs=[1, 2]",
        "--avg_checkpoints=2",
        f"--output_folder={folder}",
    )
    killed, _ = start(place, argv)
    deadline = time.time() + 200
    while not list(folder.glob("save/CKPT*/CKPT.yaml")):
        assert killed.is_alive() and time.time() < deadline
        time.sleep(0.02)
    killed.kill()
    killed.join()
    assert not (folder / "train_log.txt").exists(), "killed too late"
    (folder / "save" / "partial-CKPT+left-over").mkdir()

    text = output_of(place, argv)
    resumed = re.search(
        r"Resumed: (\d+) batches of the epoch and (\d+) optimizer", text
    )
    assert resumed and resumed[1] == resumed[2]
    done = int(resumed[1])
    # AddNoise goes through its list in batches, AddReverb one at a time.
    assert done >= 3 and done % 3 == 0
    assert done % -(-SOUNDS // BATCH) and done % SOUNDS
    with open(folder / "save" / "train.csv", newline="") as f:
        per_epoch = (len(f.readlines()) - 1) // BATCH
    assert done < per_epoch
    log = (folder / "train_log.txt").read_text()
    assert re.findall(r"epoch: (\d+)", log) == ["1", "2"]
    assert steps_of(log) == [per_epoch, 2 * per_epoch]
    # The schedule went on too: this is its last rate.
    rate = float(re.findall(r"lr: ([\d.e+-]+)", log)[-1])
    expected = 0.1 * 0.0005 ** ((per_epoch - 1) / per_epoch)
    assert rate == pytest.approx(expected, rel=0.01)
    assert not list(folder.glob("save/partial-*"))

    others = {
        f"--output_folder={folder}": f"--output_folder={straight}",
        "--num_workers=0": "--num_workers=1",
    }
    output_of(place, [others.get(a, a) for a in argv])
    for name in ("embedding_model", "classifier"):
        for there in (last_checkpoint, lambda f: f / "save"):
            ours, theirs = (
                torch.load(there(f) / f"{name}.ckpt")
                for f in (folder, straight)
            )
            for key, value in theirs.items():
                assert torch.equal(ours[key], value), key


def test_two_processes_are_one_that_accumulates(place, monkeypatch):
    """The same weights, bit for bit; 8-bit states, clipping.

    Each process normalises its own batches, as one that accumulates does.
    (Running statistics are those of the first process.)
    """

    def arguments(name):
        return [
            str(RECIPE.folder / "hparams" / "train_revnet.yaml"),
            *FAST,
            "--noprogressbar",
            f"--data_folder={place / 'data' / 'tiny_voxceleb'}",
            "--out_n_neurons=6",
            "--number_of_epochs=1",
            "--optimizer_step_limit=3",
            # Of so few steps there is no schedule.
            "--warmup_epochs=0",
            "--decay_factor=1.0",
            "--batch_size=5",
            "--augment_prob=0.0",
            f"--output_folder={place / 'results' / name}",
        ]

    (place / "two").mkdir()
    batches = train_in_two_processes(
        training.main, arguments("two"), place / "two"
    )
    ids = [name for batch in batches for name in batch.id]
    assert len(batches) == 6 and len(set(ids)) == len(ids) == 30
    train_as_one(training.main, arguments("one"), batches, monkeypatch)
    for name in training.TRAINED:
        two, one = (
            torch.load(last_checkpoint(place / "results" / n) / f"{name}.ckpt")
            for n in ("two", "one")
        )
        for key, value in one.items():
            if "running" not in key and "batches" not in key:
                assert torch.equal(two[key], value), key


def load(place, hparams, *overrides):
    """The loaded yaml file of a training run, with data prepared."""
    argv = RECIPE.argv(
        "train_speaker_embeddings.py",
        hparams,
        *FAST,
        f"--data_folder={place / 'data' / 'tiny_voxceleb'}",
        f"--output_folder={place / 'results' / 'loaded'}",
        *overrides,
    )
    path, run_opts, text = sb.parse_arguments(argv[1:])
    with open(path, encoding="utf-8") as f:
        return load_hyperpyyaml(f, text), run_opts


def test_all_resnets_get_the_same_data(place):
    """The same crops in the same order, however the networks draw."""
    batches = []
    for kind in RESNETS:
        hparams, run_opts = load(
            place, f"train_{kind}.yaml", "--out_n_neurons=6"
        )
        training.prepare_data(hparams)
        train_data, _, _ = training.dataio_prep(hparams)
        brain = training.SpeakerBrain(
            hparams["modules"], hparams["opt_class"], hparams, run_opts
        )
        loader = brain.make_dataloader(
            train_data, sb.Stage.TRAIN, batch_size=4, shuffle=True
        )
        loader.dataset.set_epoch(1)
        batches.append(next(iter(loader)))
    for batch in batches[1:]:
        assert batches[0].id == batch.id
        assert torch.equal(batches[0].sig.data, batch.sig.data)
    loader.dataset.set_epoch(2)
    other = next(iter(loader))
    assert not torch.equal(batches[0].sig.data, other.sig.data)


def test_schedule_follows_the_data(place):
    hparams, _ = load(
        place,
        "train_resnet.yaml",
        "--number_of_epochs=4",
        "--warmup_epochs=1",
        "--lr=0.5",
        "--initial_margin=0.1",
        "--margin_epochs=[2, 4]",
    )
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=9.0)
    annealing, margin = training.schedules(hparams, 11, 2)
    rates = []
    for _ in range(21):
        annealing(optimizer)
        rates.append(optimizer.param_groups[0]["lr"])
    # 11 batches are 5 steps of 2: 5 of warm-up, 15 of decay.
    assert rates[0] == 0 and rates[4] == pytest.approx(0.4)
    assert max(rates) == rates[5] == 0.5
    assert rates[20] == pytest.approx(0.5 * hparams["decay_factor"])
    margins = []
    for step in (0, 5, 10, 14, 15, 19):
        margin(step)
        margins.append(hparams["angular_margin"].margin)
    # Rises in the second and third epoch.
    assert margins[:2] == [0.1, 0.1] and margins[4:] == [0.2, 0.2]
    assert 0.1 < margins[2] < margins[3] < 0.2
    with pytest.raises(ValueError, match="1 full batches, too few"):
        training.schedules(hparams, 1, 2)


def test_augmentation_keeps_the_batch(place):
    """As many utterances come out; noise and echo only if named."""
    data = place / "data" / "tiny_voxceleb"
    plain, _ = load(place, "train_revnet.yaml")
    kinds = [
        type(a).__name__ for a in plain["wav_augment"].augmentations.values()
    ]
    assert kinds == ["DropFreq", "DropChunk"]
    full, _ = load(
        place,
        "train_revnet.yaml",
        f"--data_folder_noise={data / 'noise'}",
        f"--data_folder_rir={data / 'rir'}",
    )
    training.prepare_data(full)
    augment = full["wav_augment"]
    assert len(augment.augmentations) == 4
    wavs, lens = torch.rand(3, 8000), torch.tensor([1.0, 1.0, 0.5])
    unchanged = 0
    for seed in range(12):
        sb.utils.seed.seed_everything(seed, verbose=False)
        out, out_lens = augment(wavs, lens)
        assert out.shape == wavs.shape and torch.equal(out_lens, lens)
        unchanged += torch.equal(out, wavs)
    assert 0 < unchanged < 12


def test_perturbed_speeds_are_other_speakers(place):
    """A voice at 90 % is lower, and has a class of its own."""
    hparams, _ = load(
        place, "train_resnet.yaml", "--speeds=[100, 90, 110]", "--save_folder=s"
    )
    hparams["save_folder"] = str(place / "speeds")
    training.prepare_data(hparams)
    path = Path(hparams["save_folder"])
    hparams["train_annotation"] = str(path / "train.csv")
    hparams["valid_annotation"] = str(path / "dev.csv")
    train_data, valid_data, encoder = training.dataio_prep(hparams)
    speakers = SPEAKERS - TEST_SPEAKERS
    assert len(encoder) == 3 * speakers
    # The large-margin stage takes over the first classes.
    assert [encoder.ind2lab[n] for n in range(speakers)] == sorted(
        {row["spk_id"] for row in train_data.data.values()}
    )
    item = train_data[0]
    found = {}
    for seed in range(12):
        torch.manual_seed(seed)
        item = train_data[0]
        assert len(item["sig"]) == 8000
        label = encoder.decode_torch(item["spk_id_encoded"])[0]
        spectrum = torch.fft.rfft(item["sig"]).abs()
        centre = (spectrum * torch.arange(4001)).sum() / spectrum.sum()
        found.setdefault(label, []).append(float(centre))
    name = train_data.data[train_data.data_ids[0]]["spk_id"]
    slow, plain, fast = (
        sum(found[key]) / len(found[key])
        for key in (f"{name}_speed90", name, f"{name}_speed110")
    )
    assert len(found) == 3 and slow < 0.97 * plain < 0.95 * fast
    for number in range(len(valid_data)):
        label = valid_data[number]["spk_id_encoded"]
        assert int(label) < speakers


def test_large_margin_stage(place):
    """It goes on from the embedding model and the speakers' prototypes."""
    data = place / "data" / "tiny_voxceleb"
    first = place / "results" / "first"
    common = [*FAST, f"--data_folder={data}", "--batch_size=16"]
    RECIPE.run(
        place,
        "train_speaker_embeddings.py",
        "train_revnet.yaml",
        *common,
        "--speeds=[100, 90]",
        "--out_n_neurons=12",
        "--number_of_epochs=2",
        "--warmup_epochs=1",
        "--avg_checkpoints=2",
        f"--output_folder={first}",
    )
    checkpoints = [p.parent for p in first.glob("save/CKPT*/CKPT.yaml")]
    assert len(checkpoints) == 2
    for name in training.TRAINED:
        mean = torch.load(first / "save" / f"{name}.ckpt")
        states = [torch.load(c / f"{name}.ckpt") for c in checkpoints]
        for key, value in mean.items():
            expected = sum(state[key].double() for state in states) / 2
            torch.testing.assert_close(value.double(), expected)
    arguments = [
        "train_speaker_embeddings.py",
        "train_revnet.yaml",
        *common,
        f"--large_margin={first / 'save'}",
        # So low a rate that the weights hardly move.
        "--lr=0.00000001",
        "--number_of_epochs=2",
    ]
    text = RECIPE.run(place, *arguments, "--out_n_neurons=6")
    assert f"starts from {first / 'save'}" in text
    second = first / "large_margin"
    log = (second / "train_log.txt").read_text()
    assert re.findall(r"margin: ([\d.e+-]+)", log) == ["5.00e-01"] * 2
    saved = yaml.safe_load(
        re.sub(r"!\S+", "", (second / "hyperparams.yaml").read_text())
    )
    assert saved["sentence_len"] == 0.5 and saved["speeds"] == [100]
    for name in training.TRAINED:
        before = torch.load(first / "save" / f"{name}.ckpt")
        after = torch.load(last_checkpoint(second) / f"{name}.ckpt")
        for key, value in after.items():
            if "running" in key or "batches" in key:
                continue
            torch.testing.assert_close(
                value, before[key][: len(value)], rtol=0, atol=1e-5
            )


def test_output_folder_of_other_data(place):
    hparams, _ = load(place, "train_resnet.yaml")
    training.prepare_data(hparams)
    path = Path(hparams["save_folder"]) / "label_encoder.txt"
    other = sb.dataio.encoder.CategoricalEncoder()
    other.update_from_iterable(["nobody"], sequence_input=False)
    other.save(path)
    with pytest.raises(ValueError, match="lacks the speaker id00000"):
        training.dataio_prep(hparams)
    path.unlink()


def test_too_few_outputs():
    with pytest.raises(ValueError, match="has 6 speakers.*out_n_neurons is 5"):
        training.check_speakers(6, 5)
    training.check_speakers(6, 6)


def test_missing_data_raises_one_sentence_and_writes_no_file(place):
    folder = place / "results" / "never"
    text = RECIPE.run(
        place,
        "train_speaker_embeddings.py",
        "train_resnet.yaml",
        *FAST,
        "--data_folder=/no/such",
        f"--output_folder={folder}",
        fails=True,
    )
    assert text.splitlines()[-1].startswith(
        "FileNotFoundError: There is no folder /no/such/wav: set data_folder"
    )
    assert not [p for p in folder.rglob("*") if p.is_file()]


@pytest.mark.parametrize(
    ("overrides", "error", "sentence"),
    [
        (
            ["--verification_file=/no/list.txt"],
            FileNotFoundError,
            "no list of trials /no/list.txt",
        ),
        (
            ["--skip_prep=True", "--train_annotation=/no/train.csv"],
            FileNotFoundError,
            "no /no/train.csv",
        ),
        (
            ["--number_of_epochs=2"],
            ValueError,
            "warmup_epochs=2 must be less than number_of_epochs=2",
        ),
        (
            ["--avg_checkpoints=61"],
            ValueError,
            "avg_checkpoints=61 must be 1 to number_of_epochs=60",
        ),
        (["--speeds=[90]"], ValueError, "percentages, 100 among them"),
        (["--speeds=[100, 90, 90]"], ValueError, "different percentages"),
        (
            ["--initial_margin=0.3"],
            ValueError,
            "initial_margin=0.3 must be 0 to margin=0.2",
        ),
        (
            ["--initial_margin=0", "--margin_epochs=[20, 61]"],
            ValueError,
            "up to number_of_epochs=60",
        ),
        (["--augment_prob=1.5"], ValueError, "augment_prob=1.5 must be 0 to 1"),
        (
            ["--k_top=7", "--out_n_neurons=7"],
            ValueError,
            "k_top=7 must be less than out_n_neurons=7",
        ),
        (
            ["--large_margin=/no/save"],
            FileNotFoundError,
            "no finished training in /no/save: set large_margin",
        ),
    ],
)
def test_training_errors(place, overrides, error, sentence):
    hparams, _ = load(place, "train_resnet.yaml", *overrides)
    with pytest.raises(error, match=sentence):
        training.check_data(hparams)


def test_a_run_without_a_list_of_trials(place):
    hparams, _ = load(place, "train_resnet.yaml", "--verification_file=null")
    training.check_data(hparams)


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"score_norm": "x-norm"}, ValueError, "s-norm or null, got 'x-norm'"),
        ({"pretrain_path": "/no/save"}, FileNotFoundError, "in /no/save: set"),
        (
            {"skip_prep": True, "enrol_data": "/no/enrol.csv"},
            FileNotFoundError,
            "no /no/enrol.csv: with skip_prep",
        ),
        (
            {"score_norm": "s-norm"},
            FileNotFoundError,
            "no /no/train.csv: .* set train_data to the train.csv in the save",
        ),
        (
            {"calibration_trials": 9},
            ValueError,
            "calibration_trials=9 .* set score_norm to s-norm",
        ),
        ({"det_curve": "det.txt"}, ValueError, "det_curve must end in .png"),
    ],
)
def test_verification_errors(place, change, error, sentence):
    data = place / "data" / "tiny_voxceleb"
    params = {
        "data_folder": str(data),
        "verification_file": str(data / "veri_test2.txt"),
        "save_folder": "unused",
        "skip_prep": False,
        "score_norm": None,
        "train_data": "/no/train.csv",
        "calibration_trials": 0,
        "det_curve": None,
        "pretrain_path": None,
    }
    verification.check_params(params)
    with pytest.raises(error, match=sentence):
        verification.check_params({**params, **change})


if __name__ == "__main__":
    make_corpus(Path(sys.argv[1]))
