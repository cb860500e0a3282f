"""Presets of few blocks: an analysis takes as long as there are layers.

Authors
 * The sb_memeff authors 2026
"""

import pytest

from sb_memeff.lobes.models.DFResNet import DFResNet
from sb_memeff.lobes.models.RevDFResNet import RevDFResNet
from sb_memeff.lobes.models.RevResNet import RevResNet
from sb_memeff.lobes.models.WeSpeakerResNet import ResNet


@pytest.fixture
def shallow(monkeypatch):
    """All presets are equally deep; a coupling stands for two blocks."""
    for lobe in (ResNet, RevResNet, DFResNet, RevDFResNet):
        sizes = [1, 1, 2, 1] if "Rev" in lobe.__name__ else [2, 2, 4, 2]
        presets = {
            name: {**preset, "block_sizes": sizes}
            for name, preset in lobe.PRESETS.items()
        }
        monkeypatch.setattr(lobe, "PRESETS", presets)
