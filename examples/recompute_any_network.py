"""Recomputes blocks of a network without changing it.

    python examples/recompute_any_network.py

Authors
 * The sb_memeff authors 2026
"""

import copy

import torch
from speechbrain.lobes.models.ECAPA_TDNN import ECAPA_TDNN

from sb_memeff.memory.step import training_step_memory
from sb_memeff.nnet.recompute import recompute_blocks

CHANNELS = [128, 128, 128, 128, 384]


def network():
    """SpeechBrain's ECAPA-TDNN, narrow."""
    return ECAPA_TDNN(80, channels=CHANNELS, lin_neurons=64)


def recomputed():
    """The same network; a yaml file does this with ``!apply:``."""
    net = network()
    recompute_blocks(net, ["blocks.*", "mfa", "asp"])
    return net


def main():
    """Compares memory and gradients with those of the plain network."""
    for build in (network, recomputed):
        memory = training_step_memory(build, (32, 300, 80))
        print(f"{build.__name__:10s} {memory.peak_bytes / 1e6:4.0f} MB")
    plain = network()
    ours = copy.deepcopy(plain)
    recompute_blocks(ours, ["blocks.*", "mfa", "asp"])
    feats = torch.rand(4, 100, 80)
    for net in (plain, ours):
        net(feats).square().sum().backward()
    equal = all(
        torch.equal(p.grad, q.grad)
        for p, q in zip(plain.parameters(), ours.parameters())
    )
    print(f"gradients equal bit for bit: {equal}")
    return equal


if __name__ == "__main__":
    main()
