"""For all tests: Triton kernels run in the interpreter where there is no GPU.

Triton decides when it is imported, and its own library must be interpreted
too, so this comes before all else.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
