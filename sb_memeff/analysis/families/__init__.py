"""Recipe families that the analysis supports.

A family is a file with a ``TrainingStep``, and a line below.

Authors
 * The sb_memeff authors 2026
"""

from sb_memeff.analysis.families.speaker import SpeakerStep
from sb_memeff.analysis.families.step import TrainingStep
from sb_memeff.analysis.families.transducer import TransducerStep

__all__ = ["FAMILIES"]

FAMILIES: dict[str, type[TrainingStep]] = {
    "speaker": SpeakerStep,
    "transducer": TransducerStep,
}
