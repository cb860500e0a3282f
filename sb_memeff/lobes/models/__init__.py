"""Reversible and memory-efficient networks for speech."""
