"""Recipes of speech recognition: their steps, memory and batches."""

import pytest
import torch

from sb_memeff.analysis.fit import fit
from sb_memeff.analysis.profile import profile
from sb_memeff.analysis.recipe import read_recipe
from sb_memeff.nnet.recompute import store_blocks
from sb_memeff.nnet.transducer_loss.logits_loss import transducer_loss
from tests.unittests.allocator import allocator_peak
from tests.unittests.analysis.recognition_yaml import (
    CTC,
    PHONEME_TRANSDUCER,
    RECOGNITION,
    SEQ2SEQ,
    TRANSFORMER,
)
from tests.unittests.one_analysis import one_analysis  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_analysis")


@pytest.fixture
def read(tmp_path):
    """Reads a text as a recipe."""

    def read_text(text, **overrides):
        path = tmp_path / "train.yaml"
        path.write_text(text)
        return read_recipe(path, overrides)

    return read_text


# --- the loss ----------------------------------------------------------------


def expected_loss(step, batch):
    """What the recipe's script computes, from the modules of the step."""
    call, weight = step._functions, step.settings.get("ctc_weight")
    feats = call["compute_features"](batch.wavs)
    ones = batch.wav_lens
    feats = step.normalize(feats, ones)
    if hasattr(step, "Transformer"):
        decoded = None
        if hasattr(step, "seq_lin"):
            decoded = batch.tokens_bos
        encoded, out = step.Transformer(step.CNN(feats), decoded, ones)
        decoded = None if decoded is None else out
    elif hasattr(step, "model"):
        p_ctc = step.output(step.model(feats)).log_softmax(-1)
        return call["compute_cost"](p_ctc, batch.tokens, ones, ones)
    elif hasattr(step, "enc_lin"):
        encoded = step.enc_lin(step.enc(feats))
        decoded = step.dec_lin(step.dec(step.emb(batch.tokens_bos))[0])
        joint = step.Tjoint(encoded[:, :, None], decoded[:, None])
        logits = step.output(joint)
        return transducer_loss(logits, batch.tokens, ones, ones, blank_index=0)
    else:
        encoded = step.enc(feats)
        decoded, _ = step.dec(step.emb(batch.tokens_bos), encoded, ones)
    p_ctc = step.ctc_lin(encoded).log_softmax(-1)
    loss = call["ctc_cost"](p_ctc, batch.tokens, ones, ones)
    if decoded is None:
        return loss
    p_seq = step.seq_lin(decoded).log_softmax(-1)
    seq = call["seq_cost"](p_seq, batch.tokens_eos, length=ones)
    return weight * loss + (1 - weight) * seq


@pytest.mark.parametrize("family", RECOGNITION)
def test_the_loss_is_the_scripts(family, read):
    recipe = read(RECOGNITION[family])
    assert recipe.family == family
    torch.manual_seed(0)
    step = recipe.build()
    if hasattr(step, "logits_loss"):
        # SpeechBrain's needs a GPU.
        step.logits_loss = lambda *x: transducer_loss(*x, blank_index=0)
    batch = step.batch(3, 1.0)
    loss = step(*batch)
    loss.backward()
    # A one-hot embedding is fixed.
    for parameter in step.parameters():
        assert (parameter.grad is not None) == parameter.requires_grad
    torch.testing.assert_close(loss, expected_loss(step, batch))


def test_ctc_ends_after_its_epochs(read):
    step = read(SEQ2SEQ, number_of_ctc_epochs=0).build()
    step(*step.batch(2, 1.0)).backward()
    assert "p_ctc" not in step.outputs
    assert all(p.grad is None for p in step.ctc_lin.parameters())


def test_augmentation_multiplies_labels_too(read):
    augment = """
wav_augment: !new:speechbrain.augment.augmenter.Augmenter
    concat_original: True
    augmentations: [!new:torch.nn.Identity []]

fea_augment: !new:speechbrain.augment.augmenter.Augmenter
    parallel_augment: True
    augmentations: [!new:torch.nn.Identity [], !new:torch.nn.Identity []]
"""
    step = read(TRANSFORMER + augment).build()
    assert step.copies == 4
    step(*step.batch(2, 1.0)).backward()
    assert len(step.outputs["p_ctc"]) == len(step.outputs["p_seq"]) == 8


# --- memory ------------------------------------------------------------------


def check_peak(recipe, seconds):
    """Compares the counted peak with the allocator's; returns what was counted."""
    found = profile(recipe, 4, seconds).memory

    def train():
        step = recipe.build()
        step.imitate_gpu()
        step.inputs = step.batch(4, seconds)
        optimizer = step.optimizer()
        for _ in range(2):
            step(*step.inputs).backward()
            optimizer.step()
            optimizer.zero_grad()

    assert found.peak_bytes == pytest.approx(allocator_peak(train), rel=0.03)
    return found


@pytest.mark.parametrize("family", RECOGNITION)
def test_the_peak_is_the_allocators(family, read):
    wide = {"d_model": 64, "d_ffn": 256} if "transformer" in family else {}
    # Peaks at the loss: within an LSTM the CPU's operators use memory of their
    # own.
    recipe = read(RECOGNITION[family], output_neurons=1000, **wide)
    check_peak(recipe, 3.0)


@pytest.mark.parametrize("rnn", ["LiGRU", "SLiGRU"])
def test_the_peak_with_a_recurrence_in_python(rnn, read):
    text = CTC.replace("nnet.RNN.LSTM", f"nnet.RNN.{rnn}")
    text = text.replace("cnn_channels: [4]", "cnn_channels: [32]")
    found = check_peak(read(text), 1.0)
    # The masks, which the first step makes anew.
    assert found.by_kind["buffers"] > 16000 * 16 * 4


def test_rows_of_a_comparison(read):
    recipe = read(TRANSFORMER)
    own, *others = recipe.variants()
    assert own.label == "conformer with CTC and attention"
    for variant in others:
        step = recipe.build()
        variant.change(step)
        assert store_blocks(step) == [
            "CNN",
            *(f"Transformer.encoder.layers.{i}" for i in range(2)),
            "Transformer.decoder.layers.0",
        ]
    assert [v.label for v in read(CTC).variants()] == [
        "SpeechBrain's CRDNN with CTC"
    ]
    assert [v.label for v in read(PHONEME_TRANSDUCER).variants()] == [
        "SpeechBrain's loss",
        *("batched", "samplewise", "tiled"),
    ]


# --- batches -----------------------------------------------------------------


def test_default_batches(read):
    assert read(CTC).default_batch() == (6, 8)
    assert read(TRANSFORMER).default_batch() == (4, 15)
    assert read(TRANSFORMER, max_batch_length_train=1).default_batch(3) == (
        1,
        3,
    )
    assert read(SEQ2SEQ).default_batch(2) == (6, 2)
    # Its maximum is in frames of 10 ms.
    assert read(SEQ2SEQ, dynamic_batching=True).default_batch(2) == (30, 2)
    # The sampler may limit the number of utterances, too.
    text = TRANSFORMER + "dynamic_batch_sampler_train: {max_batch_ex: 7}\n"
    assert read(text).default_batch(1) == (7, 1)
    assert read(text).default_batch(15) == (4, 15)
    # Without a size, batches are dynamic.
    text = TRANSFORMER.replace("dynamic_batching: True\n", "")
    text = text.replace("batch_size: 6\n", "")
    recipe = read(text)
    assert recipe.default_batch() == (4, 15)
    with pytest.raises(ValueError, match="no number batch_size.*omit --batch"):
        fit(recipe.path, {}, 10**9, batch=2)


# --- what is refused ---------------------------------------------------------


def refuse(text, *words, read):
    with pytest.raises(ValueError) as caught:
        read(text).default_batch()
    message = str(caught.value)
    assert "\n" not in message
    for word in ("train.yaml", *words):
        assert word in message, message


def test_a_further_module_is_of_another_family(read):
    text = TRANSFORMER.replace(
        "modules:\n", "modules:\n    asr_seq_lin: !ref <seq_lin>\n"
    )
    refuse(text, "asr_seq_lin", "known family", read=read)
    # But a language model is not trained.
    text = SEQ2SEQ.replace(
        "modules:\n", "modules:\n    lm_model: !ref <seq_lin>\n"
    )
    assert read(text).family == "seq2seq"


def test_a_bayesian_script(read):
    text = TRANSFORMER + "kl_div_weight: 0.1\n"
    refuse(text, "kl_div_weight", "training_step_memory", read=read)


def test_dynamic_batches_without_a_length(read):
    text = TRANSFORMER.replace("max_batch_length_train", "max_batch_size")
    refuse(text, "no number max_batch_len", read=read)


@pytest.mark.parametrize("key", ["ctc_weight", "output_neurons"])
def test_a_number_that_is_missing(key, read):
    text = TRANSFORMER.replace(f"\n{key}:", "\nother:").replace(
        f"<{key}>", "<other>"
    )
    refuse(text, f"no number {key}", read=read)


@pytest.mark.parametrize("key", ["Adam", "ctc_cost", "seq_cost"])
def test_an_object_that_is_missing(key, read):
    text = TRANSFORMER.replace(f"\n{key}:", "\nother:")
    missing = "opt_class" if key == "Adam" else key
    refuse(text, f"no {missing}, which", read=read)
