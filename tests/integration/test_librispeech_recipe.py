"""The LibriSpeech transducer recipe, run as a user runs it, on spoken tones.

The lines of tests/recipes/LibriSpeech.csv are for the samples in SpeechBrain's
repository. Here they run on corpora with the layout of LibriSpeech, which

    python tests/integration/test_librispeech_recipe.py data

writes, and one on such samples.

Authors
 * The sb_memeff authors 2026
"""

import re
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import speechbrain as sb
import torch
import train as recipe
import yaml
from hyperpyyaml import load_hyperpyyaml

from sb_memeff.optim import AdamW8bit
from tests.integration.as_one import train_as_one, train_in_two_processes
from tests.integration.runs import (
    DEVICE,
    Recipe,
    check_files,
    deterministic,
    last_checkpoint,
    start,
    steps_of,
)
from tests.unittests.bf16 import HAS_BF16_LSTM

RECIPE = Recipe("LibriSpeech/ASR/transducer_memeff", "LibriSpeech.csv")


RATE = 16000
# So many that no checkpoint of the killed run falls on the start of a list.
SOUNDS = 37
# A word is a tone.
WORDS = {"LOW": 300, "MIDDLE": 900, "HIGH": 2500}
UTTERANCES = {"train": 40, "dev": 6, "test": 6}
LIBRISPEECH = {
    "train-clean-100": "train",
    "dev-clean": "dev",
    "test-clean": "test",
    "test-other": "test",
}
NETWORK = [
    "--d_model=16",
    "--num_encoder_layers=1",
    "--d_ffn=32",
    "--joint_dim=16",
    "--dec_dim=16",
    f"--output_neurons={len(set(' '.join(WORDS))) + 1}",
]


def speak(rng, words):
    """Tones with pauses."""
    pieces = []
    for word in words:
        seconds = rng.uniform(0.2, 0.3)
        phase = 2 * np.pi * WORDS[word] * np.arange(int(seconds * RATE)) / RATE
        pieces += [0.3 * np.sin(phase), np.zeros(RATE // 20)]
    samples = np.concatenate(pieces)
    return samples + 0.01 * rng.standard_normal(len(samples))


def make_corpora(folder):
    """Writes tiny_digits and tiny_librispeech: names of the splits differ."""
    rng = np.random.default_rng(1)
    digits = {name: name for name in UTTERANCES}
    for corpus, splits in (
        ("tiny_digits", digits),
        ("tiny_librispeech", LIBRISPEECH),
    ):
        for number, (split, kind) in enumerate(splits.items()):
            chapter = folder / corpus / split / str(number) / "1"
            chapter.mkdir(parents=True)
            lines = []
            for n in range(UTTERANCES[kind]):
                words = rng.choice(list(WORDS), rng.integers(1, 5))
                name = f"{number}-1-{n:04d}"
                path = chapter / f"{name}.flac"
                soundfile.write(path, speak(rng, words), RATE)
                lines.append(f"{name} {' '.join(words)}\n")
            (chapter / f"{number}-1.trans.txt").write_text("".join(lines))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A working folder with the corpora."""
    place = tmp_path_factory.mktemp("librispeech")
    make_corpora(place / "data")
    return place


# The flags of each line for its corpus.
CORPORA = {
    "conformer_transducer.yaml": {
        "--data_folder": "data/tiny_librispeech",
        "--train_splits": '["train-clean-100"]',
        "--token_type": "unigram",
        "--output_neurons": 12,
        "--max_batch_len": 10,
        "--num_bucket": 5,
    },
    "digits_transducer.yaml": {
        "--data_folder": "data/tiny_digits",
        "--output_neurons": 11,
        "--max_batch_len": 8,
    },
}


@pytest.fixture(scope="module")
def runs(place):
    """Every line of the table, run on its corpus, and one on samples."""
    on_samples = ["conformer_transducer.yaml"]
    return RECIPE.run_table(place, CORPORA.get, on_samples)


def digits(place, name, *flags):
    """Arguments of a small run on tiny_digits."""
    return [
        str(RECIPE.folder / "hparams" / "digits_transducer.yaml"),
        f"--data_folder={place / 'data' / 'tiny_digits'}",
        f"--output_folder={place / 'results' / name}",
        f"--device={DEVICE}",
        "--noprogressbar",
        "--max_batch_len=4",
        "--number_of_epochs=2",
        *NETWORK,
        *flags,
    ]


def load(arguments):
    """The loaded yaml file."""
    path, _, overrides = sb.parse_arguments(arguments)
    with open(path, encoding="utf-8") as f:
        return load_hyperpyyaml(f, overrides)


def losses_of(log):
    return [float(x) for x in re.findall(r"train loss: ([\d.e+-]+)", log)]


def test_table():
    RECIPE.check_table()


def test_every_key_is_used():
    loops = {
        'f"{name}_dataloader_opts"': [
            "train_dataloader_opts",
            "valid_dataloader_opts",
        ],
        '("wav_augment", "fea_augment")': ["wav_augment", "fea_augment"],
    }
    RECIPE.check_keys(loops)


def test_a_line_on_samples(runs):
    row, folder, _ = runs["samples/conformer_transducer.yaml"]
    check_files(row, folder)


@pytest.mark.parametrize("kind", ["conformer", "digits"])
def test_lines_on_the_corpora(runs, kind):
    _, folder, _ = runs[f"{kind}_transducer.yaml"]
    digits = kind == "digits"
    splits = ["test"] if digits else ["test-clean", "test-other"]
    for split in ("train", "dev" if digits else "dev-clean", *splits):
        assert (folder / f"{split}.csv").is_file()
    log = (folder / "train_log.txt").read_text()
    losses, steps = losses_of(log), steps_of(log)
    assert len(losses) == 2 and losses[1] < losses[0]
    assert steps[0] > 0 and steps[1] == 2 * steps[0]
    tests = re.findall(
        r"test: (\S+), averaged checkpoints: 2 .*WER: (\S+)", log
    )
    assert [name for name, _ in tests] == splits
    for name, wer in tests:
        report = (folder / f"wer_{name}.txt").read_text()
        assert float(re.search(r"WER (\S+)", report)[1]) == pytest.approx(
            float(wer), rel=0.01
        )
    # Testing leaves the checkpoints as they are.
    found = [
        yaml.safe_load(p.read_text()) for p in folder.glob("save/*/CKPT.yaml")
    ]
    assert sorted(c["epoch"] for c in found) == [1, 2]
    assert not list(folder.rglob("*.partial"))


def test_nothing_is_downloaded(runs):
    for _, _, text in runs.values():
        assert "huggingface" not in text.lower() and "Fetch" not in text


def with_noise_and_echo(place):
    """The yaml file of the digits, with both in every batch."""
    rng = np.random.default_rng(2)
    lines = ["ID,duration,wav,wav_format,wav_opts"]
    for n in range(SOUNDS):
        path = place / f"{n}.wav"
        sound = rng.standard_normal(400) * np.exp(-np.arange(400) / 50)
        soundfile.write(path, 0.1 * sound, RATE)
        lines.append(f"{n},{400 / RATE},{path},wav,")
    sounds = place / "sounds.csv"
    sounds.write_text("\n".join(lines) + "\n")
    text = (RECIPE.folder / "hparams" / "digits_transducer.yaml").read_text()
    augmentations = "\n        - !ref <speed_perturb>" + "".join(
        f"\n        - !new:speechbrain.augment.time_domain.{kind}"
        f"\n            csv_file: {sounds}"
        for kind in ("AddNoise", "AddReverb")
    )
    for old, new in (
        (" [!ref <speed_perturb>]", augmentations),
        ("_augmentations: 1", "_augmentations: 3"),
    ):
        assert old in text
        text = text.replace(old, new)
    path = place / "with_noise_and_echo.yaml"
    path.write_text(text)
    return path


def test_killed_run_continues(place):
    """SIGKILL within the second epoch, then the same command again.

    Dynamic batches, dropout, noise, echo, speed perturbation, dynamic chunks:
    the weights are those of a run that was not interrupted, bit for bit.
    """
    hparams = deterministic(place, with_noise_and_echo(place))
    flags = ["--ckpt_interval_minutes=0", "--ckpt_interval_steps=2"]
    if DEVICE != "cpu":  # torch has no deterministic gradient of CTC there
        flags.append("--ctc_weight=0")
    killed = digits(place, "killed", *flags)[1:]
    folder = place / "results" / "killed"
    process, _ = start(place, RECIPE.argv("train.py", hparams, *killed))

    def in_second_epoch():
        for path in folder.glob("save/CKPT*/brain.ckpt"):
            state = yaml.safe_load(path.read_text())
            if 0 < state["step"] < state["optimizer_step"]:
                return True
        return False

    deadline = time.time() + 200
    while not in_second_epoch():
        assert process.is_alive() and time.time() < deadline
        time.sleep(0.01)
    process.kill()
    process.join()
    assert len(steps_of((folder / "train_log.txt").read_text())) == 1

    text = RECIPE.run(place, "train.py", hparams, *killed)
    resumed = re.search(
        r"Resumed: ([1-9]\d*) batches of the epoch and (\d+) optimizer", text
    )
    # Each batch takes one echo.
    assert resumed and int(resumed[2]) % SOUNDS
    straight = digits(place, "straight", *flags)[1:]
    RECIPE.run(place, "train.py", hparams, *straight)
    for name in ("model", "optimizer", "normalizer"):
        ours, theirs = (
            torch.load(
                last_checkpoint(place / "results" / n) / f"{name}.ckpt",
                weights_only=False,
            )
            for n in ("killed", "straight")
        )
        flat = torch.utils._pytree.tree_leaves
        for a, b in zip(flat(ours), flat(theirs), strict=True):
            same = torch.equal(a, b) if torch.is_tensor(a) else a == b
            assert same, name


def test_the_methods_train_the_same(place):
    """Steps with dropout and augmentation; float32's noise is left."""
    weights, losses = [], []
    for method in ("tiled", "samplewise", "batched"):
        arguments = digits(
            place, method, f"--transducer_method={method}", "--max_rows=100"
        )
        recipe.main(arguments + ["--optimizer_step_limit=5", "--beam_size=1"])
        path = place / "results" / method
        losses.append(losses_of((path / "train_log.txt").read_text())[0])
        weights.append(torch.load(last_checkpoint(path) / "model.ckpt"))
    assert losses == pytest.approx([losses[2]] * 3, rel=1e-3)
    # CTC's gradient on a GPU differs from run to run.
    atol = 1e-4 if DEVICE == "cpu" else 1e-3
    for found in weights[:2]:
        for key, value in weights[2].items():
            torch.testing.assert_close(found[key], value, rtol=1e-3, atol=atol)


def test_two_processes_are_one_that_accumulates(place, monkeypatch):
    """The same weights, with dynamic batches of several sizes.

    The sum over a batch is the transducer's gradient, and the mean of these sums
    that of two processes.
    """

    def arguments(name):
        return [
            *digits(place, name),
            "--optimizer_step_limit=4",
            # Global statistics would see both batches of a step at once.
            "--normalize={norm_type: sentence}",
            "--wav_augment={augment_prob: 0.0}",
            "--CNN={dropout: 0.0}",
            "--transformer_dropout=0.0",
            "--dec_emb_dropout=0.0",
            "--dec_dropout=0.0",
            "--beam_size=1",
        ]

    folder = place / "two"
    folder.mkdir()
    batches = train_in_two_processes(
        recipe.main,
        [*arguments("two"), "--find_unused_parameters"],
        folder,
    )
    assert len({len(batch.id) for batch in batches}) > 1
    train_as_one(recipe.main, arguments("one"), batches, monkeypatch)
    two, one = (
        torch.load(last_checkpoint(place / "results" / n) / "model.ckpt")
        for n in ("two", "one")
    )
    start = load(arguments("one"))["model"].state_dict()
    assert any(not torch.equal(one[key], start[key]) for key in one)
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-5, atol=1e-7)


def brain_of(hparams):
    recipe.prepare_data(hparams)
    tokenizer = recipe.load_tokenizer(hparams)
    data = recipe.dataio_prepare(hparams, tokenizer)
    brain = recipe.ASR(
        hparams["modules"],
        hparams["opt_class"],
        hparams,
        {"device": DEVICE, "noprogressbar": True},
    )
    brain.tokenizer = tokenizer
    hparams["epoch_counter"].current = 1
    return brain, data


def test_no_logits_between_forward_and_backward(place):
    hparams = load(digits(place, "outputs"))
    brain, (train_data, *_) = brain_of(hparams)
    loader = brain.make_dataloader(train_data, sb.Stage.TRAIN, batch_size=4)
    batch = next(iter(loader))
    outputs = brain.compute_forward(batch, sb.Stage.TRAIN)
    tensors = [x for x in outputs.values() if torch.is_tensor(x)]
    assert tensors and all(x.dim() < 4 for x in tensors)
    loss = brain.compute_objectives(outputs, batch, sb.Stage.TRAIN)
    loss.backward()
    for name, parameter in brain.modules.named_parameters():
        # The embedding is a fixed one-hot code.
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_every_feature_at_once(place):
    """8-bit AdamW, bf16, chunks, recomputed layers, static batches, FastEmit..."""
    text = (RECIPE.folder / "hparams" / "conformer_transducer.yaml").read_text()
    text = text.replace("torch.optim.AdamW\n", "sb_memeff.optim.AdamW8bit\n")
    commented = r"(?m)^( *)# (dec_lin: .*)$"
    text, uncommented = re.subn(commented, r"\1\2", text)
    text = re.sub(r"(?m)^# (    \w+: .*)$", r"\1", text)
    text = text.replace(
        "<transducer_lin>]\n\n#", "<transducer_lin>, !ref <dec_lin>]\n\n#"
    )
    assert uncommented == 2
    path = place / "features.yaml"
    path.write_text(text)
    folder = place / "results" / "features"
    recipe.main(
        [
            str(path),
            f"--data_folder={place / 'data' / 'tiny_librispeech'}",
            f"--output_folder={folder}",
            '--train_splits=["train-clean-100"]',
            '--test_splits=["test-clean"]',
            f'--test_csv=["{folder}/test-clean.csv"]',
            f"--device={DEVICE}",
            "--noprogressbar",
            f"--precision={'bf16' if HAS_BF16_LSTM else 'fp32'}",
            "--pretrained_lm_tokenizer_path=null",
            "--dynamic_batching=False",
            "--sorting=ascending",
            "--fastemit_lambda=0.01",
            "--ce_weight=0.2",
            "--recompute=True",
            "--recompute_split=3",
            "--token_type=char",
            "--nhead=2",
            "--beam_size=3",
            "--number_of_epochs=2",
            "--number_of_ctc_epochs=1",
            "--num_workers=0",
            "--warmup_steps=10",
            "--grad_accumulation_factor=2",
            *NETWORK,
        ]
    )
    log = (folder / "train_log.txt").read_text()
    assert log.count(f"optimizer: {AdamW8bit.__name__}") == 2
    # 40 utterances in batches of 8, two batches a step.
    assert steps_of(log) == [2, 4]
    assert "test: test-clean" in log


def test_upstream_order_of_the_model(place):
    """The keys of SpeechBrain's model.ckpt: modules by their number."""
    arguments = digits(place, "order")
    arguments[0] = arguments[0].replace("digits", "conformer")
    hparams = load(
        arguments + ["--nhead=2", "--pretrained_lm_tokenizer_path=null"]
    )
    names = "CNN enc emb dec proj_enc proj_dec proj_ctc transducer_lin".split()
    ours = hparams["model"].state_dict()
    expected = {
        f"{n}.{key}": value
        for n, name in enumerate(names)
        for key, value in hparams[name].state_dict().items()
    }
    assert list(ours) == list(expected)
    assert "7.w.weight" in ours and "3.rnn.weight_ih_l0" in ours
    # Optimizer checkpoints number the language model too; it only searches.
    modules = [p for m in hparams["modules"].values() for p in m.parameters()]
    model = {*hparams["model"].parameters(), *hparams["lm_model"].parameters()}
    assert model == set(modules)
    assert hparams["Beamsearcher"].lm_weight == 0


def test_language_model_when_named(place):
    arguments = digits(
        place, "lm", "--pretrained_lm_tokenizer_path=/some/where"
    )
    arguments[0] = arguments[0].replace("digits", "conformer")
    hparams = load(arguments + ["--nhead=2"])
    assert hparams["Beamsearcher"].lm_weight == 0.5
    assert hparams["Beamsearcher"].lm is hparams["lm_model"]


def test_pretrained_model(place):
    """The weights of a model.ckpt alone; the rest begins anew."""
    start = load(digits(place, "start"))["model"].state_dict()
    changed = {name: value + 1 for name, value in start.items()}
    path = place / "model.ckpt"
    torch.save(changed, path)
    hparams = load(digits(place, "pretrained"))
    recipe.load_pretrained(hparams)
    assert torch.equal(
        hparams["model"].state_dict()["7.w.weight"], start["7.w.weight"]
    )
    recipe.load_pretrained({**hparams, "pretrained_model": str(path)})
    for name, value in hparams["model"].state_dict().items():
        assert torch.equal(value, changed[name])
    with pytest.raises(FileNotFoundError, match="set pretrained_model"):
        recipe.check_data({**hparams, "pretrained_model": "/no/such.ckpt"})


@pytest.mark.parametrize(
    ("flags", "error", "sentence"),
    [
        (["--data_folder=/no/such"], FileNotFoundError, "set data_folder"),
        (
            ['--dev_splits=["dev-clean"]'],
            ValueError,
            "valid_csv is .*dev.csv, which is not the csv file of any split",
        ),
        (
            ['--train_splits=["train", "more"]'],
            FileNotFoundError,
            "has no split more; it has dev, test, train",
        ),
        (["--skip_prep=True"], FileNotFoundError, "There is no .*train"),
        (["--ctc_weight=1.5"], ValueError, "ctc_weight=1.5 and ce_weight"),
        (["--ce_weight=0.1"], ValueError, "ce_weight=0.1 needs a dec_lin"),
        (["--sorting=up"], ValueError, "sorting=up must be"),
    ],
)
def test_errors_before_anything_is_written(place, flags, error, sentence):
    kept = [
        f for f in digits(place, "never") if f.split("=")[0] not in flags[0]
    ]
    with pytest.raises(error, match=sentence):
        recipe.main(kept + flags)
    folder = place / "results" / "never"
    assert not [path for path in folder.rglob("*") if path.is_file()]


def test_tokens_that_do_not_fit(place):
    hparams = load(digits(place, "tokens"))
    recipe.prepare_data(hparams)
    for neurons in (5, 20):
        hparams["output_neurons"] = neurons
        message = f"11 tokens but output_neurons is {neurons}: set --output_"
        with pytest.raises(ValueError, match=message):
            recipe.load_tokenizer(hparams)
    hparams = load(digits(place, "pieces", "--token_type=bpe"))
    hparams["output_neurons"] = 999
    recipe.prepare_data(hparams)
    with pytest.raises(ValueError, match="output_neurons=999 bpe tokens"):
        recipe.load_tokenizer(hparams)
    assert not (place / "results" / "pieces" / "save" / "tokenizer").exists()


def test_transcript_that_cannot_be_spelled(place):
    hparams = load(digits(place, "spelling"))
    recipe.prepare_data(hparams)
    tokenizer = recipe.load_tokenizer(hparams)
    path = Path(hparams["valid_csv"])
    path.write_text(path.read_text().replace("LOW", "LÖW"))
    with pytest.raises(ValueError, match="spell the transcript of 1-1-.*LÖW"):
        recipe.dataio_prepare(hparams, tokenizer)


if __name__ == "__main__":
    make_corpora(Path(sys.argv[1]))
