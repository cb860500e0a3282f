"""Around training: memory analysis, checkpoints, export, 8-bit tensors."""
