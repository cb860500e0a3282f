"""A stand-in of SpeechBrain's script of the same name."""

import speechbrain as sb
from speechbrain.dataio import audio_io


class SpeakerBrain(sb.core.Brain):
    """Class for speaker embedding training"""

    def compute_forward(self, batch, stage):
        """Scores of the speakers."""
        wavs, lens = batch.sig
        feats = self.modules.compute_features(wavs)
        feats = self.modules.mean_var_norm(feats, lens)
        return self.modules.classifier(self.modules.embedding_model(feats))

    def compute_objectives(self, predictions, batch, stage):
        """Loss of the speakers."""
        spkid, lens = batch.spk_id_encoded
        return self.hparams.compute_cost(predictions, spkid, lens)


def read(wav):
    """As in upstream's pipeline."""
    return audio_io.load(wav)
