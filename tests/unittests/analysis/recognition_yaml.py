"""Small yaml files like those of SpeechBrain's recipes for speech recognition.

Authors
 * The sb_memeff authors 2026
"""

_COMMON = """
output_folder: results/small
data_folder: !PLACEHOLDER
sample_rate: 16000
batch_size: 6
number_of_epochs: 3
output_neurons: 9
blank_index: 0
n_mels: 40

compute_features: !new:speechbrain.lobes.features.Fbank
    sample_rate: !ref <sample_rate>
    n_mels: !ref <n_mels>

normalize: !new:speechbrain.processing.features.InputNormalization
    norm_type: global

log_softmax: !new:speechbrain.nnet.activations.Softmax
    apply_log: True

epoch_counter: !new:speechbrain.utils.epoch_loop.EpochCounter
    limit: !ref <number_of_epochs>
"""

_ADADELTA = """
opt_class: !name:torch.optim.Adadelta
    rho: 0.95
"""

_CTC_COST = """
ctc_cost: !name:speechbrain.nnet.losses.ctc_loss
    blank_index: !ref <blank_index>
"""

_CRDNN = """!new:speechbrain.lobes.models.CRDNN.CRDNN
    input_size: !ref <n_mels>
    cnn_blocks: 1
    cnn_channels: [4]
    inter_layer_pooling_size: [2]
    time_pooling: True
    time_pooling_size: 4
    rnn_class: !name:speechbrain.nnet.RNN.LSTM
    rnn_layers: 1
    rnn_neurons: 16
    rnn_bidirectional: True
    dnn_blocks: 1
    dnn_neurons: 16
    dropout: 0.0
"""

_LINEAR = """
{name}: !new:speechbrain.nnet.linear.Linear
    input_size: {size}
    n_neurons: !ref <output_neurons>
"""


def _modules(*names):
    rows = "".join(f"    {name}: !ref <{name}>\n" for name in names)
    return f"\nmodules:\n{rows}"


CTC = (
    _COMMON
    + _ADADELTA
    + f"\nmodel: {_CRDNN}"
    + _LINEAR.format(name="output", size=16)
    + """
compute_cost: !name:speechbrain.nnet.losses.ctc_loss
    blank_index: !ref <blank_index>
"""
    + _modules("model", "output", "normalize")
)

SEQ2SEQ = (
    _COMMON
    + _ADADELTA
    + _CTC_COST
    + f"\nenc: {_CRDNN}"
    + _LINEAR.format(name="ctc_lin", size=16)
    + _LINEAR.format(name="seq_lin", size=16)
    + """
ctc_weight: 0.4
number_of_ctc_epochs: 2
bos_index: 1
eos_index: 2
dynamic_batching: False
feats_hop_size: 0.01
max_batch_length: 6000  # frames

emb: !new:speechbrain.nnet.embedding.Embedding
    num_embeddings: !ref <output_neurons>
    embedding_dim: 8

dec: !new:speechbrain.nnet.RNN.AttentionalRNNDecoder
    enc_dim: 16
    input_size: 8
    rnn_type: gru
    attn_type: location
    hidden_size: 16
    attn_dim: 16
    num_layers: 1
    scaling: 1.0
    channels: 4
    kernel_size: 10

seq_cost: !name:speechbrain.nnet.losses.nll_loss
    label_smoothing: 0.1
"""
    + _modules("enc", "emb", "dec", "ctc_lin", "seq_lin", "normalize")
)

PHONEME_TRANSDUCER = (
    _COMMON
    + _ADADELTA
    + f"\nenc: {_CRDNN}"
    + _LINEAR.format(name="output", size=12)
    + """
enc_lin: !new:speechbrain.nnet.linear.Linear
    input_size: 16
    n_neurons: 12

emb: !new:speechbrain.nnet.embedding.Embedding
    num_embeddings: !ref <output_neurons>
    consider_as_one_hot: True
    blank_id: !ref <blank_index>

dec: !new:speechbrain.nnet.RNN.GRU
    input_shape: [null, null, !ref <output_neurons> - 1]
    hidden_size: 8

dec_lin: !new:speechbrain.nnet.linear.Linear
    input_size: 8
    n_neurons: 12

Tjoint: !new:speechbrain.nnet.transducer.transducer_joint.Transducer_joint
    joint: sum

compute_cost: !name:speechbrain.nnet.losses.transducer_loss
    blank_index: !ref <blank_index>
"""
    + _modules(
        *("enc", "enc_lin", "emb", "dec", "dec_lin"),
        *("Tjoint", "output", "normalize"),
    )
)

_TRANSFORMER = (
    _COMMON
    + _CTC_COST
    + _LINEAR.format(name="ctc_lin", size="!ref <d_model>")
    + """
dynamic_batching: True
max_batch_length_train: 60
num_decoder_layers: 0
d_model: 16
d_ffn: 32
attention_type: RelPosMHAXL

CNN: !new:speechbrain.lobes.models.convolution.ConvolutionFrontEnd
    input_shape: (8, 10, 40)
    num_blocks: 2
    num_layers_per_block: 1
    out_channels: (8, 8)
    kernel_sizes: (3, 3)
    strides: (2, 2)
    residuals: (False, False)
    dropout: 0.0

Transformer: !new:speechbrain.lobes.models.transformer.TransformerASR.TransformerASR
    input_size: 80
    tgt_vocab: !ref <output_neurons>
    d_model: !ref <d_model>
    nhead: 2
    num_encoder_layers: 2
    num_decoder_layers: !ref <num_decoder_layers>
    d_ffn: !ref <d_ffn>
    dropout: 0.0
    encoder_module: conformer
    attention_type: !ref <attention_type>
    normalize_before: True
    causal: False
"""
)

TRANSFORMER_CTC = (
    _TRANSFORMER
    + """
model_opt_class: !name:torch.optim.AdamW
    lr: 0.001
"""
    + _modules("CNN", "Transformer", "ctc_lin", "normalize")
)

# Here the normalizer is not among the modules.
TRANSFORMER = (
    _TRANSFORMER.replace("num_decoder_layers: 0", "num_decoder_layers: 1")
    + _LINEAR.format(name="seq_lin", size="!ref <d_model>")
    + """
ctc_weight: 0.3
bos_index: 1
eos_index: 2
pad_index: 0

Adam: !name:torch.optim.Adam
    lr: 0.001

seq_cost: !name:speechbrain.nnet.losses.kldiv_loss
    label_smoothing: 0.0
    reduction: batchmean
"""
    + _modules("CNN", "Transformer", "seq_lin", "ctc_lin")
)

RECOGNITION = {
    "CTC": CTC,
    "seq2seq": SEQ2SEQ,
    "phoneme transducer": PHONEME_TRANSDUCER,
    "transformer": TRANSFORMER,
    "transformer CTC": TRANSFORMER_CTC,
}
