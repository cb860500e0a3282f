"""bfloat16 on this machine's processor.

Authors
 * The sb_memeff authors 2026
"""

import pytest
import torch


def _runs_lstm():
    # oneDNN's LSTM needs AVX-512 for it.
    try:
        with torch.autocast("cpu", torch.bfloat16):
            torch.nn.LSTM(2, 2)(torch.zeros(1, 1, 2))
    except RuntimeError:
        return False
    return True


HAS_BF16_LSTM = _runs_lstm()
needs_bf16_lstm = pytest.mark.skipif(
    not HAS_BF16_LSTM, reason="no LSTM in bfloat16 on this processor"
)
