"""Count the memory of a training step, without a GPU and without arithmetic."""
