"""Small copies of SpeechBrain's networks, and how to recompute them."""

import torch
from speechbrain.lobes.models.ECAPA_TDNN import ECAPA_TDNN
from speechbrain.lobes.models.ResNet import ResNet
from speechbrain.lobes.models.transformer.TransformerASR import (
    EncoderWrapper,
    TransformerASR,
)
from speechbrain.lobes.models.Xvector import Xvector


def ecapa(dropout=0.0):
    return ECAPA_TDNN(
        20,
        channels=[16] * 4 + [48],
        attention_channels=8,
        lin_neurons=8,
        res2net_scale=4,
        se_channels=8,
        dropout=dropout,
    )


def resnet():
    return ResNet(
        20, channels=[8, 8, 16, 16], block_sizes=[2, 2, 2, 2], lin_neurons=8
    )


def xvector():
    return Xvector(in_channels=20, tdnn_channels=[16] * 4 + [48], lin_neurons=8)


def conformer(attention_type="RelPosMHAXL", dropout=0.1, layers=3, **options):
    return EncoderWrapper(
        TransformerASR(
            tgt_vocab=10,
            input_size=20,
            d_model=16,
            nhead=4,
            num_encoder_layers=layers,
            num_decoder_layers=0,
            d_ffn=32,
            dropout=dropout,
            encoder_module="conformer",
            attention_type=attention_type,
            normalize_before=True,
            causal=False,
            **options,
        )
    )


def conformer_absolute():
    """In float64: SpeechBrain's relative attention computes in float32."""
    return conformer("regularMHA", positional_encoding="fixed_abs_sine")


LAYERS = "transformer.encoder.layers.*"

# How to build it, and what to recompute.
NETWORKS = {
    "ecapa": (ecapa, {"blocks": ["blocks.*", "mfa", "asp"]}),
    "ecapa_dropout": (
        lambda: ecapa(dropout=0.2),
        {"blocks": ["blocks.*", "mfa", "asp"], "segment_length": 2},
    ),
    "resnet": (resnet, {"blocks": "layer?.*"}),
    "resnet_nested": (resnet, {"blocks": ["layer?", "layer?.*"]}),
    "xvector": (xvector, {"blocks": "blocks.*", "segment_length": 3}),
    "conformer": (conformer, {"blocks": LAYERS}),
    "conformer_every_2": (conformer, {"blocks": LAYERS, "every": 2}),
    "conformer_absolute": (conformer_absolute, {"blocks": LAYERS}),
}


def build(name, dtype=torch.float32):
    """The network, always with the same weights."""
    torch.manual_seed(0)
    net = NETWORKS[name][0]()
    # Fake tensors dislike to(), even if there is nothing to do.
    return net if dtype == torch.float32 else net.to(dtype)


def batch(dtype=torch.float32):
    """Features [3, 40, 20] and relative lengths."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 40, 20, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.tensor([1.0, 0.7, 0.5], dtype=dtype)
