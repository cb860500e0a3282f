"""Scores of files with SpeechBrain's inference class.

Authors
 * The sb_memeff authors 2026
"""

import pytest
import soundfile
import torch
from speechbrain.inference.speaker import SpeakerRecognition
from torch.nn.functional import cosine_similarity

from sb_memeff.verification.files import embed_files, score_files

YAML = """
sample_rate: 16000
compute_features: !new:speechbrain.lobes.features.Fbank
    n_mels: 24
mean_var_norm: !new:speechbrain.processing.features.InputNormalization
    norm_type: sentence
    std_norm: False
embedding_model: !apply:sb_memeff.lobes.models.WeSpeakerResNet.ResNet.from_preset
    name: ResNet34
    input_size: 24
    base_channels: 2
    lin_neurons: 16
mean_var_norm_emb: !new:speechbrain.nnet.containers.LengthsCapableSequential
    - !new:torch.nn.Identity
modules:
    compute_features: !ref <compute_features>
    mean_var_norm: !ref <mean_var_norm>
    mean_var_norm_emb: !ref <mean_var_norm_emb>
    embedding_model: !ref <embedding_model>
pretrainer: !new:speechbrain.utils.parameter_transfer.Pretrainer
    loadables: {}
"""


@pytest.fixture
def folder(tmp_path):
    """A model, and six files of different lengths and colours."""
    (tmp_path / "hyperparams.yaml").write_text(YAML)
    torch.manual_seed(0)
    for number in range(6):
        wav = 0.1 * torch.randn(8000 + 800 * number)
        wav[:: number + 1] *= 3
        path = tmp_path / f"{number}.wav"
        soundfile.write(path, wav.numpy(), 16000, subtype="FLOAT")
    return tmp_path


def test_scores(folder):
    model = SpeakerRecognition.from_hparams(source=str(folder), savedir=None)
    files = [str(folder / f"{number}.wav") for number in range(6)]
    encoded = []
    model.mods.embedding_model.register_forward_hook(
        lambda module, args, out: encoded.append(out)
    )
    pairs = [(files[0], files[1]), (files[2], files[0]), (files[1], files[1])]
    cosines = score_files(model, pairs)
    assert len(encoded) == 3  # each file once
    for pair, found in zip(pairs, cosines):
        expected, _ = model.verify_files(*pair)
        assert found == pytest.approx(expected.item(), abs=1e-5)
    cohort = embed_files(model, files[3:])
    assert cohort.shape == (3, 16)
    normalized = score_files(model, pairs, cohort, cohort_size=2)
    both = embed_files(model, files[:2])
    expected = 0.0
    for side in both:
        best = cosine_similarity(side, cohort).sort().values[-2:]
        expected += float((cosines[0] - best.mean()) / best.std()) / 2
    assert normalized[0] == pytest.approx(expected, rel=1e-3)
