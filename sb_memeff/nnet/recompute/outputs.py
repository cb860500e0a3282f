"""Outputs that a block does not keep.

SpeechBrain's encoder layers return their attention weights besides the sequence,
and encoders collect them in a list. In training nobody reads the list, but it
keeps a [B, heads, T, T] tensor of each layer alive.

Authors
 * The sb_memeff authors 2026
"""

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

__all__ = ["DroppedOutput", "DroppedOutputError", "first_output_of"]


class DroppedOutputError(RuntimeError):
    """Raised if code uses an output that a block has dropped."""


class DroppedOutput:
    """Stands for a dropped output; using it raises an error.

    It may be stored in containers, copied, pickled and detached.

    Arguments
    ---------
    block : str
        Name of the block that dropped the output.

    Example
    -------
    >>> attention = [DroppedOutput("layers.0")]
    >>> attention[0].mean()
    Traceback (most recent call last):
        ...
    sb_memeff.nnet.recompute.outputs.DroppedOutputError: layers.0 keeps only its first output (first_output_only=True \
of recompute_blocks), and this output is a further one. Set \
first_output_only=False, or do not use this output in training.
    """

    def __init__(self, block: str):
        self.block = block

    def __repr__(self) -> str:
        return f"DroppedOutput({self.block!r})"

    def detach(self) -> "DroppedOutput":
        """Returns the object itself.

        Returns
        -------
        DroppedOutput
            Itself.
        """
        return self

    def __getattr__(self, name: str) -> NoReturn:
        # Python, copy and pickle ask for optional special methods, and pickle
        # before there is a block.
        if name.startswith("__") or name == "block":
            raise AttributeError(name)
        self._raise()

    def _raise(self, *args: object) -> NoReturn:
        raise DroppedOutputError(
            f"{self.block} keeps only its first output (first_output_only=True "
            f"of recompute_blocks), and this output is a further one. Set "
            f"first_output_only=False, or do not use this output in training."
        )

    # Operators look up special methods in the class.
    __bool__ = __len__ = __iter__ = __getitem__ = __contains__ = _raise
    __call__ = __int__ = __float__ = __index__ = __array__ = _raise
    __neg__ = __invert__ = __abs__ = _raise
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _raise
    __truediv__ = __rtruediv__ = __floordiv__ = __rfloordiv__ = _raise
    __mod__ = __rmod__ = __pow__ = __rpow__ = _raise
    __matmul__ = __rmatmul__ = __setitem__ = __complex__ = _raise
    __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = _raise
    __and__ = __rand__ = __or__ = __ror__ = __xor__ = __rxor__ = _raise
    # As a tensor's: by identity. (A class that defines == has no hash.)
    __hash__ = object.__hash__

    @classmethod
    def __torch_function__(
        cls, func: object, types: object, args: Any = (), kwargs: Any = None
    ) -> NoReturn:
        """Raises for functions of torch."""
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, cls):
                leaf._raise()
        raise AssertionError("torch found none among the arguments")


def first_output_of(
    block: str, function: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """Calls a function and drops further tensors in its result.

    Arguments
    ---------
    block : str
        Name of the block.
    function : callable
        Its forward. Only tuples and lists have further outputs.
    *args : tuple
        Arguments of the function.
    **kwargs : dict
        Its keyword arguments.

    Returns
    -------
    any
        The result with a DroppedOutput in the place of each tensor after the
        first item.

    Example
    -------
    >>> x = torch.zeros(1)
    >>> first_output_of("layers.0", lambda x: (x, [x, None, 3]), x)
    (tensor([0.]), [DroppedOutput('layers.0'), None, 3])
    """
    result = function(*args, **kwargs)
    if not isinstance(result, (tuple, list)) or len(result) < 2:
        return result
    leaves, structure = tree_flatten(result)
    kept = len(tree_leaves(result[0]))
    for i in range(kept, len(leaves)):
        if isinstance(leaves[i], torch.Tensor):
            leaves[i] = DroppedOutput(block)
    return tree_unflatten(leaves, structure)
