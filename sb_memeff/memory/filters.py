"""torchaudio's mel filters, with values.

Authors
 * The sb_memeff authors 2026
"""

import contextlib
from collections.abc import Generator
from typing import Any

import torch
import torchaudio.functional
from torch.utils._python_dispatch import _disable_current_modes

__all__ = ["real_filters"]

# The first call imports modules, which must not happen within an analysis.
with _disable_current_modes():
    pass


@contextlib.contextmanager
def real_filters() -> Generator[None, None, None]:
    """Makes mel filters as real tensors.

    torchaudio checks that no filter is zero. Fake tensors of this size have no
    values.

    Yields
    ------
    None

    Example
    -------
    >>> from torch._subclasses.fake_tensor import FakeTensorMode
    >>> with FakeTensorMode(), real_filters():
    ...     mel = torchaudio.transforms.MelSpectrogram(n_mels=40)
    >>> type(mel.mel_scale.fb).__name__
    'Tensor'
    """
    original = torchaudio.functional.melscale_fbanks

    def filters(*args: Any, **kwargs: Any) -> torch.Tensor:
        with _disable_current_modes():
            return original(*args, **kwargs)

    torchaudio.functional.melscale_fbanks = filters
    try:
        yield
    finally:
        torchaudio.functional.melscale_fbanks = original
