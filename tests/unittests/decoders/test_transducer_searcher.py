"""Searching a batch gives what searching each utterance gives."""

import pytest
import torch
from speechbrain.decoders import transducer
from speechbrain.nnet.embedding import Embedding
from speechbrain.nnet.RNN import GRU, LSTM
from speechbrain.nnet.transducer.transducer_joint import Transducer_joint
from torch import nn

from sb_memeff.decoders.transducer_searcher import TransducerBeamSearcher

HIDDEN, VOCABULARY = 8, 6


def network(rnn=LSTM, blank_bias=0.6):
    """Arguments of a searcher; it emits a token every few frames."""
    torch.manual_seed(3)
    embedding = Embedding(VOCABULARY, consider_as_one_hot=True, blank_id=0)
    classifier = nn.Linear(HIDDEN, VOCABULARY)
    classifier.weight.data *= 3
    classifier.bias.data[0] += blank_bias
    return {
        "decode_network_lst": [
            embedding,
            rnn(HIDDEN, input_size=VOCABULARY - 1),
        ],
        "tjoint": Transducer_joint(nonlinearity=nn.Tanh),
        "classifier_network": [classifier],
        "blank_id": 0,
        "nbest": 2,
    }


@pytest.mark.parametrize("rnn", [LSTM, GRU])
@pytest.mark.parametrize("beam_size", [1, VOCABULARY])
def test_padding_is_not_heard(beam_size, rnn):
    search = TransducerBeamSearcher(**network(rnn), beam_size=beam_size)
    upstream = transducer.TransducerBeamSearcher(
        **network(rnn), beam_size=beam_size
    )
    frames = torch.tensor([12, 20, 7, 20, 12, 1])
    enc = 2 * torch.randn(len(frames), 20, HIDDEN)
    found, _, nbest, _ = search(enc, frames / 20)
    alone = [upstream(x[None, :n]) for x, n in zip(enc, frames)]
    assert found == [a[0][0] for a in alone]
    assert sum(map(len, found)) > 20 and len(set(map(tuple, found))) > 4
    if beam_size > 1:
        assert nbest == [a[2][0] for a in alone]
    # SpeechBrain's own hears the padding.
    assert upstream(enc)[0] != found
    assert search(enc)[0] == upstream(enc)[0]


def test_one_utterance_and_no_frames():
    search = TransducerBeamSearcher(**network(), beam_size=1)
    enc = torch.randn(2, 5, HIDDEN)
    assert search(enc, torch.tensor([1.0, 0.0]))[0][1] == []
    assert search(enc[:1], torch.ones(1))[0] == search(enc[:1])[0]


def test_beam_search_of_a_network_that_hates_blanks_ends():
    search = TransducerBeamSearcher(
        **network(blank_bias=-50), beam_size=2, max_expansions=7
    )
    # In each frame 7, and 2 that end it.
    expected = 5 * 9
    calls = 0
    inner = search._forward_PN

    def counted(*args):
        nonlocal calls
        calls += 1
        assert calls <= expected, "the search goes on"
        return inner(*args)

    search._forward_PN = counted
    (hyp,), *_ = search(torch.randn(1, 5, HIDDEN))
    assert calls == expected
    assert 0 not in hyp and len(hyp) > 5
    with pytest.raises(ValueError, match="max_expansions=0 must be"):
        TransducerBeamSearcher(**network(), max_expansions=0)


def test_the_limit_of_a_frame_begins_anew_in_each_search():
    """Also where the frame is at the address of the last search's."""
    search = TransducerBeamSearcher(
        **network(blank_bias=-50), beam_size=2, max_expansions=7
    )
    enc = torch.randn(1, 1, HIDDEN)
    (first,), *_ = search(enc)
    assert first
    for lengths in (None, torch.ones(1)):
        assert search(enc, lengths)[0] == [first]
