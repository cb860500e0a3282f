"""Variants that a recipe is compared with."""

import pytest
import torch
from speechbrain.lobes.models import (
    ECAPA_TDNN as speechbrain_ecapa,
    ResNet as speechbrain_resnet,
)
from speechbrain.lobes.models.Xvector import Xvector

from sb_memeff.analysis.families.speaker import reversible_twin
from sb_memeff.analysis.profile import profile
from sb_memeff.analysis.recipe import read_recipe
from sb_memeff.lobes.models.DFResNet import DFResNet
from sb_memeff.lobes.models.RecomputedECAPA_TDNN import ECAPA_TDNN
from sb_memeff.lobes.models.RevDFResNet import RevDFResNet
from sb_memeff.lobes.models.RevECAPA_TDNN import RevECAPA_TDNN
from sb_memeff.lobes.models.RevResNet import RevResNet
from sb_memeff.lobes.models.WeSpeakerResNet import ResNet
from sb_memeff.memory.fake import fake_tensors
from sb_memeff.nnet.recompute import store_blocks
from sb_memeff.nnet.recompute.blocks import is_split
from sb_memeff.nnet.transducer_loss.joint_loss import TransducerJointLoss
from tests.unittests.analysis.shallow import shallow  # noqa: F401
from tests.unittests.analysis.yaml_files import (
    LIBRISPEECH,
    SMALL_TRANSDUCER,
    UPSTREAM_SPEAKERS,
    changed,
    conformer_transducer,
    speaker_yaml,
    upstream_transducer,
)
from tests.unittests.one_analysis import one_analysis  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_analysis", "shallow")

RESNETS = [
    "ResNet34",
    "ResNet34, blocks recomputed",
    "RevNet34 Type I",
    "RevNet34 Type II",
]
DF_RESNETS = [
    "DFResNet56",
    "DFResNet56, blocks recomputed",
    "DFRevNet56 Type I",
    "DFRevNet56 Type II",
]
ECAPAS = [
    "SpeechBrain's ECAPA_TDNN",
    "SpeechBrain's ECAPA_TDNN, blocks recomputed",
    "ECAPA_TDNN",
    "RevECAPA_TDNN",
]
LOSSES = [
    "batched",
    "samplewise",
    "tiled",
    "tiled, encoder recomputed",
    "tiled, CNN and encoder recomputed",
    "tiled, CNN and encoder in 8 pieces",
]
ROWS = {
    "resnet": RESNETS,
    "revnet": RESNETS,
    "dfresnet": DF_RESNETS,
    "dfrevnet": DF_RESNETS,
    "ecapa": ECAPAS,
    "revecapa": ECAPAS,
    "upstream ecapa": ECAPAS,
    "upstream resnet": [
        "SpeechBrain's ResNet",
        "SpeechBrain's ResNet, blocks recomputed",
        "RevNet34 Type I",
        "RevNet34 Type II",
    ],
    "upstream xvector": [
        "SpeechBrain's Xvector",
        "SpeechBrain's Xvector, blocks recomputed",
    ],
    "conformer_transducer": LOSSES,
    "digits_transducer": LOSSES,
    "upstream transducer": ["SpeechBrain's loss", *LOSSES],
}
OWN = {
    "resnet": "ResNet34",
    "revnet": "RevNet34 Type II",
    "dfresnet": "DFResNet56",
    "dfrevnet": "DFRevNet56 Type II",
    "ecapa": "ECAPA_TDNN",
    "revecapa": "RevECAPA_TDNN",
    "upstream ecapa": "SpeechBrain's ECAPA_TDNN",
    "upstream resnet": "SpeechBrain's ResNet",
    "upstream xvector": "SpeechBrain's Xvector",
    "conformer_transducer": "tiled",
    "digits_transducer": "tiled",
    "upstream transducer": "SpeechBrain's loss",
}
SMALL = {**SMALL_TRANSDUCER, "num_encoder_layers": 1}


def small_recipe(name, folder, **overrides):
    """A recipe of ROWS, made small."""
    upstream, _, network = name.rpartition(" ")
    if "transducer" in name:
        path = LIBRISPEECH / f"hparams/{name}.yaml"
        if upstream:
            path = upstream_transducer(folder)
        elif network == "conformer_transducer":
            path = conformer_transducer(folder)
        overrides = {**SMALL, **overrides}
    elif upstream:
        path = folder / "train.yaml"
        path.write_text(UPSTREAM_SPEAKERS[network])
    else:
        path, small = speaker_yaml(network)
        overrides = {**small, **overrides}
    return read_recipe(path, overrides)


def changed_steps(recipe):
    """Label to the step of a variant, on fake tensors."""
    steps = {}
    with fake_tensors():
        for variant in recipe.variants():
            steps[variant.label] = recipe.build()
            if variant.change:
                variant.change(steps[variant.label])
    return steps


@pytest.mark.parametrize("name", ROWS)
def test_rows(name, tmp_path):
    recipe = small_recipe(name, tmp_path)
    assert [v.label for v in recipe.variants()] == ROWS[name]
    assert recipe.own_variant().label == OWN[name]
    assert recipe.own_variant().change is None
    assert OWN[name] in ROWS[name]


def network_of(label):
    """Expected class of a speaker row."""
    name = label.split(",")[0].split(" Type")[0]
    for text, network in NETWORKS.items():
        if name == text or name.rstrip("0123456789") == text:
            return network


NETWORKS = {
    "ResNet": ResNet,
    "RevNet": RevResNet,
    "DFResNet": DFResNet,
    "DFRevNet": RevDFResNet,
    "ECAPA_TDNN": ECAPA_TDNN,
    "RevECAPA_TDNN": RevECAPA_TDNN,
    "SpeechBrain's ECAPA_TDNN": speechbrain_ecapa.ECAPA_TDNN,
    "SpeechBrain's ResNet": speechbrain_resnet.ResNet,
    "SpeechBrain's Xvector": Xvector,
}


def shapes(module):
    return {k: v.shape for k, v in module.state_dict().items()}


# The others have the same networks: see test_rows.
@pytest.mark.parametrize(
    "name",
    [
        "resnet",
        "dfrevnet",
        "revecapa",
        "upstream ecapa",
        "upstream resnet",
        "upstream xvector",
    ],
)
def test_variants_have_the_networks_of_their_labels(name, tmp_path):
    recipe = small_recipe(name, tmp_path)
    steps = changed_steps(recipe)
    vanilla, recomputed, *others = ROWS[name]
    assert shapes(steps[vanilla]) == shapes(steps[recomputed])
    for label, step in steps.items():
        network = step.embedding_model
        expected = network_of(label)
        if label == recomputed:
            assert isinstance(network, expected)
            assert store_blocks(step.embedding_model)
        assert type(network) is expected
        assert not store_blocks(step)
        if " Type " in label:
            kind = {"Type I": "strided", "Type II": "invertible"}
            preset, _, type_of = label.partition(" ")
            small = {
                "input_size": 16,
                "lin_neurons": 8,
                "downsampling": kind[type_of],
            }
            if "upstream" not in name:
                # SpeechBrain's ResNet has no such argument.
                small["base_channels"] = 2
            with fake_tensors():
                alike = expected.from_preset(preset, **small)
            assert shapes(network) == shapes(alike)
    # What it is compared with has the yaml file's arguments.
    if others:
        for label, step in steps.items():
            weights = shapes(step.embedding_model)
            if "TDNN" in label:
                # The first convolution, and the aggregation.
                assert (16, 16, 5) in weights.values()
                assert (48, 16, 1) in weights.values()
            last = list(step.embedding_model.parameters())[-1]
            assert last.shape[0] == 8
            assert shapes(step.classifier) == shapes(steps[vanilla].classifier)


@pytest.mark.parametrize("name", ["resnet", "digits_transducer"])
def test_the_own_row_is_the_recipe(name, tmp_path):
    recipe = small_recipe(name, tmp_path)
    own = profile(recipe, 2, 0.5)
    (row,) = (v for v in recipe.variants() if v.label == own.label)
    found = profile(recipe, 2, 0.5, variant=row)
    assert (found.label, found.memory.by_kind) == (
        own.label,
        # A constant of a few bytes may be there already.
        pytest.approx(own.memory.by_kind, abs=64),
    )


def test_the_arguments_are_the_yaml_files(tmp_path):
    path, small = speaker_yaml("revnet")
    wider = {**small, "base_channels": 4, "lin_neurons": 24, "n_mels": 24}
    steps = changed_steps(read_recipe(path, {**wider, "preset": "RevNet101"}))
    vanilla = "ResNet101"
    assert list(steps)[0] == vanilla
    with fake_tensors():
        alike = ResNet.from_preset(
            vanilla, input_size=24, base_channels=4, lin_neurons=24
        )
    assert shapes(steps[vanilla].embedding_model) == shapes(alike)


@pytest.mark.parametrize("name", [n for n in ROWS if "transducer" in n])
def test_variants_have_the_losses_of_their_labels(name, tmp_path):
    recipe = small_recipe(name, tmp_path)
    steps = changed_steps(recipe)
    encoder = "enc.transformer.encoder.layers.0"
    for label, step in steps.items():
        if label == "SpeechBrain's loss":
            assert not step.has_joint_loss
            assert not store_blocks(step)
            continue
        method, _, more = label.partition(", ")
        assert step.has_joint_loss
        loss = step.transducer_loss
        assert isinstance(loss, TransducerJointLoss)
        assert (loss.method, loss.blank_index) == (method, 0)
        blocks = [encoder] if more else []
        assert is_split(step.enc.transformer.encoder.layers[0]) == (
            "8 pieces" in more
        )
        if "CNN" in more:
            blocks.insert(0, "CNN")
        assert store_blocks(step) == blocks
        # The optimizer gets the same parameters.
        count = sum(p.numel() for p in step.parameters())
        assert count == sum(
            p.numel() for p in steps[list(steps)[0]].parameters()
        )


def stored_and_less(name, rows):
    """Pairs of rows, the first of which takes more."""
    pairs = [tuple(rows[:2])]
    if "transducer" in name:
        pairs = [("batched", "tiled"), ("tiled", "tiled, encoder recomputed")]
    elif "upstream" not in name:
        # SpeechBrain's network is smaller in these tests.
        pairs += [(rows[1], rows[2]), (rows[1], rows[3])]
    return pairs


WIDER = {
    "resnet": {"base_channels": 8},
    "dfrevnet": {"base_channels": 8},
    "ecapa": {"channels": [64, 64, 192]},
    "digits_transducer": {"output_neurons": 500},
}


@pytest.mark.parametrize(
    "name", [*WIDER, "upstream resnet", "upstream xvector"]
)
def test_recomputed_takes_less_and_reversible_even_less(name, tmp_path):
    recipe = small_recipe(name, tmp_path, **WIDER.get(name, {}))
    before = torch.get_rng_state()
    pairs = stored_and_less(name, ROWS[name])
    found = {
        variant.label: profile(recipe, 8, 1.5, variant=variant)
        for variant in recipe.variants()
        if variant.label in {label for pair in pairs for label in pair}
    }
    assert torch.equal(before, torch.get_rng_state())
    for more, less in pairs:
        more, less = found[more].memory, found[less].memory
        if "upstream" not in name:
            assert less.peak_bytes < more.peak_bytes
        # The peak of networks that small may be that of the features.
        assert less.peak_bytes <= more.peak_bytes
        assert less.saved_bytes <= more.saved_bytes
        if "transducer" not in name:
            assert less.saved_bytes < more.saved_bytes


def test_arguments_that_other_networks_lack(tmp_path):
    path, small = speaker_yaml("revecapa")
    path = changed(
        path,
        tmp_path,
        (
            "RevECAPA_TDNN.RevECAPA_TDNN\n",
            "RevECAPA_TDNN.RevECAPA_TDNN\n    inner_channels: 24\n"
            "    save_memory: False\n",
        ),
    )
    recipe = read_recipe(path, small)
    steps = changed_steps(recipe)
    assert list(steps) == ECAPAS
    with fake_tensors():
        own = recipe.build()
    own_row = steps["RevECAPA_TDNN"]
    assert shapes(own_row) == shapes(own)
    assert not own_row.embedding_model.save_memory
    assert steps["ECAPA_TDNN"].embedding_model.save_memory


def test_type_one_is_the_default(tmp_path):
    path, small = speaker_yaml("revnet")
    path = changed(path, tmp_path, ("    downsampling: !ref <down", "    #"))
    recipe = read_recipe(path, small)
    assert recipe.own_variant().label == "RevNet34 Type I"
    assert [v.label for v in recipe.variants()] == RESNETS
    with fake_tensors():
        own = recipe.build()
    row = changed_steps(recipe)["RevNet34 Type I"]
    assert shapes(row) == shapes(own)


def test_positional_arguments_and_other_networks_stand_alone(tmp_path):
    text = UPSTREAM_SPEAKERS["ecapa"]
    start = text.index("embedding_model: !new:")
    path = tmp_path / "train.yaml"
    head = "embedding_model: !new:speechbrain.lobes.models.ECAPA_TDNN."
    path.write_text(f"{text[:start]}{head}ECAPA_TDNN [!ref <n_mels>]\n")
    recipe = read_recipe(path, {"emb_dim": 192})
    assert [v.label for v in recipe.variants()] == ["embedding_model"]
    assert profile(recipe, 2, 0.5).label == "embedding_model"


@pytest.mark.parametrize("preset", ["5", "RevNet35", "hello"])
def test_an_unknown_preset_raises_when_built(preset):
    path, small = speaker_yaml("revnet")
    recipe = read_recipe(path, {**small, "preset": preset})
    rows = recipe.variants()
    with pytest.raises(ValueError, match=f"has no preset '?{preset}"):
        profile(recipe, 2, 0.5, variant=rows[0])


def test_twins():
    assert reversible_twin("ResNet293") == "RevNet293"
    assert reversible_twin("DFResNet56") == "DFRevNet56"
