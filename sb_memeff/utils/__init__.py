"""Around training: checkpoints."""
