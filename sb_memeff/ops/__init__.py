"""Numerics with a plain torch form and a fused one for GPUs."""
