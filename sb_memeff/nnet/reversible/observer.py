"""An interface to observe the streams of a reversible chain.

Authors
 * The sb_memeff authors 2026
"""

import torch

__all__ = ["Observer"]


class Observer:
    """Sees the streams of one forward pass and of its backward passes."""

    def forward_begins(
        self, names: list[str], streams: list[torch.Tensor]
    ) -> None:
        """Called in forward before the first block; names lists all blocks."""

    def block_computed(self, name: str, streams: list[torch.Tensor]) -> None:
        """Called in forward with the streams after each block."""

    def backward_begins(self) -> None:
        """Called before the first block is inverted; may raise an error."""

    def input_reconstructed(
        self, name: str, streams: list[torch.Tensor]
    ) -> None:
        """Called in backward with the streams before each block."""

    def backward_ends(self) -> None:
        """Called after the last block that had to be inverted."""
