"""Exports trained networks as files that run without this package.

A file is a trace of the forward pass, as ONNX or TorchScript, for any batch
size and any number of frames. It consists of plain operations: inference
stores no activations, so there is no memory to save.

The trace includes the grid of a reversible network's streams (see
``sb_memeff.nnet.reversible``). The grid limits how closely two programs agree:
a value halfway between two points of the grid, up to float32's rounding, is
rounded to either of them, which are 2**-12 apart. Embeddings of networks
trained on speech, with values around 2, differ by up to 9e-5 in onnxruntime,
and by as much between two convolution algorithms of PyTorch. Those of an
untrained network can differ by 1e-3. Networks without a grid agree to 1e-5.

Authors
 * The sb_memeff authors 2026
"""

import contextlib
import importlib.util
import warnings
from collections.abc import Generator
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

__all__ = ["export_onnx", "trace"]

# Enough for a network with a stride of 8 and for the reflect padding of
# ECAPA-TDNN's dilated kernels.
FRAMES = 101


def export_onnx(
    network: nn.Module,
    path: str | Path,
    input_size: int,
    with_lengths: bool = False,
) -> None:
    """Writes a network as an ONNX file.

    The file's inputs are ``feats`` [B, T, input_size] and optionally
    ``lengths`` [B] (relative, as in SpeechBrain); its output is
    ``embeddings``. B and T are dynamic. The training mode and ``save_memory``
    of the network do not matter and are not changed.

    Arguments
    ---------
    network : torch.nn.Module
        A network of ``sb_memeff.lobes.models``, or a module with the same
        signature.
    path : str
        File to write.
    input_size : int
        Number of features per frame.
    with_lengths : bool
        Whether the file takes lengths. Without them, all frames count.

    Raises
    ------
    ImportError
        If the package onnx is missing.

    Example
    -------
    >>> from sb_memeff.lobes.models.RevResNet import RevResNet
    >>> net = RevResNet.from_preset("RevNet34", input_size=80)
    >>> export_onnx(net, "net.onnx", input_size=80)  # doctest: +SKIP
    >>> import onnxruntime  # doctest: +SKIP
    >>> session = onnxruntime.InferenceSession("net.onnx")  # doctest: +SKIP
    >>> feats = torch.rand(2, 300, 80).numpy()
    >>> session.run(None, {"feats": feats})[0].shape  # doctest: +SKIP
    (2, 256)
    """
    if importlib.util.find_spec("onnx") is None:
        raise ImportError("Writing ONNX needs a package: pip install onnx")
    names = ["feats", "lengths"] if with_lengths else ["feats"]
    free = {"feats": {0: "batch", 1: "frames"}, "embeddings": {0: "batch"}}
    if with_lengths:
        free["lengths"] = {0: "batch"}
    inputs = example(network, input_size, with_lengths)
    with for_inference(network), affine_norms(network):
        # The newer exporter (dynamo=True) writes the same function, but takes
        # twenty times as long and needs another package.
        torch.onnx.export(
            network,
            inputs,
            str(path),
            dynamo=False,
            input_names=names,
            output_names=["embeddings"],
            dynamic_axes=free,
            opset_version=17,
        )


def trace(
    network: nn.Module, input_size: int, with_lengths: bool = False
) -> torch.jit.ScriptModule:
    """Traces a network as TorchScript, for C++ or Python.

    The trace has the network's signature, for inference. B and T are dynamic.

    Arguments
    ---------
    network : torch.nn.Module
        A network of ``sb_memeff.lobes.models``, or a module with the same
        signature.
    input_size : int
        Number of features per frame.
    with_lengths : bool
        Whether the trace takes lengths.

    Returns
    -------
    torch.jit.ScriptModule
        The trace, on the network's device. It shares the weights.

    Example
    -------
    >>> from sb_memeff.lobes.models.RevResNet import RevResNet
    >>> net = RevResNet.from_preset("RevNet34", base_channels=4)
    >>> trace(net, input_size=80)(torch.rand(2, 30, 80)).shape
    torch.Size([2, 256])
    """
    inputs = example(network, input_size, with_lengths)
    with for_inference(network):
        return cast(
            torch.jit.ScriptModule,
            torch.jit.trace(network, inputs, check_trace=False),
        )


def example(
    network: nn.Module, input_size: int, with_lengths: bool
) -> tuple[torch.Tensor, ...]:
    """Makes the example inputs of a trace.

    Arguments
    ---------
    network : torch.nn.Module
        The network.
    input_size : int
        Number of features per frame.
    with_lengths : bool
        Whether to include lengths.

    Returns
    -------
    tuple of torch.Tensor
        feats [1, T, input_size], and lengths [1].
    """
    weight = next(network.parameters())
    # One utterance: SpeechBrain's length_to_mask makes the number of lengths
    # a constant of the trace, and a mask of one broadcasts to any batch.
    feats = torch.zeros(
        1, FRAMES, input_size, device=weight.device, dtype=weight.dtype
    )
    lengths = torch.ones(1, device=weight.device)
    return (feats, lengths) if with_lengths else (feats,)


@contextlib.contextmanager
def for_inference(network: nn.Module) -> Generator[None, None, None]:
    """Sets evaluation mode without gradients, and restores the mode.

    Arguments
    ---------
    network : torch.nn.Module
        The network.
    """
    modes = [(module, module.training) for module in network.modules()]
    saving: list[tuple[Any, Any]] = [
        (module, module.save_memory)
        for module in network.modules()
        if hasattr(module, "save_memory")
    ]
    network.eval()
    try:
        with torch.no_grad(), warnings.catch_warnings():
            # Tracing warns of compared shapes. These are in checks, which hold
            # for all sizes if they hold for one.
            warnings.simplefilter("ignore", torch.jit.TracerWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.filterwarnings("ignore", "Constant folding", UserWarning)
            for module, _ in saving:
                module.save_memory = False
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for module, value in saving:
            module.save_memory = value


@contextlib.contextmanager
def affine_norms(network: nn.Module) -> Generator[None, None, None]:
    """Temporarily gives affine parameters to batch norms without them.

    The exporter would create ones and zeros itself, but fails if it cannot
    infer the number of channels.

    Arguments
    ---------
    network : torch.nn.Module
        The network.
    """
    plain: list[Any] = [
        module
        for module in network.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        and module.weight is None
    ]
    for module in plain:
        module.weight = nn.Parameter(torch.ones_like(module.running_var))
        module.bias = nn.Parameter(torch.zeros_like(module.running_mean))
    try:
        yield
    finally:
        for module in plain:
            module.weight = module.bias = None
