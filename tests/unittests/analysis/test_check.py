"""The check passes what trains right, and names the place of every fault.

Authors
 * The sb_memeff authors 2026
"""

import contextlib

import pytest
import torch
from torch import nn

from sb_memeff.analysis.check import check_recipe
from sb_memeff.analysis.recipe import read_recipe
from sb_memeff.nnet.replay import recorder
from sb_memeff.nnet.replay.mismatch import set_mismatch_action
from sb_memeff.nnet.reversible import AdditiveCoupling
from sb_memeff.nnet.transducer_loss.passes import TiledPass
from tests.unittests.analysis.shallow import shallow  # noqa: F401
from tests.unittests.analysis.yaml_files import (
    LIBRISPEECH,
    SMALL_TRANSDUCER,
    SPEAKER_NETWORKS,
    conformer_transducer,
    speaker_yaml,
    upstream_transducer,
)
from tests.unittests.bf16 import needs_bf16_lstm

STORED = "gradients against stored activations"
LOGITS = "gradients against all logits at once"
# Their predictor is an LSTM.
transducer_precisions = pytest.mark.parametrize(
    "precision", ["fp32", pytest.param("bf16", marks=needs_bf16_lstm)]
)


def speaker(network, **overrides):
    path, small = speaker_yaml(network)
    return read_recipe(path, {**small, **overrides})


def transducer(**overrides):
    path = LIBRISPEECH / "hparams" / "digits_transducer.yaml"
    return read_recipe(path, {**SMALL_TRANSDUCER, **overrides})


def check(recipe, change=None, precision="fp32", seconds=0.5, **options):
    """The report, after something was done to the step."""
    build = recipe.build

    def build_changed():
        step = build()
        change(step)
        return step

    if change is not None:
        recipe.build = build_changed
    report = check_recipe(recipe, 2, seconds, precision, **options)
    verdict = "passed" if report.passed else "failed"
    assert str(report).splitlines() == [*report.lines, verdict]
    assert report.passed != any("FAILED" in line for line in report.lines)
    return report


def line_of(report, what):
    (line,) = (n for n in report.lines if n.startswith(f"{what}: "))
    return line


def place(report, what):
    """Where a check failed."""
    _, failed, where = line_of(report, what).partition("FAILED: ")
    assert failed, report
    return where


def checks(report):
    return [line.partition(":")[0] for line in report.lines[1:]]


# --- what is right passes ----------------------------------------------------


@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("network", SPEAKER_NETWORKS)
def test_speaker_networks(network, precision):
    report = check(speaker(network), precision=precision)
    assert report.passed, report
    if network in ("resnet", "dfresnet"):
        assert checks(report)[:1] == ["finite"]
        assert report.lines[1].endswith("ok")
        assert report.lines[2].startswith("Nothing in this step saves memory")
        assert len(report.lines) == 3
        return
    assert report.lines[0].endswith(
        f"{precision}, cpu; saves memory in embedding_model"
    )
    inversion = [] if network == "ecapa" else ["inversion"]
    assert checks(report) == [
        *("finite", *inversion, STORED, "running statistics")
    ]
    if inversion:
        assert "error at most 0 in" in line_of(report, "inversion")


@transducer_precisions
@pytest.mark.parametrize("method", ["tiled", "samplewise"])
def test_transducers(method, precision):
    recipe = transducer(transducer_method=method, max_rows=7)
    report = check(recipe, precision=precision)
    assert report.passed, report
    assert report.lines[0].endswith("saves memory in transducer_loss")
    assert checks(report) == ["finite", LOGITS, "running statistics"]


@pytest.mark.parametrize(
    "split, attention", [(1, "RelPosMHAXL"), (2, "RelPosMHAXL"), (2, "RoPEMHA")]
)
def test_a_transducer_whose_layers_recompute(split, attention, tmp_path):
    options = {"recompute": True, "recompute_split": split}
    options["attention_type"] = attention
    path = conformer_transducer(tmp_path)
    report = check(read_recipe(path, {**SMALL_TRANSDUCER, **options}))
    assert report.passed, report
    layers = "enc.transformer.encoder.layers"
    assert report.lines[0].endswith(f"in CNN, {layers}.0, {layers}.1, 1 more")
    assert checks(report) == ["finite", STORED, LOGITS, "running statistics"]


def test_fp16_scales_the_loss_down_until_its_gradients_are_finite():
    def raise_gradients(step):
        step.compute_cost.loss_fn.scale = 1e4

    report = check(speaker("revnet"), raise_gradients, "fp16")
    assert report.passed, report
    # Of 65504 at most.
    assert float(line_of(report, "finite").split()[2].rstrip(",")) > 1000


def test_precision_is_by_default_that_of_the_yaml_file():
    report = check(speaker("revnet", precision="bf16"), precision=None)
    assert ", bf16, cpu" in report.lines[0]


def test_speechbrains_transducer_loss_is_replaced_on_the_cpu(tmp_path):
    path = upstream_transducer(tmp_path)
    report = check(read_recipe(path, SMALL_TRANSDUCER))
    assert report.passed
    assert report.lines[-1].startswith("Nothing")


def test_dropout_in_the_joint_network_is_no_fault():
    def change(step):
        loss = step.transducer_loss
        loss.classifier = nn.Sequential(nn.Dropout(0.5), loss.classifier)

    assert check(transducer(max_rows=7), change).passed


def test_random_numbers_are_those_of_before():
    before = torch.get_rng_state()
    check(speaker("revnet"))
    assert torch.equal(torch.get_rng_state(), before)


# --- faults ------------------------------------------------------------------


class OneGridStepOff(AdditiveCoupling):
    def backward_streams(self, y, dy, run, shape):
        (x1, x2), dx = super().backward_streams(y, dy, run, shape)
        return (x1 + 2.0**-12, x2), dx


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_coupling_that_is_not_undone(precision):
    def change(step):
        block = step.embedding_model.trunk.blocks[7]
        assert type(block) is AdditiveCoupling
        block.__class__ = OneGridStepOff

    report = check(speaker("revnet"), change, precision)
    # Not those that are walked after it, whose streams are wrong too.
    assert place(report, "inversion") == "embedding_model.trunk.blocks.7"


class Louder(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return 1.001 * gradient


class LouderWhenReplayed(nn.Conv2d):
    def forward(self, x):
        weight = self.weight
        if not isinstance(weight, nn.Parameter):
            weight = Louder.apply(weight)
        return self._conv_forward(x, weight, self.bias)


@pytest.mark.parametrize("layer", [0, 1])
def test_a_scaled_gradient(layer):
    """Before the last convolution of f, too, which is zero at first."""

    def change(step):
        f = step.embedding_model.trunk.blocks[2].f
        assert not f.layers[1].conv.weight.any()
        f.layers[layer].conv.__class__ = LouderWhenReplayed

    report = check(speaker("revnet"), change)
    assert place(report, STORED) == (
        f"embedding_model.trunk.blocks.2.f.layers.{layer}.conv.weight"
    )
    assert "error 0.001 " in line_of(report, STORED)
    for what in ("finite", "inversion", "running statistics"):
        assert line_of(report, what).endswith("ok")


class Hardly(nn.Module):
    """Adds a parameter whose gradient is next to nothing."""

    def __init__(self):
        super().__init__()
        self.parameter = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        parameter = self.parameter
        if not isinstance(parameter, nn.Parameter):
            parameter = Louder.apply(parameter)
        return x + 1e-9 * parameter


def test_gradients_that_are_zero_up_to_rounding_may_differ():
    def change(step):
        layer = step.embedding_model.trunk.blocks[2].f.layers[0]
        layer.norm = nn.Sequential(layer.norm, Hardly())

    report = check(speaker("revnet"), change)
    assert report.passed, report
    assert "most in embedding_model.trunk.blocks.2.f.layers.0.norm.1" in (
        line_of(report, STORED)
    )


def test_batch_norms_that_count_twice(monkeypatch):
    monkeypatch.setattr(
        recorder, "without_trace", lambda *_: contextlib.nullcontext()
    )
    report = check(speaker("revnet"))
    where = place(report, "running statistics")
    assert where.startswith("embedding_model.trunk.blocks.")
    assert where.endswith(".norm.num_batches_tracked")
    assert line_of(report, STORED).endswith("ok")


@pytest.mark.parametrize("saving", [True, False])
def test_running_statistics_that_are_not_a_number(saving):
    class Spoiling(nn.Module):
        """Whose statistics are NaN with the saving, or without it."""

        save_memory = True

        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(3))

        def forward(self, x):
            self.mean[1] = torch.nan if self.save_memory is saving else 1.0
            return x

    def change(step):
        step.classifier = nn.Sequential(step.classifier, Spoiling())

    report = check(speaker("revnet"), change)
    assert place(report, "running statistics") == "classifier.1.mean"
    assert "error inf" in line_of(report, "running statistics")
    assert line_of(report, STORED).endswith("ok")


@transducer_precisions
def test_a_transducer_loss_that_drops_cells(precision, monkeypatch):
    backward = TiledPass.backward

    def drop(self, *args):
        self.occupancy_floor = 0.2
        backward(self, *args)

    monkeypatch.setattr(TiledPass, "backward", drop)
    recipe = transducer()
    report = check(recipe, precision=precision, seconds=1.0)
    assert place(report, LOGITS) in dict(recipe.build().named_parameters())
    assert line_of(report, "finite").endswith("ok")


def test_a_recomputed_layer_that_does_not_repeat(tmp_path):
    class Drifting(nn.Module):
        calls = 0

        def forward(self, x):
            type(self).calls += 1
            return x * (1 + 0.01 * type(self).calls)

    def change(step):
        layer = step.enc.transformer.encoder.layers[1]
        layer.ffn_module1 = nn.Sequential(layer.ffn_module1, Drifting())

    overrides = {
        **SMALL_TRANSDUCER,
        "transducer_method": "batched",
        "recompute": True,
        "recompute_split": 1,
    }
    path = conformer_transducer(tmp_path)
    recipe = read_recipe(path, overrides)
    report = check(recipe, change)
    assert not report.passed
    assert "encoder.layers.1 cannot be computed again" in report.lines[-1]
    # Gradients are compared only if training continues after a mismatch.
    set_mismatch_action("warn")
    try:
        report = check(read_recipe(path, overrides), change)
    finally:
        set_mismatch_action("error")
    assert place(report, STORED).startswith("enc.transformer.encoder.layers.")


class Kink(nn.Module):
    """Finite, but not its gradient."""

    def __init__(self):
        super().__init__()
        self.parameter = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return x + 0 * self.parameter.sqrt()


@pytest.mark.parametrize("network", ["resnet", "revnet"])
def test_a_gradient_that_is_not_finite(network):
    def change(step):
        step.classifier = nn.Sequential(Kink(), step.classifier)

    report = check(speaker(network), change)
    assert place(report, "finite") == "classifier.0.parameter"
    assert "loss nan" not in line_of(report, "finite")


def test_a_loss_that_is_not_finite():
    def change(step):
        step.classifier.weight.data[0, 0] = torch.inf

    report = check(speaker("revnet"), change)
    assert place(report, "finite").startswith("loss, ")


def test_errors_of_the_reversible_engine_fail_the_check():
    def change(step):
        step.embedding_model.trunk.blocks[0].conv.weight.data *= 1e5

    report = check(speaker("revnet"), change)
    fault = place(report, "training step")
    assert "the stream reached" in fault and "blocks.1" in fault
    assert len(report.lines) == 2


# --- bad input ---------------------------------------------------------------


@pytest.mark.parametrize(
    "options, words",
    [
        ({"precision": "fp8"}, "'fp8' must be one of fp32, bf16, fp16"),
        ({"device": "meta"}, "device meta: "),
        ({"device": "gpu"}, "device gpu: "),
        ({"seconds": 0.001}, "does not run, not even without saving memory"),
        ({"seconds": 0.0}, "seconds=0.0 must be positive"),
    ],
)
def test_bad_input(options, words):
    with pytest.raises(ValueError, match=words) as caught:
        check(transducer(), **options)
    assert "\n" not in str(caught.value)
