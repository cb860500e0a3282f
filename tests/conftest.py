"""For all tests: their marks, and Triton's interpreter where there is no GPU.

Triton decides when it is imported, and its own library must be interpreted
too, so this comes before all else.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure(config):
    """Declares the marks."""
    for mark in (
        "slow: takes more than about 20 s on two CPU cores",
        "gpu: needs a CUDA device",
    ):
        config.addinivalue_line("markers", mark)
