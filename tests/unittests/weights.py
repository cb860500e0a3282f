"""Weights for tests of networks whose blocks begin as their shortcuts."""

from torch import nn


def without_zeros(network, std=0.3):
    """The network, with what begins as zero drawn at random.

    Where the last layer of a function is zero, so is the function, and so are
    the gradients of all layers before it: what goes wrong there is not seen.
    """
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=std)
    return network
