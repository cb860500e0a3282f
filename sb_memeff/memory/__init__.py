"""Counts the memory of a training step without a GPU or arithmetic."""
