"""A stand-in of SpeechBrain's script of the same name."""

import speechbrain as sb


class ASR(sb.Brain):
    """A transducer with CTC."""

    def compute_forward(self, batch, stage):
        """Logits of the transducer, and in training scores for CTC."""
        wavs, wav_lens = batch.sig
        feats = self.hparams.compute_features(wavs)
        epoch = self.hparams.epoch_counter.current
        feats = self.modules.normalize(feats, wav_lens, epoch=epoch)
        x = self.modules.enc(
            self.modules.CNN(feats), wav_lens, pad_idx=self.hparams.pad_index
        )
        x = self.modules.proj_enc(x)

        h, _ = self.modules.dec(self.modules.emb(batch.tokens_bos.data))
        h = self.modules.proj_dec(h)

        # Joint network
        # add labelseq_dim to the encoder tensor: [B,T,H_enc] => [B,T,1,H_enc]
        # add timeseq_dim to the decoder tensor: [B,U,H_dec] => [B,1,U,H_dec]
        joint = self.modules.Tjoint(x.unsqueeze(2), h.unsqueeze(1))

        # Output layer for transducer log-probabilities
        logits_transducer = self.modules.transducer_lin(joint)

        p_ctc = None
        if stage == sb.Stage.TRAIN:
            p_ctc = self.hparams.log_softmax(self.modules.proj_ctc(x))
        return p_ctc, logits_transducer, wav_lens

    def compute_objectives(self, predictions, batch, stage):
        """Loss of the transducer, and in training of CTC."""
        p_ctc, logits_transducer, wav_lens = predictions
        tokens, token_lens = batch.tokens
        if stage == sb.Stage.TRAIN:
            if p_ctc is not None:
                CTC_loss = self.hparams.ctc_cost(
                    p_ctc, tokens, wav_lens, token_lens
                )
            loss_transducer = self.hparams.transducer_cost(
                logits_transducer, tokens, wav_lens, token_lens
            )
            ctc_weight = self.hparams.ctc_weight
            loss = ctc_weight * CTC_loss + (1 - ctc_weight) * loss_transducer
        else:
            loss = self.hparams.transducer_cost(
                logits_transducer, tokens, wav_lens, token_lens
            )
        return loss

    def on_fit_batch_end(self, batch, outputs, loss, should_step):
        """The learning rate of the next step."""
        if should_step:
            self.hparams.noam_annealing(self.optimizer)
