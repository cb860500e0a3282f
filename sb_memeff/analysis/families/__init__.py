"""Recipe families that the analysis supports.

A family is a file with a ``TrainingStep``, and a line below.

Authors
 * The sb_memeff authors 2026
"""

from sb_memeff.analysis.families.ctc import CTCStep
from sb_memeff.analysis.families.phoneme_transducer import (
    PhonemeTransducerStep,
)
from sb_memeff.analysis.families.seq2seq import Seq2SeqStep
from sb_memeff.analysis.families.speaker import SpeakerStep
from sb_memeff.analysis.families.step import TrainingStep
from sb_memeff.analysis.families.transducer import TransducerStep
from sb_memeff.analysis.families.transformer import (
    TransformerCTCStep,
    TransformerStep,
)

__all__ = ["FAMILIES"]

FAMILIES: dict[str, type[TrainingStep]] = {
    "speaker": SpeakerStep,
    "transducer": TransducerStep,
    "phoneme transducer": PhonemeTransducerStep,
    "transformer": TransformerStep,
    "transformer CTC": TransformerCTCStep,
    "seq2seq": Seq2SeqStep,
    "CTC": CTCStep,
}
