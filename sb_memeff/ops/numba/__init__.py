"""Functions that numba compiles for CPUs; ``sb_memeff.ops.dispatch`` picks them."""
