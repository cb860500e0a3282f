"""Yaml files for the tests: the shipped ones, and small ones as upstream's.

Authors
 * The sb_memeff authors 2026
"""

from pathlib import Path

RECIPES = Path(__file__).resolve().parents[3] / "recipes"
VOXCELEB = RECIPES / "VoxCeleb/SpeakerRec_memeff"
LIBRISPEECH = RECIPES / "LibriSpeech/ASR/transducer_memeff"

SPEAKER_NETWORKS = [
    "resnet",
    "revnet",
    "dfresnet",
    "dfrevnet",
    "ecapa",
    "revecapa",
]
SMALL_RESNET = {"base_channels": 2, "lin_neurons": 8, "n_mels": 16}
SMALL_ECAPA = {
    "channels": [16, 16, 48],
    "kernel_sizes": [5, 3, 1],
    "dilations": [1, 2, 1],
    "groups": [1, 1, 1],
    "attention_channels": 8,
    "lin_neurons": 8,
    "n_mels": 16,
}
SMALL_TRANSDUCER = {
    # The recipe's default is fp16, in which a CPU has no LSTM.
    "precision": "fp32",
    "d_model": 16,
    "nhead": 2,
    "num_encoder_layers": 2,
    "d_ffn": 32,
    "joint_dim": 12,
    "dec_dim": 8,
    "output_neurons": 7,
}


def speaker_yaml(network):
    """A shipped yaml file and overrides that make it small."""
    small = SMALL_ECAPA if "ecapa" in network else SMALL_RESNET
    path = VOXCELEB / "hparams" / f"train_{network}.yaml"
    return path, {**small, "out_n_neurons": 11}


def changed(path, folder, *replacements):
    """A copy of a yaml file in another folder, some of its text replaced."""
    text = path.read_text(encoding="utf-8")
    for old, new in replacements:
        assert old in text, old
        text = text.replace(old, new)
    copy = folder / path.name
    copy.write_text(text, encoding="utf-8")
    return copy


# --- SpeechBrain's recipes, in small -----------------------------------------

_SPEAKER = """
seed: 7
__seed: !apply:torch.manual_seed [!ref <seed>]
output_folder: !ref results/small/<seed>
save_folder: !ref <output_folder>/save
NOISE_DATASET_URL: https://example.invalid/noises.zip
data_folder: !PLACEHOLDER
data_folder_noise: !ref <data_folder>/noise
noise_annotation: !ref <save_folder>/noise.csv
batch_size: 32
lr: 0.001
sample_rate: 16000
sentence_len: 3.0
n_mels: 16
left_frames: 0
right_frames: 0
deltas: False
out_n_neurons: 11
emb_dim: 8

compute_features: !new:speechbrain.lobes.features.Fbank
    n_mels: !ref <n_mels>
    left_frames: !ref <left_frames>
    right_frames: !ref <right_frames>
    deltas: !ref <deltas>

mean_var_norm: !new:speechbrain.processing.features.InputNormalization
    norm_type: sentence
    std_norm: False

prepare_noise_data: !name:speechbrain.augment.preparation.prepare_dataset_from_URL
    URL: !ref <NOISE_DATASET_URL>
    dest_folder: !ref <data_folder_noise>
    ext: wav
    csv_file: !ref <noise_annotation>

add_noise: !new:speechbrain.augment.time_domain.AddNoise
    csv_file: !ref <noise_annotation>

drop_freq: !new:speechbrain.augment.time_domain.DropFreq

drop_chunk: !new:speechbrain.augment.time_domain.DropChunk

wav_augment: !new:speechbrain.augment.augmenter.Augmenter
    parallel_augment: True
    concat_original: True
    min_augmentations: 4
    max_augmentations: 4
    augmentations: [
        !ref <add_noise>,
        !ref <add_noise>,
        !ref <drop_freq>,
        !ref <drop_chunk>]

modules:
    compute_features: !ref <compute_features>
    embedding_model: !ref <embedding_model>
    classifier: !ref <classifier>
    mean_var_norm: !ref <mean_var_norm>

opt_class: !name:torch.optim.Adam
    lr: !ref <lr>
    weight_decay: 0.000002

epoch_counter: !new:speechbrain.utils.epoch_loop.EpochCounter
    limit: 2

train_logger: !new:speechbrain.utils.train_logger.FileTrainLogger
    save_file: !ref <output_folder>/log.txt

checkpointer: !new:speechbrain.utils.checkpoints.Checkpointer
    checkpoints_dir: !ref <save_folder>
    recoverables:
        embedding_model: !ref <embedding_model>
        counter: !ref <epoch_counter>
"""

_ANGULAR = """
classifier: !new:speechbrain.lobes.models.ECAPA_TDNN.Classifier
    input_size: !ref <emb_dim>
    out_neurons: !ref <out_n_neurons>

compute_cost: !new:speechbrain.nnet.losses.LogSoftmaxWrapper
    loss_fn: !new:speechbrain.nnet.losses.AdditiveAngularMargin
        margin: 0.2
        scale: 30
"""

UPSTREAM_SPEAKERS = {
    "ecapa": _SPEAKER
    + _ANGULAR
    + """
embedding_model: !new:speechbrain.lobes.models.ECAPA_TDNN.ECAPA_TDNN
    input_size: !ref <n_mels>
    channels: [16, 16, 48]
    kernel_sizes: [5, 3, 1]
    dilations: [1, 2, 1]
    groups: [1, 1, 1]
    attention_channels: 8
    lin_neurons: !ref <emb_dim>
""",
    "resnet": _SPEAKER
    + _ANGULAR
    + """
embedding_model: !new:speechbrain.lobes.models.ResNet.ResNet
    input_size: !ref <n_mels>
    channels: [4, 4, 8, 8]
    block_sizes: [1, 1, 1, 1]
    lin_neurons: !ref <emb_dim>
""",
    "xvector": _SPEAKER
    + """
embedding_model: !new:speechbrain.lobes.models.Xvector.Xvector
    in_channels: !ref <n_mels>
    activation: !name:torch.nn.LeakyReLU
    tdnn_blocks: 3
    tdnn_channels: [8, 8, 24]
    tdnn_kernel_sizes: [5, 3, 1]
    tdnn_dilations: [1, 2, 1]
    lin_neurons: !ref <emb_dim>

classifier: !new:speechbrain.lobes.models.Xvector.Classifier
    input_shape: [null, null, !ref <emb_dim>]
    activation: !name:torch.nn.LeakyReLU
    lin_blocks: 1
    lin_neurons: !ref <emb_dim>
    out_neurons: !ref <out_n_neurons>

compute_cost: !name:speechbrain.nnet.losses.nll_loss
""",
}


# A language model, which is not trained.
SMALL_LM = (
    ("rnn_neurons: 2048", "rnn_neurons: 8"),
    ("dnn_neurons: 512", "dnn_neurons: 8"),
)


def conformer_transducer(folder):
    """The shipped yaml file, with a small language model."""
    path = LIBRISPEECH / "hparams/conformer_transducer.yaml"
    return changed(path, folder, *SMALL_LM)


def upstream_transducer(folder):
    """As SpeechBrain's conformer transducer: ours, but for its loss."""
    path = LIBRISPEECH / "hparams/conformer_transducer.yaml"
    text = path.read_text(encoding="utf-8")
    start = text.index("transducer_loss: !new:")
    stop = text.index("log_softmax: !new:")
    loss = (
        "use_torchaudio: False\n"
        "transducer_cost: !name:speechbrain.nnet.losses.transducer_loss\n"
        "    blank_index: !ref <blank_index>\n"
        "    use_torchaudio: !ref <use_torchaudio>\n\n"
    )
    copy = folder / "upstream_transducer.yaml"
    copy.write_text(text[:start] + loss + text[stop:], encoding="utf-8")
    return changed(
        copy,
        folder,
        (
            "    transducer_loss: !ref <transducer_loss>\n",
            "    Tjoint: !ref <Tjoint>\n"
            "    transducer_lin: !ref <transducer_lin>\n",
        ),
        *SMALL_LM,
    )
