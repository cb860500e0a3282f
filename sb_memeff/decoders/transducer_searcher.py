"""Transducer search that skips padding and always ends.

Authors
 * The sb_memeff authors 2026
"""

from typing import Any

import torch
from speechbrain.decoders import transducer

from sb_memeff.nnet.transducer_loss.batch import count

__all__ = ["TransducerBeamSearcher"]


class TransducerBeamSearcher(transducer.TransducerBeamSearcher):
    """SpeechBrain's searcher with two differences.

    With lengths, it does not decode padding. SpeechBrain's searcher decodes
    all frames of the batch, and may find words in the padding.

    Beam search always ends. SpeechBrain's stays in a frame as long as the
    blank is not among the ``beam_size`` best tokens, which may be for ever for
    a barely trained network. Here, after ``max_expansions`` hypotheses of a
    frame, the blank is the only token that may follow.

    Arguments
    ---------
    *args : tuple
        As for speechbrain.decoders.transducer.TransducerBeamSearcher.
    max_expansions : int
        Hypotheses that beam search expands in a frame. A trained network
        needs about ``beam_size``.
    **kwargs : dict
        As for SpeechBrain's.

    Raises
    ------
    ValueError
        If max_expansions is less than 1.

    Example
    -------
    >>> from speechbrain.nnet.embedding import Embedding
    >>> from speechbrain.nnet.RNN import LSTM
    >>> from speechbrain.nnet.transducer.transducer_joint import (
    ...     Transducer_joint,
    ... )
    >>> searcher = TransducerBeamSearcher(
    ...     [Embedding(5, 8), LSTM(8, input_size=8)],
    ...     Transducer_joint(),
    ...     [torch.nn.Linear(8, 5)],
    ...     blank_id=0,
    ...     beam_size=2,
    ... )
    >>> hyps, *_ = searcher(torch.rand(2, 6, 8), torch.tensor([1.0, 0.5]))
    >>> len(hyps)
    2
    """

    def __init__(self, *args: Any, max_expansions: int = 100, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if max_expansions < 1:
            raise ValueError(
                f"max_expansions={max_expansions} must be at least 1."
            )
        self.max_expansions = max_expansions
        self._frame: int | None = None
        self._expansions = 0

    @torch.no_grad()
    def forward(
        self, tn_output: torch.Tensor, wav_lens: torch.Tensor | None = None
    ) -> tuple[
        list[list[int]],
        torch.Tensor | None,
        list[list[list[int]]] | None,
        list[list[torch.Tensor]] | None,
    ]:
        """Decodes the encoder's output.

        Arguments
        ---------
        tn_output : torch.Tensor
            [B, T, H], the encoder's output.
        wav_lens : torch.Tensor, optional
            [B], relative to T; by default all are 1.

        Returns
        -------
        hyps : list of list of int
            Tokens of each utterance.
        score : torch.Tensor or None
            As from SpeechBrain; None for greedy search with lengths.
        nbest : list or None
            The nbest hypotheses of each utterance; None for greedy search.
        nbest_scores : list or None
            Their scores.
        """
        self._frame = None
        if wav_lens is None:
            return self.searcher(tn_output)
        frames = count(wav_lens, tn_output.shape[1], "frames").tolist()
        if self.beam_size <= 1:
            return self._greedy(tn_output, frames), None, None, None
        hyps, scores, nbest, nbest_scores = zip(
            *(self.searcher(x[None, :n]) for x, n in zip(tn_output, frames))
        )
        return (
            [h[0] for h in hyps],
            torch.stack(scores).mean(),
            [n[0] for n in nbest],
            [s[0] for s in nbest_scores],
        )

    def _greedy(
        self, tn_output: torch.Tensor, frames: list[int]
    ) -> list[list[int]]:
        # Decode up to the next end of an utterance, then drop that utterance.
        hyps = [[] for _ in frames]
        active = list(range(len(frames)))
        done, state = 0, None
        for end in sorted(set(frames)):
            found, *_, state = self.transducer_greedy_decode(
                tn_output[active, done:end], state, return_hidden=True
            )
            for number, tokens in zip(active, found):
                hyps[number] += tokens
            kept = [n for n, i in enumerate(active) if frames[i] > end]
            active = [active[n] for n in kept]
            state = self._get_sentence_to_update(kept, *state)
            done = end
        return hyps

    def _joint_forward_step(
        self, h_i: torch.Tensor, out_PN: torch.Tensor
    ) -> torch.Tensor:
        log_probs = super()._joint_forward_step(h_i, out_PN)
        if self.beam_size > 1:
            frame = h_i.data_ptr()
            if frame != self._frame:
                self._frame, self._expansions = frame, 0
            self._expansions += 1
            if self._expansions > self.max_expansions:
                only = torch.full_like(log_probs, -torch.inf)
                only[..., self.blank_id] = log_probs[..., self.blank_id]
                return only
        return log_probs
