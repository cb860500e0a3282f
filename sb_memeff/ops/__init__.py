"""Numerics with a plain torch form and fused kernels for GPUs."""
