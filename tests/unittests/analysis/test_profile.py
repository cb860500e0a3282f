"""The memory of a recipe's step, against its Brain's."""

import pytest
import torch

from sb_memeff.analysis import profile as analysis
from sb_memeff.analysis.families.transducer import _speechbrain_loss
from sb_memeff.analysis.profile import comparison, profile, report
from sb_memeff.analysis.recipe import read_recipe
from sb_memeff.memory.tracker import StorageTracker
from tests.unittests.allocator import allocator_peak, assert_near_allocator
from tests.unittests.analysis.brains import (
    Batch,
    make_brain,
    script,
    transducer_batches,
)
from tests.unittests.analysis.shallow import shallow  # noqa: F401
from tests.unittests.analysis.yaml_files import (
    LIBRISPEECH,
    SMALL_TRANSDUCER,
    UPSTREAM_SPEAKERS,
    VOXCELEB,
    speaker_yaml,
    upstream_transducer,
)
from tests.unittests.one_analysis import one_analysis  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_analysis", "shallow")

DIGITS = LIBRISPEECH / "hparams/digits_transducer.yaml"


# Multiples of 16 channels, so that oneDNN does not pad them.
WIDE = {
    "resnet": {"base_channels": 16, "lin_neurons": 64},
    "revnet": {
        "base_channels": 16,
        "lin_neurons": 64,
        "downsampling": "strided",
    },
    "revecapa": {
        "channels": [64, 64, 192],
        "kernel_sizes": [5, 3, 1],
        "dilations": [1, 2, 1],
        "groups": [1, 1, 1],
        "lin_neurons": 64,
    },
}


@pytest.mark.parametrize("network", WIDE)
def test_a_speaker_recipe_takes_what_its_brain_takes(
    network, tmp_path, monkeypatch
):
    training = script(VOXCELEB, "train_speaker_embeddings", monkeypatch)
    path = VOXCELEB / f"hparams/train_{network}.yaml"
    overrides = {**WIDE[network], "out_n_neurons": 20}
    recipe = read_recipe(path, overrides)
    wavs, lens, speakers = recipe.build().batch(6, 1.0)
    batch = Batch(sig=(wavs, lens), spk_id_encoded=(speakers, lens))

    def train():
        brain = make_brain(training.SpeakerBrain, path, overrides, tmp_path)
        brain.hparams.wav_augment = lambda wavs, lens: (wavs, lens)
        brain.lr_annealing = lambda optimizer: None
        brain.margin_schedule = lambda step: None
        brain.init_optimizers()
        for _ in range(2):
            brain.fit_batch(batch)

    inputs = sum(x.nbytes for x in (wavs, lens, speakers))
    found = profile(recipe, 6, 1.0).memory
    expected = allocator_peak(train) + inputs
    assert found.peak_bytes == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("method", ["tiled", "samplewise", "batched"])
def test_a_transducer_recipe_takes_what_its_brain_takes(
    method, tmp_path, monkeypatch
):
    training = script(LIBRISPEECH, "train", monkeypatch)
    # As many rows as on the CPU of the Brain; an analysis takes a GPU's.
    overrides = {
        "transducer_method": method,
        "output_neurons": 500,
        "max_rows": 2048,
    }
    recipe = read_recipe(DIGITS, overrides)
    arguments, batch = transducer_batches(recipe.build(), 4, 4.0, 40)

    def train():
        brain = make_brain(training.ASR, DIGITS, overrides, tmp_path)
        for key in ("wav_augment", "fea_augment"):
            if hasattr(brain.hparams, key):
                delattr(brain.hparams, key)
        # All cells, because the analysis has no occupancies.
        brain.modules.transducer_loss.occupancy_floor = 0
        brain.hparams.noam_annealing = lambda optimizer: None
        brain.init_optimizers()
        for _ in range(2):
            brain.fit_batch(batch)

    inputs = sum(x.nbytes for x in arguments)
    found = profile(recipe, 4, 4.0, 40).memory
    expected = allocator_peak(train) + inputs
    assert found.peak_bytes == pytest.approx(expected, rel=0.02)


def test_augmentation_multiplies_the_batch(tmp_path):
    path = tmp_path / "train.yaml"
    path.write_text(UPSTREAM_SPEAKERS["xvector"])
    recipe = read_recipe(path)
    found = profile(recipe, 2, 1.0)
    assert (found.batch, found.rows) == (2, 10)
    assert "batch 2 x 1 s (times 5 by augmentation: 10)" in report(found)
    # What the network keeps is that of ten utterances.
    more = profile(recipe, 4, 1.0).memory.saved_bytes
    assert more == pytest.approx(2 * found.memory.saved_bytes, rel=0.01)


def test_speechbrains_transducer_loss_holds_logits_and_gradients(tmp_path):
    small = {
        **SMALL_TRANSDUCER,
        "output_neurons": 500,
        "num_encoder_layers": 1,
    }
    recipe = read_recipe(upstream_transducer(tmp_path), small)
    found = {
        variant.label: profile(recipe, 32, 4.0, 40, variant=variant).memory
        for variant in recipe.variants()
        if variant.label in ("SpeechBrain's loss", "batched", "tiled")
    }
    # 32 x 101 x 41 cells, of which a GPU's tile is a quarter; logits, their
    # logarithms, the loss's gradients and those of the logits.
    logits = 32 * 101 * 41 * 500 * 4
    theirs = found["SpeechBrain's loss"].peak_bytes
    assert theirs - found["tiled"].peak_bytes > 3 * logits
    assert found["batched"].peak_bytes < theirs


def test_speechbrains_loss_takes_four_times_its_logits():
    """Logits, their logarithms, and the gradients of both."""
    with StorageTracker() as tracker:
        logits = torch.zeros(2, 5, 3, 100, requires_grad=True)
        _speechbrain_loss(logits, None, None, None).backward()
    assert 4 <= tracker.peak / logits.nbytes < 4.1


def test_precision_and_batch_are_the_recipes_by_default():
    path, overrides = speaker_yaml("resnet")
    recipe = read_recipe(
        path, {**overrides, "base_channels": 16, "precision": "bf16"}
    )
    found = profile(recipe)
    assert (found.batch, found.seconds, found.precision) == (128, 3.0, "bf16")
    full = profile(recipe, precision="fp32")
    assert found.memory.peak_bytes < full.memory.peak_bytes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"precision": "fp8"}, "precision=fp8 must be fp32, bf16 or fp16"),
        ({"tokens": 5}, "has no transcripts, so tokens=5 does not apply"),
        ({"batch": 0}, "batch=0 must be positive"),
        ({"seconds": -1.0}, "seconds=-1.0 must be positive"),
    ],
)
def test_arguments_that_do_not_apply(arguments, message):
    path, overrides = speaker_yaml("revnet")
    with pytest.raises(ValueError, match=message):
        profile(read_recipe(path, overrides), **arguments)


def test_the_step_can_be_run_beside_its_analysis():
    path, overrides = speaker_yaml("revnet")
    found = profile(read_recipe(path, overrides), 2, 1.0, device="cpu")
    peak = found.memory.peak_bytes
    assert found.measured_bytes == pytest.approx(peak, rel=0.02)
    assert "measured in a real step: " in report(found)


def test_a_step_that_also_runs_on_a_gpu_is_counted_with_kernels(monkeypatch):
    """They need less memory than the plain forms."""
    path, overrides = speaker_yaml("revnet")
    recipe = read_recipe(path, {**overrides, "base_channels": 16})
    plain = profile(recipe, 8, 1.0).memory
    count = analysis.training_step_memory

    def without_gpu(*args, fake=True, device="cpu"):
        return count(*args) if fake else plain

    monkeypatch.setattr(analysis, "training_step_memory", without_gpu)
    found = profile(recipe, 8, 1.0, device="cuda")
    assert found.measured_bytes == plain.peak_bytes
    assert found.memory.peak_bytes < 0.95 * plain.peak_bytes


@pytest.mark.gpu
def test_the_analysis_agrees_with_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    path = VOXCELEB / "hparams/train_revnet.yaml"
    found = profile(read_recipe(path), 32, 2.0, device="cuda")
    assert_near_allocator(found.memory.peak_bytes, found.measured_bytes)


def test_the_report_sums_to_the_peak():
    path, overrides = speaker_yaml("revnet")
    recipe = read_recipe(path, {**overrides, "base_channels": 16})
    found = profile(recipe, 16, 2.0)
    text = report(found)
    first, second = text.splitlines()[:2]
    assert first.startswith("RevNet34 Type II: batch 16 x 2 s, fp32, SGD8bit, ")
    assert "in backward, at embedding_model.trunk.blocks." in second
    for title in ("kind", "module", "largest layers"):
        block = text[text.index(f"\n{title} ") :].strip().split("\n\n")[0]
        shares = [float(r.split()[-1][:-1]) for r in block.splitlines()[1:]]
        assert shares and all(share > 0 for share in shares)
        if title != "largest layers":
            assert sum(shares) == pytest.approx(100, abs=0.5)


def test_the_comparison_is_a_table():
    path, overrides = speaker_yaml("revnet")
    recipe = read_recipe(path, overrides)
    found = [profile(recipe, 4, 1.0, variant=v) for v in recipe.variants()]
    head, _, titles, *rows = comparison(found).splitlines()
    assert head == "batch 4 x 1 s, fp32, SGD8bit"
    assert titles.split()[:4] == ["parameters", "(M)", "peak", "ratio"]
    assert [row[: row.index("  ")] for row in rows] == [
        "ResNet34",
        "ResNet34, blocks recomputed",
        "RevNet34 Type I",
        "RevNet34 Type II",
    ]
    assert "1.0x" in rows[0]
    ratio = found[0].memory.peak_bytes / found[-1].memory.peak_bytes
    assert f"{ratio:.1f}x" in rows[-1]
    assert len({len(row) for row in rows}) == 1


def test_small_transducers_are_analysed(tmp_path):
    recipe = read_recipe(DIGITS, SMALL_TRANSDUCER)
    before = torch.get_rng_state()
    found = profile(recipe, 2, 1.0)
    assert found.tokens == 5
    assert torch.equal(before, torch.get_rng_state())
