"""A small network of each kind. A new network is one line in NETWORKS.

Authors
 * The sb_memeff authors 2026
"""

import copy
from functools import cache, partial

import torch

from sb_memeff.lobes.models.DFResNet import DFResNet
from sb_memeff.lobes.models.RecomputedECAPA_TDNN import ECAPA_TDNN
from sb_memeff.lobes.models.RevDFResNet import RevDFResNet
from sb_memeff.lobes.models.RevECAPA_TDNN import RevECAPA_TDNN
from sb_memeff.lobes.models.RevResNet import RevResNet
from sb_memeff.lobes.models.WeSpeakerResNet import ResNet
from tests.unittests.weights import without_zeros

MELS = 20
EMBEDDING = 6
ECAPA = {
    "input_size": MELS,
    "lin_neurons": EMBEDDING,
    "channels": [16, 16, 16, 16, 140],  # two slices in the pooling
    "attention_channels": 8,
    "res2net_scale": 4,
    "se_channels": 8,
}
STRIDES = {"strides": [[1, 2], 2, [3, 1], 1]}
II = {"downsampling": "invertible"}


def _preset(lobe, name, **options):
    return partial(
        lobe.from_preset,
        name,
        base_channels=4,
        input_size=MELS,
        lin_neurons=EMBEDDING,
        block_sizes=[1, 2, 2, 1],
        **options,
    )


# Each kind of block, of strides and of down-sampling, but few blocks.
NETWORKS = {
    "ResNet34": _preset(ResNet, "ResNet34"),
    "ResNet34-strides": _preset(ResNet, "ResNet34", **STRIDES),
    "ResNet101": _preset(ResNet, "ResNet101"),
    "ResNet101-strides": _preset(ResNet, "ResNet101", **STRIDES),
    "DFResNet56": _preset(DFResNet, "DFResNet56"),
    "GeminiDFResNet60": _preset(DFResNet, "GeminiDFResNet60"),
    "RevNet34-I": _preset(RevResNet, "RevNet34"),
    "RevNet34-II": _preset(RevResNet, "RevNet34", **II),
    "RevNet101-I": _preset(RevResNet, "RevNet101"),
    "RevNet101-II": _preset(RevResNet, "RevNet101", **II),
    "DFRevNet56-I": _preset(RevDFResNet, "DFRevNet56"),
    "DFRevNet56-II": _preset(RevDFResNet, "DFRevNet56", **II),
    "GeminiDFRevNet60-I": _preset(RevDFResNet, "GeminiDFRevNet60"),
    "GeminiDFRevNet60-II": _preset(RevDFResNet, "GeminiDFRevNet60", **II),
    "ECAPA_TDNN": partial(ECAPA_TDNN, **ECAPA),
    "RevECAPA_TDNN": partial(RevECAPA_TDNN, **ECAPA),
    "RevECAPA_TDNN-24": partial(
        RevECAPA_TDNN, **{**ECAPA, "channels": [24, 16, 16, 16, 140]}
    ),
}
# SpeechBrain's function: padding reaches its statistics.
LETS_PADDING_IN = ["ECAPA_TDNN"]


def small(name, dtype=torch.float32, std=0.3):
    """A network of the list, always with the same weights, none of them zero.

    Arguments
    ---------
    name : str
        A key of NETWORKS.
    dtype : torch.dtype
        Of the weights.
    std : float
        Of the weights that begin as zero. The larger, the more the network
        amplifies; float16 overflows at 0.3.

    Returns
    -------
    torch.nn.Module
        The network, in training mode.
    """
    return copy.deepcopy(_small(name, dtype, std))


@cache
def _small(name, dtype, std):
    torch.manual_seed(0)
    return without_zeros(NETWORKS[name](), std).to(dtype)


def trained(name, dtype=torch.float64, std=0.3):
    """The same in eval mode, with running statistics that matter."""
    return copy.deepcopy(_trained(name, dtype, std))


@cache
def _trained(name, dtype, std):
    net = small(name, dtype, std)
    torch.manual_seed(2)
    with torch.no_grad():
        net(torch.randn(4, 33, MELS, dtype=dtype))
    return net.eval()
