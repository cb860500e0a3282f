"""Export of trained speaker models for SpeechBrain's inference.

Authors
 * The sb_memeff authors 2026
"""

import socket
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import soundfile
import speaker_verification_cosine as verification
import speechbrain as sb
import torch
from hyperpyyaml import load_hyperpyyaml
from speechbrain.inference.classifiers import EncoderClassifier
from speechbrain.inference.speaker import SpeakerRecognition

from sb_memeff.cli import main
from sb_memeff.export.speaker_folder import export_speaker_model
from sb_memeff.utils.atomic_checkpoints import best_checkpoint
from tests.unittests.weights import without_zeros

RECIPE = (
    Path(__file__).parents[3] / "recipes" / "VoxCeleb" / "SpeakerRec_memeff"
)


OVERRIDES = {
    "data_folder": "/secret/path",
    "base_channels": 2,
    "lin_neurons": 16,
    "n_mels": 24,
    "out_n_neurons": 3,
}


@pytest.fixture(params=["resnet", "revnet", "dfresnet", "dfrevnet"])
def run(request, tmp_path):
    """The files of a training run: two checkpoints and the rest."""
    folder = tmp_path / "run"
    path = RECIPE / "hparams" / f"train_{request.param}.yaml"
    overrides = {**OVERRIDES, "output_folder": str(folder)}
    with open(path, encoding="utf-8") as f:
        hparams = load_hyperpyyaml(f, overrides)
    # create_experiment_directory, less the logging that it sets up.
    with open(path, encoding="utf-8") as f:
        text = sb.core.resolve_references(f, overrides).getvalue()
    (folder / "hyperparams.yaml").write_text(text)
    # Running statistics that are not the initial ones.
    without_zeros(hparams["embedding_model"])(torch.randn(4, 60, 24))
    for rate in (0.2, 0.5):
        hparams["checkpointer"].save_checkpoint({"ErrorRate": rate})
        for name in ("classifier", "embedding_model"):
            for parameter in hparams[name].parameters():
                torch.nn.init.normal_(parameter)
    encoder = sb.dataio.encoder.CategoricalEncoder()
    encoder.update_from_iterable(["ann", "bob", "eve"], sequence_input=False)
    encoder.save(folder / "save" / "label_encoder.txt")
    return folder


@pytest.fixture
def wavs(tmp_path):
    rng = np.random.default_rng(0)
    names = {}
    for name, seconds in (("a.wav", 1.5), ("b.wav", 1.0)):
        samples = 0.1 * rng.standard_normal(int(16000 * seconds))
        soundfile.write(tmp_path / name, samples, 16000)
        names[name] = {
            "wav": str(tmp_path / name),
            "start": 0,
            "stop": len(samples),
            "duration": seconds,
        }
    return names


@pytest.fixture
def offline(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("inference went to the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_same_scores_as_the_recipe(run, wavs, tmp_path, offline):
    target = tmp_path / "model"
    exported = export_speaker_model(run, target)
    best = best_checkpoint(run / "save")
    assert exported == best.path and best.meta["ErrorRate"] == 0.2
    assert {path.name for path in target.iterdir()} == {
        "hyperparams.yaml",
        "embedding_model.ckpt",
        "classifier.ckpt",
        "label_encoder.ckpt",
    }
    text = (target / "hyperparams.yaml").read_text()
    for word in ("secret", "PLACEHOLDER", "seed", str(run), "SGD"):
        assert word not in text

    with open(run / "hyperparams.yaml", encoding="utf-8") as f:
        params = load_hyperpyyaml(f)
    weights = verification.find_weights(run / "save")
    verification.load_weights(params["embedding_model"], weights)
    params["embedding_model"].eval()
    params.update(
        batch_size=2, num_workers=0, embeddings_folder=tmp_path / "embeddings"
    )
    files = [wavs[name] for name in ("a.wav", "b.wav")]
    embeddings = verification.embed(params, files, "cpu")
    expected = torch.cosine_similarity(*embeddings, dim=0)

    model = SpeakerRecognition.from_hparams(source=str(target), savedir=None)
    a, b = (wavs[name]["wav"] for name in ("a.wav", "b.wav"))
    score, _ = model.verify_files(a, b)
    assert score.item() == pytest.approx(expected.item(), abs=1e-5)
    assert abs(score.item()) < 0.9999


def test_onnx_beside_it(run, tmp_path, capsys):
    target = tmp_path / "model"
    assert main(["export", str(run), str(target), "--onnx"]) == 0
    assert "embedding_model.onnx" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(target / "embedding_model.onnx")
    with open(run / "hyperparams.yaml", encoding="utf-8") as f:
        net = load_hyperpyyaml(f)["embedding_model"].eval()
    verification.load_weights(net, verification.find_weights(run / "save"))
    feats, lengths = torch.randn(2, 70, 24), torch.tensor([0.5, 1.0])
    inputs = {"feats": feats.numpy(), "lengths": lengths.numpy()}
    (found,) = session.run(None, inputs)
    with torch.no_grad():
        expected = net(feats, lengths)
    similar = torch.cosine_similarity(torch.from_numpy(found), expected)
    assert similar.min() > 1 - 1e-5


def test_classifies(run, wavs, tmp_path, offline):
    export_speaker_model(run, tmp_path / "model")
    model = EncoderClassifier.from_hparams(
        source=str(tmp_path / "model"), savedir=str(tmp_path / "cache")
    )
    *_, label = model.classify_file(wavs["a.wav"]["wav"])
    assert label[0] in ("ann", "bob", "eve")
    saved = torch.load(best_checkpoint(run / "save").path / "classifier.ckpt")
    assert torch.equal(model.mods.classifier.weight, saved["weight"])
    signal = torch.randn(2, 8000)
    plain = model.encode_batch(signal)
    assert torch.equal(model.encode_batch(signal, normalize=True), plain)


def test_unfinished_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="finished at least one epoch"):
        export_speaker_model(tmp_path / "no", tmp_path / "model")
    assert not (tmp_path / "no").exists() and not (tmp_path / "model").exists()


def test_foreign_run(run, tmp_path):
    (run / "hyperparams.yaml").write_text("classifier: 1\n")
    with pytest.raises(ValueError, match="lacks sample_rate"):
        export_speaker_model(run, tmp_path / "model")
    assert not (tmp_path / "model").exists()
