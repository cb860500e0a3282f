"""Triton kernels, one operation a file; ``sb_memeff.ops.dispatch`` picks them."""
