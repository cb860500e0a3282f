"""The largest batch that fits: searched for, then profiled."""

import pytest
from hyperpyyaml import load_hyperpyyaml

from sb_memeff.analysis.fit import fit, usable, yaml_line
from sb_memeff.analysis.profile import Profile, profile
from sb_memeff.analysis.recipe import read_recipe
from sb_memeff.lobes.models.WeSpeakerResNet import ResNet
from sb_memeff.memory.step import StepMemory
from sb_memeff.nnet.recompute.blocks import is_split
from sb_memeff.nnet.recompute.fit import Recomputation
from tests.unittests.analysis.recognition_yaml import SEQ2SEQ, TRANSFORMER
from tests.unittests.analysis.yaml_files import (
    LIBRISPEECH,
    SMALL_TRANSDUCER,
    UPSTREAM_SPEAKERS,
    changed,
    speaker_yaml,
)
from tests.unittests.one_analysis import one_analysis  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_analysis")

XVECTOR = {"sentence_len": 0.5, "batch_size": 9}
DIGITS = LIBRISPEECH / "hparams/digits_transducer.yaml"
SMALL = {**SMALL_TRANSDUCER, "num_encoder_layers": 1}


@pytest.fixture
def xvector(tmp_path):
    """The smallest network."""
    path = tmp_path / "train_xvector.yaml"
    path.write_text(UPSTREAM_SPEAKERS["xvector"])
    return path


def peak(path, overrides, batch=None, seconds=None, tokens=None):
    recipe = read_recipe(path, overrides)
    return profile(recipe, batch, seconds, tokens).memory.peak_bytes


# --- the budget --------------------------------------------------------------


def test_usable():
    assert usable("10.5GB") == 9_500_000_000
    assert usable(2_500_000_000) == 1_900_000_000
    assert usable("1GiB", "1MiB") == 2**30 - 2**20
    assert usable("300MB", 1) == 299_999_999


@pytest.mark.parametrize(
    ("budget", "margin", "message"),
    [
        ("500MB", None, "500 MB leaves nothing besides 500 MB for CUDA's"),
        ("1GB", "1GB", "1.00 GB leaves nothing besides a margin of 1.00 GB"),
        ("1GB", "2GB", "besides a margin of 2.00 GB: give a larger --budget"),
        ("11", None, "not '11'"),
        ("1GB", "much", "not 'much'"),
    ],
)
def test_no_budget(budget, margin, message):
    with pytest.raises(ValueError, match=message):
        usable(budget, margin)


# --- speakers ----------------------------------------------------------------


@pytest.mark.parametrize("seconds", [None, 1.5])
def test_the_largest_batch(seconds, xvector):
    limit = 40_000_000
    seen = []
    found = fit(xvector, XVECTOR, limit, seconds=seconds, progress=seen.append)
    batch = found.overrides["batch_size"]
    assert found.overrides == {
        "batch_size": batch,
        "sentence_len": seconds or 0.5,
    }
    # With the overrides the recipe takes the reported memory, and one utterance
    # more does not fit.
    assert found.limit == limit
    assert (found.profile.batch, found.profile.label) == (
        batch,
        "SpeechBrain's Xvector",
    )
    assert found.profile.memory.peak_bytes == peak(xvector, found.overrides)
    assert peak(xvector, found.overrides) <= limit
    assert peak(xvector, found.overrides, batch + 1) > limit
    assert found.profile in seen
    assert len({one.batch for one in seen}) == len(seen)


def test_the_longest_utterance(xvector):
    limit = 10_000_000
    found = fit(xvector, XVECTOR, limit, batch=4)
    seconds = found.profile.seconds
    assert found.overrides == {"batch_size": 4, "sentence_len": seconds}
    assert round(10 * seconds) == pytest.approx(10 * seconds, abs=1e-9)
    assert peak(xvector, found.overrides) <= limit
    assert peak(xvector, found.overrides, 4, seconds + 0.1) > limit


def test_precision_and_the_length_without_a_key(xvector, tmp_path):
    limit = peak(xvector, XVECTOR, 3, 0.5)
    path = changed(xvector, tmp_path, ("sentence_len: 3.0\n", ""))
    found = fit(path, {}, limit, seconds=0.5, precision="bf16")
    assert found.profile.precision == "bf16"
    assert list(found.overrides) == ["batch_size"]


@pytest.fixture
def presets(monkeypatch):
    """Small presets of two families, in no order."""
    sizes = {
        "ResNet100": [3, 3, 3, 3],
        "ResNet9": [1, 1, 1, 1],
        "GeminiResNet200": [4, 4, 4, 4],
        "ResNet11": [2, 1, 1, 1],
    }
    known = {
        name: {"block": "basic", "block_sizes": blocks}
        for name, blocks in sizes.items()
    }
    monkeypatch.setattr(ResNet, "PRESETS", known)


def test_the_deepest_preset(presets):
    path, small = speaker_yaml("resnet")
    overrides = {**small, "preset": "ResNet100"}
    peaks = {
        preset: peak(path, {**overrides, "preset": preset}, 2, 0.3)
        for preset in ("ResNet9", "ResNet11", "ResNet100")
    }
    assert sorted(peaks.values()) == list(peaks.values())
    seen = []
    for preset, limit in peaks.items():
        seen.clear()
        found = fit(path, overrides, limit, 2, 0.3, progress=seen.append)
        assert found.overrides == {
            "preset": preset,
            "batch_size": 2,
            "sentence_len": 0.3,
        }
        assert found.profile.label == preset
        assert found.profile.memory.peak_bytes == limit
        tried = [one.label for one in seen]
        assert tried == ["ResNet100", "ResNet11", "ResNet9"][: len(tried)]
        assert tried[-1] == preset
        if preset == "ResNet9":
            with pytest.raises(ValueError, match="no preset fits") as caught:
                fit(path, overrides, limit - 1, 2, 0.3)
            assert "2 x 0.3 s; ResNet9 takes" in str(caught.value)


# --- transducers -------------------------------------------------------------


@pytest.fixture(scope="module")
def longest_batch():
    """The largest max_batch_len for utterances of up to four seconds."""
    return fit(DIGITS, SMALL, 16_000_000, seconds=4.0)


@pytest.mark.parametrize("seconds", [0.5, 1.7, 3.3, 4.0])
def test_the_found_dynamic_batch_fits(seconds, longest_batch):
    total = longest_batch.overrides["max_batch_len"]
    assert longest_batch.overrides == {"max_batch_len": total}
    assert total > 3 * 4
    needed = peak(DIGITS, SMALL, int(total // seconds), seconds)
    assert needed <= longest_batch.limit
    # It is not much too careful either.
    if seconds == 4.0:
        assert needed > 0.75 * longest_batch.limit


def imitate(monkeypatch, cost):
    """Lets an utterance of s seconds take cost(s), and nothing else."""

    def fake_profile(recipe, batch, seconds, tokens, precision, variant):
        size = int(batch * cost(seconds))
        memory = StepMemory(0, 0, 0, size, "", "", {("", "activations"): size})
        return Profile("", batch, batch, seconds, tokens, "", "", memory)

    monkeypatch.setattr("sb_memeff.analysis.fit.profile", fake_profile)


@pytest.mark.parametrize("longest", [0.02, 0.3, 1.0, 4.7, 16.9, 25.0, None])
@pytest.mark.parametrize("square", [0, 1, 30])
def test_max_batch_len_is_the_largest(longest, square, monkeypatch):
    def cost(seconds):
        return 1000 * seconds + square * seconds**2

    def worst(total):
        # All batches of up to that many seconds, but one of a single
        # utterance, which a sampler gives alone however long it is.
        return max(
            int(n * cost(min(total / n, top)))
            for n in range(2, 2 + int(total / top) + 5)
        )

    imitate(monkeypatch, cost)
    top = longest or 25
    limit = int(7.3 * cost(top)) + 5000
    found = fit(DIGITS, {}, limit, seconds=longest)
    total = found.overrides["max_batch_len"]
    assert found.profile.memory.peak_bytes <= limit
    assert worst(total) <= 1.001 * limit
    assert worst(total + 1) > 0.999 * limit


@pytest.mark.parametrize("batch", [1, 2, 37])
def test_a_transducer_without_dynamic_batching(batch, monkeypatch):
    # One utterance alone is a batch too: there is no batch norm.
    imitate(monkeypatch, lambda seconds: 1000 * seconds)
    static = {"dynamic_batching": False}
    found = fit(DIGITS, static, 2000 * batch + 1999, seconds=2.0, tokens=5)
    assert found.overrides == {"batch_size": batch}
    assert found.profile.tokens == 5


def test_a_batch_that_is_given_is_not_dynamic(monkeypatch):
    imitate(monkeypatch, lambda seconds: 1000 * seconds)
    found = fit(DIGITS, {}, 20_190, batch=2)
    assert found.profile.seconds == 10.0
    assert found.overrides == {"batch_size": 2, "dynamic_batching": False}
    recipe = read_recipe(DIGITS, found.overrides)
    assert recipe.default_batch(10.0) == (2, 10.0)


def test_a_length_in_frames(tmp_path, monkeypatch):
    imitate(monkeypatch, lambda seconds: 1000 * seconds)
    path = tmp_path / "train.yaml"
    path.write_text(SEQ2SEQ)
    # A batch of three utterances has up to 60 s.
    dynamic = {"dynamic_batching": True}
    found = fit(path, dynamic, 60_999, seconds=20.0)
    assert found.overrides == {"max_batch_length": 6000}
    assert (found.profile.batch, found.profile.seconds) == (3, 20.0)


# --- the cheapest recomputation ----------------------------------------------


@pytest.mark.parametrize(
    "limit, chosen",
    [
        (1000, None),
        (750, "every: 1.5"),
        (650, "every: 1.5, first_output_only: True"),
        (500, ""),
        (399, "split: 2"),
        (110, "first_output_only: True, split: 4"),
    ],
)
def test_the_cheapest_recomputation(limit, chosen, monkeypatch):
    """Of the CNN and two layers."""
    blocks = "[CNN, enc.transformer.encoder.layers.*]"

    def fake_profile(recipe, batch, seconds, tokens, precision, variant):
        label, _, options = variant.label.partition(", ")
        assert label == "tiled"
        size = 1000
        if options:
            how = load_hyperpyyaml(f"how: {{{options}}}")["how"]
            assert how["blocks"] == ["CNN", "enc.transformer.encoder.layers.*"]
            recomputed = 3 / how.get("every", 1)
            size -= 180 * recomputed - 40
            size = (size - 100) / how.get("split", 1)
            size += 0 if how.get("first_output_only") else 100
        memory = StepMemory(0, 0, 0, size, "", "", {("", "activations"): size})
        return Profile(
            variant.label, batch, batch, seconds, tokens, "", "", memory
        )

    monkeypatch.setattr("sb_memeff.analysis.fit.profile", fake_profile)
    found = fit(DIGITS, SMALL_TRANSDUCER, limit, 4, 2.0)
    assert found.overrides == {"batch_size": 4, "dynamic_batching": False}
    if chosen is None:
        assert found.yaml is None and found.profile.label == "tiled"
        return
    options = f"blocks: {blocks}" + (chosen and f", {chosen}")
    assert found.profile.label == f"tiled, {options}"
    assert found.yaml == (
        "__recompute: !apply:sb_memeff.nnet.recompute.recompute_blocks "
        f"{{module: !ref <modules>, {options}}}"
    )


def test_the_recomputation_of_a_transformer(tmp_path, monkeypatch):
    def fake_profile(recipe, batch, seconds, tokens, precision, variant):
        size = 500 if "blocks: " in variant.label else 1000
        memory = StepMemory(0, 0, 0, size, "", "", {("", "activations"): size})
        return Profile("", batch, batch, seconds, tokens, "", "", memory)

    monkeypatch.setattr("sb_memeff.analysis.fit.profile", fake_profile)
    path = tmp_path / "train.yaml"
    path.write_text(TRANSFORMER)
    found = fit(path, {}, 600, 4, 2.0)
    assert found.overrides == {"batch_size": 4, "dynamic_batching": False}
    assert found.yaml == (
        "__recompute: !apply:sb_memeff.nnet.recompute.recompute_blocks "
        "{module: !ref <modules>, blocks: [CNN, Transformer.encoder.layers.*, "
        "Transformer.decoder.layers.*], every: 4.0}"
    )


def test_the_printed_line_of_yaml(tmp_path):
    how = Recomputation(every=1.5, first_output_only=True, split=4)
    line = yaml_line(how, ("CNN", "enc.transformer.encoder.layers.*"))
    before = "\nmodel: !new:"
    path = changed(DIGITS, tmp_path, (before, f"\n{line}\n{before}"))
    step = read_recipe(path, SMALL_TRANSDUCER).build()
    layers = step.enc.transformer.encoder.layers
    assert [is_split(x) for x in (step.CNN, *layers)] == [True, True, False]


# --- bad input ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "a batch of 2 x 0.5 s takes"),
        ({"batch": 4}, "a batch of 4 x 0.5 s takes"),
        ({"batch": 4, "seconds": 1.0}, "has no preset to choose"),
        ({"batch": 0}, "batch=0 must be positive"),
        ({"seconds": float("nan")}, "seconds=nan must be positive"),
        ({"tokens": 3}, "has no transcripts, so tokens=3 does not apply"),
        ({"precision": "FP32"}, "precision=FP32 must be fp32, bf16 or fp16"),
    ],
)
def test_bad_input_is_one_sentence(arguments, message, xvector):
    with pytest.raises(ValueError, match=message) as caught:
        fit(xvector, XVECTOR, 10_000, **arguments)
    assert "\n" not in str(caught.value)


def test_a_budget_below_the_parameters(xvector):
    with pytest.raises(ValueError, match="Xvector does not fit into") as caught:
        fit(xvector, XVECTOR, 5_000)
    memory = profile(read_recipe(xvector, XVECTOR), 2, 0.5).memory
    kinds = memory.by_kind
    fixed = kinds["parameters"] + kinds["buffers"]
    fixed += kinds["gradients"] + kinds["optimizer states"]
    assert fixed > 5_000
    assert (
        f"of which {fixed / 1000:.1f} kB are parameters, buffers, gradients "
        f"and optimizer states." in str(caught.value)
    )


@pytest.mark.parametrize("preset", ["RevNet35", "ResNet34", "hello", "5"])
def test_unknown_presets(preset):
    path, small = speaker_yaml("revnet")
    overrides = {**small, "preset": preset}
    with pytest.raises(ValueError, match=f"no preset '?{preset}'?; it has Rev"):
        fit(path, overrides, 10**9, batch=2, seconds=0.3)


def test_a_preset_that_is_no_networks(xvector):
    path = xvector
    path.write_text(path.read_text() + "\npreset: hello\n")
    with pytest.raises(ValueError, match="has no preset to choose"):
        fit(path, XVECTOR, 10**9, batch=2, seconds=0.3)
