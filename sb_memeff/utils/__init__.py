"""Around training: checkpoints and hooks."""
