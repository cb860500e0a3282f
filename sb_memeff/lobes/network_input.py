"""The input of a network: its checks and its memory format.

Authors
 * The sb_memeff authors 2026
"""

import torch

__all__ = ["check_features", "for_tensor_cores"]


def check_features(
    x: torch.Tensor, input_size: int, dtype: torch.dtype
) -> None:
    """Checks that shape and dtype of features fit the network.

    Arguments
    ---------
    x : torch.Tensor
        Features [N, T, F].
    input_size : int
        Features per frame that the network takes.
    dtype : torch.dtype
        Dtype of its weights.

    Raises
    ------
    ValueError
        If the shape does not fit.
    TypeError
        If the dtype does not fit, and autocast does not convert it.

    Example
    -------
    >>> check_features(torch.rand(2, 50, 80), 80, torch.float32)
    """
    if x.dim() != 3 or x.shape[2] != input_size:
        raise ValueError(
            f"Features must have the shape [N, T, {input_size}], got "
            f"{tuple(x.shape)}; the last number is the network's input_size."
        )
    # Autocast converts neither integers nor float64.
    is_converted = (
        torch.is_autocast_enabled(x.device.type)
        and x.is_floating_point()
        and torch.float64 not in (x.dtype, dtype)
    )
    if x.dtype != dtype and not is_converted:
        raise TypeError(
            f"Features are {x.dtype} and the network's weights {dtype}; call "
            f"feats.to({dtype}) or net.to({x.dtype})."
        )


def for_tensor_cores(x: torch.Tensor) -> torch.Tensor:
    """Puts channels last where convolutions run on tensor cores.

    In half precision cuDNN's kernels for tensor cores take no other memory
    format, and would transpose input and output of each convolution. All
    later layers keep the format.

    Arguments
    ---------
    x : torch.Tensor
        Output of the first convolution [N, C, T, F].

    Returns
    -------
    torch.Tensor
        In ``torch.channels_last`` for half precision on a GPU, else x.

    Example
    -------
    >>> x = torch.rand(1, 2, 3, 4)
    >>> for_tensor_cores(x) is x
    True
    """
    if x.is_cuda and x.dtype in (torch.float16, torch.bfloat16):
        return x.contiguous(memory_format=torch.channels_last)
    return x
