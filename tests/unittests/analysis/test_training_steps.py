"""The imitated steps against the Brains that they imitate.

Authors
 * The sb_memeff authors 2026
"""

import pytest
import speechbrain as sb
import torch
from hyperpyyaml import load_hyperpyyaml

from sb_memeff.analysis.recipe import read_recipe
from sb_memeff.nnet.recompute.blocks import is_split
from sb_memeff.nnet.transducer_loss.logits_loss import transducer_loss
from sb_memeff.optim import SGD8bit
from tests.unittests.analysis.brains import (
    Batch,
    make_brain,
    script,
    transducer_batches,
)
from tests.unittests.analysis.yaml_files import (
    LIBRISPEECH,
    SMALL_TRANSDUCER,
    SPEAKER_NETWORKS,
    UPSTREAM_SPEAKERS,
    VOXCELEB,
    changed,
    speaker_yaml,
    upstream_transducer,
)

NO_DROPOUT = {"dec_emb_dropout": 0.0, "dec_dropout": 0.0}
# Three copies of each utterance.
MULTIPLY = [
    ("parallel_augment: False", "parallel_augment: True"),
    ("concat_original: False", "concat_original: True"),
]


def brain_like(step, *arguments):
    """The recipe's Brain with the step's weights."""
    brain = make_brain(*arguments)
    for name, module in brain.modules.items():
        module.load_state_dict(step.get_submodule(name).state_dict())
    return brain


def leave_data_alone(augmenter):
    """An Augmenter that copies and changes nothing."""
    for name in augmenter.augmentations:
        augmenter.augmentations[name] = torch.nn.Identity()
        augmenter.require_lengths[name] = False


def without_dropout(modules):
    for module in modules.modules():
        if "Dropout" in type(module).__name__:
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0  # an attention's


def check_same(step, brain, arguments, batch):
    """Loss and gradients of the step are those of the Brain."""
    torch.manual_seed(1)
    loss = step(*arguments)
    assert loss.isfinite()
    loss.backward()
    torch.manual_seed(1)
    outputs = brain.compute_forward(batch, sb.Stage.TRAIN)
    expected = brain.compute_objectives(outputs, batch, sb.Stage.TRAIN)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for name, parameter in brain.modules.named_parameters():
        grad = step.get_parameter(name).grad
        assert (grad is None) == (parameter.grad is None), name
        if grad is not None:
            torch.testing.assert_close(grad, parameter.grad, msg=name)
    # The optimizer has the language model too, which only searches.
    unused = step.lm_model.parameters() if hasattr(step, "lm_model") else ()
    assert {p for p in step.parameters() if p.grad is not None} == {
        p for g in step.optimizer().param_groups for p in g["params"]
    } - {*unused}


# --- speakers ----------------------------------------------------------------


@pytest.mark.parametrize("network", SPEAKER_NETWORKS)
def test_speaker_brain(network, tmp_path, monkeypatch):
    training = script(VOXCELEB, "train_speaker_embeddings", monkeypatch)
    path, overrides = speaker_yaml(network)
    path = changed(
        path,
        tmp_path,
        *MULTIPLY,
        ("augment_prob: 0.6", "augment_prob: 1.0"),
        ("min_augmentations: 1", "min_augmentations: 2"),
    )
    torch.manual_seed(0)
    step = read_recipe(path, overrides).build()
    assert step.copies == 3  # two of the four are enabled without recordings
    wavs, lens, speakers = step.batch(4, 0.5)
    assert wavs.shape == (4, 8000)
    assert speakers.shape == (4, 1)
    speakers = torch.tensor([[3], [0], [10], [5]])
    brain = brain_like(step, training.SpeakerBrain, path, overrides, tmp_path)
    leave_data_alone(brain.hparams.wav_augment)
    # Our Brain expects no augmentation that multiplies, and the labels as
    # they are.
    batch = Batch(sig=(wavs, lens), spk_id_encoded=(speakers.repeat(3, 1), 1))
    check_same(step, brain, (wavs, lens, speakers), batch)


@pytest.mark.parametrize("network", UPSTREAM_SPEAKERS)
def test_upstreams_speakers(network, tmp_path, monkeypatch):
    # The whole yaml file makes a folder for checkpoints.
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "train.yaml"
    path.write_text(UPSTREAM_SPEAKERS[network])
    recipe = read_recipe(path)
    assert recipe.default_batch() == (32, 3.0)
    step = recipe.build()
    assert step.copies == 5
    wavs, lens, speakers = batch = step.batch(2, 0.5)
    loss = step(*batch)
    loss.backward()
    assert all(p.grad is not None for p in step.parameters())
    assert len(step.outputs) == 10

    wavs, lens, speakers = (torch.cat([x] * 5) for x in batch)
    feats = step.mean_var_norm(step.compute_features(wavs), lens)
    outputs = step.classifier(step.embedding_model(feats))
    cost = load_hyperpyyaml(path.read_text(), {"data_folder": "none"})
    expected = cost["compute_cost"](outputs, speakers)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert isinstance(step.optimizer(), torch.optim.Adam)


def test_our_classifier_stays_out_of_autocast(tmp_path):
    theirs = tmp_path / "train.yaml"
    theirs.write_text(UPSTREAM_SPEAKERS["ecapa"])
    for path, overrides, dtype in (
        (*speaker_yaml("ecapa"), torch.float32),
        (theirs, {}, torch.bfloat16),
    ):
        step = read_recipe(path, overrides).build()
        with torch.autocast("cpu", torch.bfloat16):
            step(*step.batch(2, 0.5))
        assert step.outputs.dtype == dtype


# --- transducers -------------------------------------------------------------

DEC_LIN = [
    ("# dec_lin: !new:", "dec_lin: !new:"),
    ("#     input_size: !ref <joint_dim>", "    input_size: !ref <joint_dim>"),
    (
        "#     n_neurons: !ref <output_neurons>\n#     bias: False",
        "    n_neurons: !ref <output_neurons>\n    bias: False",
    ),
    ("    # dec_lin: !ref <dec_lin>", "    dec_lin: !ref <dec_lin>"),
]


@pytest.mark.parametrize(
    "name, overrides",
    [
        ("digits", {}),
        ("digits", {"transducer_method": "batched", "blank_index": 2}),
        ("conformer", {"streaming": False}),
        ("conformer", {"streaming": False, "number_of_ctc_epochs": 0}),
    ],
)
def test_transducer_brain(name, overrides, tmp_path, monkeypatch):
    path = LIBRISPEECH / "hparams" / f"{name}_transducer.yaml"
    step, brain = transducers(path, overrides, tmp_path, monkeypatch)
    for key in ("wav_augment", "fea_augment"):
        if hasattr(brain.hparams, key):
            delattr(brain.hparams, key)
    if overrides.get("number_of_ctc_epochs") == 0:
        for proj_ctc in (step.proj_ctc, brain.modules.proj_ctc):
            proj_ctc.requires_grad_(False)
    check_same(step, brain, *transducer_batches(step))


def test_transducer_brain_with_everything(tmp_path, monkeypatch):
    path = changed(
        LIBRISPEECH / "hparams/conformer_transducer.yaml",
        tmp_path,
        *(*MULTIPLY, *DEC_LIN),
    )
    overrides = {
        "streaming": False,
        "ce_weight": 0.2,
        "recompute": True,
        "recompute_split": 2,
        **NO_DROPOUT,
    }
    step, brain = transducers(path, overrides, tmp_path, monkeypatch)
    assert step.copies == 4  # three of features, and the original
    for modules in (step, brain.modules):
        # The Augmenters draw numbers, the step does not.
        without_dropout(modules)
        assert is_split(modules.enc.transformer.encoder.layers[1])
        assert is_split(modules.CNN)
    leave_data_alone(brain.hparams.wav_augment)
    leave_data_alone(brain.hparams.fea_augment)
    check_same(step, brain, *transducer_batches(step))


def transducers(path, overrides, place, monkeypatch):
    """The step, and the Brain with the same weights."""
    training = script(LIBRISPEECH, "train", monkeypatch)
    overrides = {**SMALL_TRANSDUCER, **overrides}
    torch.manual_seed(0)
    step = read_recipe(path, overrides).build()
    return step, brain_like(step, training.ASR, path, overrides, place)


def test_tokens_of_a_batch():
    path = LIBRISPEECH / "hparams/digits_transducer.yaml"
    for blank in (0, 3, 6):
        indices = {"blank_index": blank, "bos_index": 1, "eos_index": 2}
        recipe = read_recipe(path, {**SMALL_TRANSDUCER, **indices})
        wavs, lens, bos, tokens, token_lens, eos, eos_lens = (
            recipe.build().batch(3, 2.0)
        )
        assert wavs.shape == (3, 32000)
        assert tokens.shape == (3, 10)
        assert set(tokens.flatten().tolist()) == set(range(7)) - {blank}
        assert torch.equal(bos[:, 1:], tokens) and (bos[:, 0] == 1).all()
        assert torch.equal(eos[:, :-1], tokens) and (eos[:, -1] == 2).all()
        for x in (lens, token_lens, eos_lens):
            assert torch.equal(x, torch.ones(3))


def test_upstreams_transducer(tmp_path):
    path = upstream_transducer(tmp_path)
    step = read_recipe(path, {**SMALL_TRANSDUCER, **NO_DROPOUT}).build()
    without_dropout(step)
    arguments = step.batch(2, 1.0, tokens=4)
    # SpeechBrain's own needs a GPU.
    calls = []

    def logits_loss(*args):
        calls.append(args)
        return transducer_loss(*args, blank_index=0)

    step.logits_loss = logits_loss
    loss = step(*arguments)
    loss.backward()
    ((logits, tokens, wav_lens, token_lens),) = calls
    assert logits is step.outputs["logits"]
    assert logits.shape[0] == 2 and logits.shape[2:] == (5, 7)
    assert tokens is arguments[3]
    assert wav_lens.tolist() == token_lens.tolist() == [1.0, 1.0]

    # The language model is not trained, but counts as part of the modules.
    ids = {id(p) for g in step.optimizer().param_groups for p in g["params"]}
    for name, parameter in step.named_parameters():
        if parameter.requires_grad:
            of_lm = name.startswith("lm_model.")
            assert (parameter.grad is None) == of_lm, name
            assert id(parameter) in ids, name
    assert "lm_model" in dict(step.named_children())

    # Of the same weights, our yaml file's step makes the same.
    ours = LIBRISPEECH / "hparams/conformer_transducer.yaml"
    same = read_recipe(ours, {**SMALL_TRANSDUCER, **NO_DROPOUT}).build()
    without_dropout(same)
    for name, module in same.named_children():
        if name == "transducer_loss":
            module.classifier.load_state_dict(step.transducer_lin.state_dict())
        elif name != "lm_model":  # smaller there
            module.load_state_dict(step.get_submodule(name).state_dict())
    torch.testing.assert_close(same(*arguments), loss)


# --- all ---------------------------------------------------------------------


def test_optimizer_is_the_recipes():
    path, overrides = speaker_yaml("revnet")
    step = read_recipe(path, {**overrides, "lr": 0.25}).build()
    step.embedding_model.requires_grad_(False)
    optimizer = step.optimizer()
    assert type(optimizer) is SGD8bit
    (group,) = optimizer.param_groups
    assert (group["lr"], group["nesterov"]) == (0.25, True)
    assert [id(p) for p in group["params"]] == [
        id(p) for p in step.classifier.parameters()
    ]


def test_optimizer_keeps_32_bit_states_of_embeddings():
    path = LIBRISPEECH / "hparams/digits_transducer.yaml"
    step = read_recipe(path, SMALL_TRANSDUCER).build()
    step.emb.Embedding = torch.nn.Embedding(7, 6)
    step.optimizer()
    assert step.emb.Embedding.weight.optim_bits == 32


def test_outputs_live_until_the_next_batch():
    path, overrides = speaker_yaml("resnet")
    step = read_recipe(path, overrides).build()
    step(*step.batch(2, 0.5)).backward()
    assert step.outputs.shape[0] == 2
    held = []
    step.compute_features.register_forward_pre_hook(
        lambda *_: held.append(step.outputs)
    )
    step(*step.batch(3, 0.5))
    assert held == [None]


def test_a_transducers_outputs_are_held_until_the_next_batch():
    path = LIBRISPEECH / "hparams/digits_transducer.yaml"
    step = read_recipe(path, SMALL_TRANSDUCER).build()
    step(*step.batch(2, 0.5)).backward()
    assert step.outputs["encoded"].shape[0] == 2
    held = []
    step.CNN.register_forward_pre_hook(lambda *_: held.append(step.outputs))
    step(*step.batch(3, 0.5))
    assert held == [None]


@pytest.mark.parametrize("batch, seconds", [(0, 1.0), (2, 0.0)])
def test_empty_batches_are_refused(batch, seconds):
    path, overrides = speaker_yaml("resnet")
    step = read_recipe(path, overrides).build()
    with pytest.raises(ValueError, match="=0.* must be positive and finite"):
        step.batch(batch, seconds)
