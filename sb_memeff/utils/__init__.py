"""Tools around training: the memory analysis of a training step."""
