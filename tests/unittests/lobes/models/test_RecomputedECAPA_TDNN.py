"""SpeechBrain's ECAPA-TDNN in less memory."""

import copy

import ecapa
import pytest
import torch
from speechbrain.lobes.models.ECAPA_TDNN import (
    ECAPA_TDNN as SpeechBrainECAPA_TDNN,
    Res2NetBlock,
    SEBlock,
)

from sb_memeff.lobes.models.RecomputedECAPA_TDNN import (
    ECAPA_TDNN,
    res2net_forward,
    squeeze_excite_forward,
)
from tests.unittests.lobes.networks import ECAPA as SMALL
from tests.unittests.nnet.reversible.chains import saved_bytes

VARIANTS = [
    {},
    {"channels": [24, 16, 16, 16, 140]},  # a shortcut convolution
    {"channels": [16, 16, 20], "kernel_sizes": [3, 5, 1], "res2net_scale": 2}
    | {"dilations": [1, 1, 1], "groups": [1, 2, 1]},
    {"global_context": False, "dropout": 0.3},
    {"activation": torch.nn.Tanh, "res2net_scale": 1},
]


def batch(dtype=torch.float64):
    torch.manual_seed(1)
    return torch.randn(4, 40, 20, dtype=dtype), torch.tensor([1, 0.8, 0.5, 0.3])


def step(net, x, lengths, autocast=None):
    """Embeddings, gradients of input and weights, and the random state."""
    torch.manual_seed(2)
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        y = net(x, lengths)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    found = [x.grad, *(p.grad for p in net.parameters())]
    return y.detach(), found, torch.get_rng_state()


def error(ours, reference):
    """||ours - reference|| / ||reference|| over all of them."""
    ours, reference = (
        torch.cat([g.flatten() for g in found]) for found in (ours, reference)
    )
    return ((ours - reference).norm() / reference.norm()).item()


@pytest.mark.parametrize("with_lengths", [True, False])
@pytest.mark.parametrize("save_memory", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_is_speechbrains_network(variant, save_memory, with_lengths):
    torch.manual_seed(0)
    options = {**SMALL, **variant}
    theirs = SpeechBrainECAPA_TDNN(**options).double()
    ours = ECAPA_TDNN(**options, save_memory=save_memory).double()
    ours.load_state_dict(theirs.state_dict())
    x, lengths = batch()
    lengths = lengths if with_lengths else None
    y_ref, reference, state_ref = step(theirs, x, lengths)
    y, found, state = step(ours, x, lengths)
    torch.testing.assert_close(y, y_ref)
    assert error(found, reference) < 1e-9
    assert torch.equal(state, state_ref)
    # Running statistics, counted once.
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value, msg=key)
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(x, lengths), theirs(x, lengths))


def test_padding_reaches_the_embedding_as_in_speechbrains():
    """Its weights were trained so; RevECAPA_TDNN cuts padding off."""
    torch.manual_seed(0)
    theirs = SpeechBrainECAPA_TDNN(**SMALL).double().eval()
    ours = ECAPA_TDNN(**SMALL).double().eval()
    ours.load_state_dict(theirs.state_dict())
    x, lengths = batch()
    alone = ours(x[2:3, :20])
    assert not torch.allclose(ours(x, lengths)[2:3], alone, rtol=1e-3)
    x[2, 20:] = float("nan")
    y = ours(x, lengths)
    assert y[2].isnan().all()
    torch.testing.assert_close(y, theirs(x, lengths), equal_nan=True)


def test_bf16_autocast():
    """Recomputed is what was computed; and what SpeechBrain computes."""
    torch.manual_seed(0)
    ours = ECAPA_TDNN(**SMALL)
    stored = copy.deepcopy(ours)
    stored.save_memory = False
    x, lengths = batch(torch.float32)
    y, found, _ = step(ours, x, lengths, torch.bfloat16)
    y_ref, reference, _ = step(stored, x, lengths, torch.bfloat16)
    assert torch.equal(y, y_ref)
    assert error(found, reference) < 1e-6
    theirs = SpeechBrainECAPA_TDNN(**SMALL)
    theirs.load_state_dict(ours.state_dict())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        ours.eval(), theirs.eval()
        cosine = torch.cosine_similarity(
            ours(x, lengths).double(), theirs(x, lengths).double(), dim=2
        )
    assert cosine.min() > 0.999


def test_memory():
    """A sixth of SpeechBrain's, less than a third of checkpointed blocks'."""
    ours = ecapa.memory_of("same_weights").activation_bytes
    assert ecapa.memory_of("stored").activation_bytes > 6 * ours
    assert ecapa.memory_of("checkpoint").activation_bytes > 3 * ours


class Chunks(torch.nn.Module):
    """A Res2NetBlock as our network runs it."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return res2net_forward(self.block, x)


def test_res2net_keeps_the_chunks_and_not_what_they_were_cut_from():
    """The first chunk goes nowhere; each other one is one of the four."""
    net = Chunks(Res2NetBlock(32, 32, scale=4))
    x = torch.randn(2, 32, 50, requires_grad=True).tanh()
    kept, _ = saved_bytes(net, x)
    assert kept <= 0.75 * x.nbytes + 100


def test_a_sum_over_frames_that_float16_cannot_hold():
    """The mean of what 1,000 frames of 100 hold is 100."""
    torch.manual_seed(0)
    block = SEBlock(8, 4, 8)
    x = torch.full((2, 8, 1000), 100.0)
    padding = torch.zeros(2, 1, 1000, dtype=torch.bool)
    padding[1, :, 900:] = True
    x = x.masked_fill(padding, 0.0)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.mul_(0.1)
        expected = squeeze_excite_forward(block, x, padding)
        found = squeeze_excite_forward(block.half(), x.half(), padding)
    assert expected.std(dim=1).max() > 1
    torch.testing.assert_close(found.float(), expected, rtol=5e-3, atol=0)


def test_errors():
    with pytest.raises(ValueError, match=r"1x1.*a kernel of 3 in 1 groups"):
        ECAPA_TDNN(**{**SMALL, "kernel_sizes": [5, 3, 3, 3, 3]})
    with pytest.raises(ValueError, match=r"1x1.*a kernel of 1 in 2 groups"):
        ECAPA_TDNN(**{**SMALL, "groups": [1, 1, 1, 1, 2]})
    with pytest.raises(ValueError, match=r"all the same.*\[16, 16, 32, 32, 4"):
        ECAPA_TDNN(**{**SMALL, "channels": [16, 16, 32, 32, 48]})
    with pytest.raises(ValueError, match=r"each of the 4 utterances.*\(1,\)"):
        ECAPA_TDNN(**SMALL)(batch(torch.float32)[0], torch.ones(1))
