"""The README's Python and yaml run as they are printed.

Authors
 * The sb_memeff authors 2026
"""

import re
from pathlib import Path

import pytest
import torch
from hyperpyyaml import load_hyperpyyaml
from torch import nn

from sb_memeff.nnet.recompute import store_blocks
from sb_memeff.nnet.reversible import AdditiveCoupling, ReversibleSequence
from sb_memeff.optim import Adam8bit
from sb_memeff.utils.atomic_checkpoints import AtomicCheckpointer

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
TRANSFORMER = """
Transformer: !new:speechbrain.lobes.models.transformer.TransformerASR.TransformerASR
    tgt_vocab: 7
    input_size: 8
    d_model: 8
    nhead: 2
    num_encoder_layers: 2
    num_decoder_layers: 0
    d_ffn: 8
    encoder_module: conformer
    attention_type: RelPosMHAXL
    normalize_before: True
    causal: False
"""


def snippets(language):
    """The fenced blocks of a language, with a shallow network and short input."""
    found = re.findall(rf"(?ms)^```{language}\n(.*?)^```$", README)
    return [
        re.sub(r"RevNet\d+\b", "RevNet34", text).replace("4, 200,", "2, 20,")
        for text in found
    ]


def snippet(language, part):
    """The only block that contains a text."""
    (found,) = (text for text in snippets(language) if part in text)
    return found


def run(part, **given):
    """Runs a block of Python with some names given; returns all names."""
    names = {"torch": torch, **given}
    exec(snippet("python", part), names)
    return names


def load(part, given=""):
    """Loads a block of yaml after the lines that it refers to."""
    return load_hyperpyyaml(given + snippet("yaml", part))


def test_every_snippet_has_a_test():
    """A part of each is in a test below."""
    tests = Path(__file__).read_text(encoding="utf-8")
    used = re.findall(
        r'(?:run|load|snippet)\(\s*(?:"(?:python|yaml)",\s*)?"([^"]+)"', tests
    )
    for language in ("python", "yaml"):
        for text in snippets(language):
            assert any(part in text for part in used), text


def test_reversible_network():
    names = run("embeddings.square().mean().backward()")
    assert names["embeddings"].shape == (2, 256)
    assert all(p.grad is not None for p in names["net"].parameters())


def test_first_yaml():
    found = load("downsampling: invertible  # Type II", "n_mels: 8\n")
    parameters = found["embedding_model"].parameters()
    assert isinstance(found["opt_class"](parameters), Adam8bit)


@pytest.mark.parametrize("kind", ["ECAPA_TDNN", "RevECAPA_TDNN"])
def test_speaker_networks(kind):
    resnet = load("strided is Type I", "n_mels: 8\n")["embedding_model"]
    assert resnet(torch.randn(2, 40, 8)).shape == (2, 256)
    text = snippet("yaml", "# or RevECAPA_TDNN.RevECAPA_TDNN")
    text = text.replace("1024", "32").replace("3072", "96")
    chosen = {
        "ECAPA_TDNN": text,
        "RevECAPA_TDNN": text.replace(
            "RecomputedECAPA_TDNN.ECAPA_TDNN", "RevECAPA_TDNN.RevECAPA_TDNN"
        ),
    }[kind]
    network = load_hyperpyyaml("n_mels: 8\n" + chosen)["embedding_model"]
    assert type(network).__name__ == kind
    assert network(torch.randn(2, 40, 8)).shape == (2, 1, 192)


def test_recompute():
    found = load("# a conformer, for example", TRANSFORMER)
    assert len(store_blocks(found["Transformer"])) == 2


def test_recompute_more():
    given = f"""{TRANSFORMER}
CNN: !new:torch.nn.Linear [8, 8]
enc: !new:torch.nn.ModuleDict
    modules:
        transformer: !ref <Transformer>
modules: !new:torch.nn.ModuleDict
    modules:
        CNN: !ref <CNN>
        enc: !ref <enc>
"""
    found = load("first_output_only: True", given)
    assert len(store_blocks(found["modules"])) == 3


def test_8bit_optimizer():
    opt_class = load("# or SGD8bit, AdamW8bit")["opt_class"]
    assert isinstance(opt_class(nn.Linear(2, 2).parameters()), Adam8bit)


def test_transducer_loss():
    given = """
Tjoint: !new:speechbrain.nnet.transducer.transducer_joint.Transducer_joint
    joint: sum
transducer_lin: !new:speechbrain.nnet.linear.Linear
    input_size: 6
    n_neurons: 5
blank_index: 0
"""
    loss = load("!ref <Tjoint>", given)["transducer_loss"]
    enc = torch.randn(2, 4, 6, requires_grad=True)
    pred = torch.randn(2, 3, 6, requires_grad=True)
    lens = torch.ones(2)
    loss(enc, pred, torch.tensor([[1, 2], [3, 4]]), lens, lens).backward()
    assert enc.grad.abs().sum() > 0


def test_brain_and_checkpointer(tmp_path):
    text = snippet("yaml", "atomic_checkpoints.AtomicCheckpointer")
    # Its arguments are SpeechBrain's.
    text += f"    checkpoints_dir: {tmp_path}\n"
    found = load_hyperpyyaml(text)["checkpointer"]
    assert isinstance(found, AtomicCheckpointer)
    brain = run("instead of sb.Brain")["SpeakerBrain"]
    assert brain({"net": nn.Linear(2, 2)}).modules.net


def test_training_step_memory():
    memory = run(
        "training_step_memory(build_model",
        build_model=lambda: nn.Linear(16000, 10),
    )["memory"]
    # The batch, weights, gradients and Adam's states.
    assert memory.peak_bytes >= 64 * 16000 * 4 + 4 * 16000 * 10 * 4


def test_sequence_of_blocks():

    class Body(nn.Conv2d):
        def forward(self, x, lengths):
            return super().forward(x) * lengths[:, None, None, None]

    class Pooling(nn.Flatten):
        def forward(self, x, lengths):
            return super().forward(x)

    def body(channels):
        return Body(channels, channels, 3, padding=1)

    names = run(
        "AdditiveCoupling(f1, g1)",
        stem=Body(1, 4, 3, padding=1),
        pooling=Pooling(),
        x=torch.randn(2, 1, 8, 8),
        lengths=torch.ones(2),
        **{f"{kind}{n}": body(2) for kind in "fg" for n in (1, 2)},
        **{f"{kind}3": body(8) for kind in "fg"},
    )
    assert names["y"].shape == (2, 256)


def test_self_check(capsys):
    text = snippet("python", "check_invertible")
    net = ReversibleSequence(
        [AdditiveCoupling(nn.Linear(2, 2), nn.Linear(2, 2))], axis=-1
    )
    # On this machine's processor.
    exec(
        text.replace('"cuda"', '"cpu"'),
        {"torch": torch, "net": net, "x": torch.randn(3, 4)},
    )
    assert "0" in capsys.readouterr().out
