"""Reading yaml files: what is made of them, what is not, and what is refused.

Authors
 * The sb_memeff authors 2026
"""

import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from sb_memeff.analysis.families.speaker import SpeakerStep
from sb_memeff.analysis.families.transducer import TransducerStep
from sb_memeff.analysis.recipe import read_recipe
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

REVNET = VOXCELEB / "hparams/train_revnet.yaml"
CONFORMER = LIBRISPEECH / "hparams/conformer_transducer.yaml"
DIGITS = LIBRISPEECH / "hparams/digits_transducer.yaml"
SHIPPED = [speaker_yaml(network)[0] for network in SPEAKER_NETWORKS]


@pytest.fixture
def upstream(tmp_path):
    """A small yaml file like SpeechBrain's."""
    path = tmp_path / "train_ecapa.yaml"
    path.write_text(UPSTREAM_SPEAKERS["ecapa"])
    return path


def refuse(path, *words, overrides=None, error=ValueError, build=False):
    """The error is one line with the name of the file and these words."""
    with pytest.raises(error) as caught:
        recipe = read_recipe(path, overrides)
        if build:
            recipe.build()
    message = str(caught.value)
    assert "\n" not in message
    for word in (str(path), *words):
        assert word in message, message


# --- contents of a recipe ----------------------------------------------------


def test_settings_are_the_values_after_overrides():
    recipe = read_recipe(REVNET, {"preset": "RevNet101", "base_channels": "8"})
    assert recipe.family == "speaker"
    assert recipe.settings["preset"] == "RevNet101"
    assert recipe.settings["base_channels"] == 8
    assert recipe.settings["output_folder"] == (
        "results/RevNet101_invertible/1986"
    )
    assert recipe.settings["split_ratio"] == [90, 10]
    # Objects and what depends on unknown folders have no value.
    assert not {"opt_class", "data_folder", "verification_file"} & set(
        recipe.settings
    )


@pytest.mark.parametrize(
    "text, value",
    [("1e-3", 0.001), ("null", None), ("[1, 2]", [1, 2]), ("no", "no")],
)
def test_overrides_are_parsed_as_by_recipes(text, value):
    assert read_recipe(REVNET, {"lr": text}).settings["lr"] == value


def test_default_batches():
    assert read_recipe(REVNET, {"batch_size": 9}).default_batch() == (9, 3.0)
    assert read_recipe(CONFORMER).default_batch() == (10, 15)
    overrides = {"max_batch_len": 100}
    assert read_recipe(CONFORMER, overrides).default_batch() == (6, 15)
    overrides = {"max_batch_len": 10}
    assert read_recipe(CONFORMER, overrides).default_batch() == (1, 15)
    overrides = {"dynamic_batching": False}
    assert read_recipe(CONFORMER, overrides).default_batch() == (8, 15)


@pytest.mark.parametrize("path", [*SHIPPED, DIGITS, CONFORMER])
def test_shipped_files_are_built_as_shipped(path):
    with FakeTensorMode():
        step = read_recipe(path).build()
        speaker = path.parent.parent.name == "SpeakerRec_memeff"
        assert isinstance(step, SpeakerStep if speaker else TransducerStep)
        assert step.training
        assert step.copies == 1
        for parameter in step.parameters():
            assert isinstance(parameter, FakeTensor)
        batch = step.batch(3, 2.0)
        assert all(isinstance(x, FakeTensor) for x in batch)
        weights = {id(p) for p in step.parameters() if p.requires_grad}
        groups = step.optimizer().param_groups
        assert weights == {id(p) for g in groups for p in g["params"]}


def test_overrides_reach_the_network():
    sizes = []
    for base_channels in (4, 8):
        overrides = {"base_channels": base_channels, "out_n_neurons": 5}
        with torch.device("meta"):
            step = read_recipe(REVNET, overrides).build()
        assert step.classifier.weight.shape[0] == 5
        sizes.append(sum(p.numel() for p in step.parameters()))
    assert sizes[0] < sizes[1] / 2


# --- what is made ------------------------------------------------------------


def test_nothing_is_written(upstream, tmp_path, monkeypatch):
    transducer = upstream_transducer(tmp_path)
    place = tmp_path / "place"
    place.mkdir()
    monkeypatch.chdir(place)
    for path, overrides in (
        (REVNET, {"base_channels": 2}),
        (upstream, {}),
        (DIGITS, SMALL_TRANSDUCER),
        (transducer, SMALL_TRANSDUCER),
    ):
        read_recipe(path, overrides).build()
    assert list(place.iterdir()) == []


def test_only_needed_objects_are_constructed(upstream, tmp_path):
    """Whatever makes something else would fail."""
    text = upstream.read_text()
    for key in ("add_noise", "drop_freq", "train_logger", "checkpointer"):
        text = re.sub(
            rf"(?m)^{key}: !new:", f"{key}: !new:no_such_package.", text
        )
    text += """
pretrainer: !new:no_such_package.Pretrainer
    model: !ref <embedding_model>
__load: !apply:no_such_package.load
    pretrainer: !ref <pretrainer>
__prepare: !apply:no_such_package.prepare
    folder: !ref <data_folder>
"""
    upstream.write_text(text)
    step = read_recipe(upstream).build()
    assert step.copies == 5
    step(*step.batch(1, 0.5)).backward()


def test_shared_objects_stay_shared(tmp_path):
    text = (
        "    normalize: !ref <normalize>\n",
        "    normalize: !ref <normalize>\n"
        "    transducer_lin: !ref <transducer_lin>\n",
    )
    path = changed(DIGITS, tmp_path, text)
    step = read_recipe(path, SMALL_TRANSDUCER).build()
    assert step.transducer_lin is step.transducer_loss.classifier
    (group,) = step.optimizer().param_groups
    assert len({id(p) for p in group["params"]}) == len(group["params"])
    # Two builds share nothing.
    recipe = read_recipe(path, SMALL_TRANSDUCER)
    assert recipe.build().enc is not recipe.build().enc


def test_functions_of_a_module_are_applied(upstream):
    upstream.write_text(
        upstream.read_text()
        + """
__recompute: !apply:sb_memeff.nnet.recompute.recompute_blocks
    module: !ref <embedding_model>
    blocks: [blocks.*, mfa]
__freeze: !apply:torch.nn.Module.requires_grad_
    - !ref <modules[classifier]>
    - False
"""
    )
    step = read_recipe(upstream).build()
    assert hasattr(step.embedding_model.blocks[1], "_recompute_place")
    assert not hasattr(step.embedding_model.asp, "_recompute_place")
    assert not any(p.requires_grad for p in step.classifier.parameters())
    (group,) = step.optimizer().param_groups
    assert len(group["params"]) == len(list(step.embedding_model.parameters()))


def test_what_changes_a_part_is_applied_wherever_it_comes_from(upstream):
    """A part that another !apply: gives to the module, further down."""
    upstream.write_text(
        upstream.read_text()
        + """
part: !new:torch.nn.Linear [2, 2]
__freeze: !apply:torch.nn.Module.requires_grad_ [!ref <part>, False]
__give: !apply:torch.nn.Module.add_module
    - !ref <embedding_model>
    - part
    - !ref <part>
"""
    )
    part = read_recipe(upstream).build().embedding_model.part
    assert not any(p.requires_grad for p in part.parameters())


def test_augmentation_counts_what_is_enabled(upstream):
    upstream.write_text(
        upstream.read_text().replace(
            "    max_augmentations: 4\n",
            "    max_augmentations: 4\n"
            "    enable_augmentations: [\n"
            "        !apply:operator.truth [!ref <data_folder_noise>],\n"
            "        False, True, True]\n",
        )
    )
    assert read_recipe(upstream).build().copies == 4
    overrides = {"data_folder_noise": None}
    assert read_recipe(upstream, overrides).build().copies == 3
    # Neither Brain looks for fea_augment in a speaker recipe.
    upstream.write_text(
        upstream.read_text().replace("\nwav_augment:", "\nfea_augment:")
    )
    assert read_recipe(upstream).build().copies == 1


def test_other_augmentations_count_as_one(upstream, caplog):
    upstream.write_text(
        upstream.read_text().replace(
            "speechbrain.augment.augmenter.Augmenter", "mine.Augment"
        )
    )
    assert read_recipe(upstream).build().copies == 1
    assert "mine.Augment" in caplog.text


# --- what is refused ---------------------------------------------------------


def test_no_file(tmp_path):
    refuse(tmp_path / "none.yaml", "no yaml file", error=FileNotFoundError)
    refuse(tmp_path, "no yaml file", error=FileNotFoundError)


def test_no_yaml(tmp_path):
    path = tmp_path / "train.yaml"
    path.write_text("seed: 1\nmodules: [\n")
    refuse(path, "not readable yaml", "line 3")
    path.write_bytes(b"\xff\xfe\x00\x80")
    refuse(path, "not readable yaml")
    for text in ("", "- 1\n- 2\n", "words"):
        path.write_text(text)
        refuse(path, "not a yaml file of keys and values")
    path.write_text("a: !ref <b>\n")
    refuse(path, '"b" is not valid')
    path.write_text("a: !include:none.yaml\n")
    refuse(path, "none.yaml")


def test_no_modules(tmp_path):
    path = tmp_path / "train.yaml"
    for text in ("seed: 1\n", "modules: null\n", "modules: 3\n"):
        path.write_text(text)
        refuse(path, "has no modules")


def test_unknown_family(tmp_path):
    path = tmp_path / "train.yaml"
    path.write_text("net: !new:torch.nn.ReLU\nmodules: {net: !ref <net>}\n")
    refuse(
        path,
        "modules net,",
        "speaker, transducer, ",
        "sb_memeff.memory.step.training_step_memory",
    )


def test_unknown_override():
    for key in ("bach_size", "batchsize"):
        refuse(REVNET, key, "did you mean batch_size", overrides={key: 1})
    refuse(REVNET, "no key xyzzy to override.", overrides={"xyzzy": 1})


@pytest.mark.parametrize("value", ["torch.optim.Adam", {"lr": 1.0}])
def test_override_of_an_object(value):
    refuse(
        REVNET,
        "opt_class",
        "!name:sb_memeff.optim.SGD8bit",
        "change it in the yaml file",
        overrides={"opt_class": value},
    )


def test_override_that_is_no_plain_value():
    for text in ("[1, 2", "!new:torch.nn.ReLU", "a: b: c"):
        with pytest.raises(ValueError) as caught:
            read_recipe(REVNET, {"lr": text})
        assert f"--lr={text}: not a plain value" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_unknown_preset():
    refuse(
        REVNET,
        "'RevNet35'",
        "RevNet34, RevNet101",
        overrides={"preset": "RevNet35"},
        build=True,
    )


@pytest.mark.parametrize(
    "class_name", ["no_such_package.Net", "torch.nn.NoSuchLayer"]
)
def test_classes_that_cannot_be_imported(class_name, upstream):
    old = "speechbrain.lobes.models.ECAPA_TDNN.ECAPA_TDNN"
    upstream.write_text(upstream.read_text().replace(old, class_name))
    refuse(upstream, class_name, "install its package", build=True)


def test_arguments_that_a_class_does_not_take(upstream):
    upstream.write_text(
        upstream.read_text().replace("attention_channels", "att")
    )
    refuse(upstream, "ECAPA_TDNN", "'att'", build=True)


def test_an_entry_of_modules_that_is_not_a_module(upstream):
    upstream.write_text(
        upstream.read_text().replace(
            "    classifier: !ref <classifier>", "    classifier: 3"
        )
    )
    refuse(upstream, "classifier", "is 3 and not a torch.nn.Module", build=True)


def test_a_module_by_a_name_that_is_taken(upstream):
    upstream.write_text(
        upstream.read_text().replace(
            "modules:\n", "modules:\n    optimizer: !new:torch.nn.ReLU\n"
        )
    )
    refuse(upstream, "'optimizer'", "rename the module", build=True)


@pytest.mark.parametrize("key", ["compute_cost", "opt_class"])
def test_a_key_that_is_missing(key, upstream):
    upstream.write_text(upstream.read_text().replace(f"\n{key}:", "\nother:"))
    refuse(upstream, f"has no {key}")


def test_a_number_that_is_missing(tmp_path):
    path = changed(DIGITS, tmp_path, ("\nce_weight:", "\nother:"))
    refuse(
        path, "has no number ce_weight, which", "transducer recipe", "add it"
    )


def test_a_batch_that_is_missing(upstream):
    upstream.write_text(upstream.read_text().replace("\nbatch_size", "\nbatch"))
    with pytest.raises(ValueError, match="has no number batch_size"):
        read_recipe(upstream).default_batch()


def test_no_number():
    refuse(REVNET, "sample_rate", "'high'", overrides={"sample_rate": "high"})


def test_a_placeholder_that_the_step_needs(upstream):
    text = upstream.read_text()
    for key in ("out_n_neurons", "emb_dim", "sample_rate"):
        upstream.write_text(
            re.sub(rf"(?m)^{key}: \d+", f"{key}: !PLACEHOLDER", text)
        )
        refuse(upstream, f"--{key}=VALUE")
        recipe = read_recipe(upstream, {key: 16000})
        assert recipe.settings[key] == 16000
    # A number made of one, too; and not one whose name begins alike.
    upstream.write_text(
        text.replace("emb_dim: 8", "emb: !PLACEHOLDER\nemb_dim: !ref <emb> - 1")
    )
    refuse(upstream, "--emb=VALUE")


def test_losses_that_lack_their_module():
    overrides = {"ce_weight": 0.1}
    refuse(CONFORMER, "dec_lin", "proj_enc", overrides=overrides)
