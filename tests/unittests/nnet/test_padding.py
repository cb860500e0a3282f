"""Which frames are padding."""

import math

import pytest
import torch

from sb_memeff.memory.fake import fake_tensors
from sb_memeff.nnet.padding import check_lengths, mask, padding_masks
from sb_memeff.nnet.replay import mismatch


def test_frames_shrink_as_in_a_strided_convolution():
    lengths = torch.tensor([1.0, 5 / 9, 1 / 9])
    masks = padding_masks(lengths, torch.zeros(3, 9, 80), [1, 2, 2])
    kept = [(~m).sum(dim=2).flatten().tolist() for m in masks]
    assert [m.shape for m in masks] == [(3, 1, n, 1) for n in (9, 5, 3)]
    assert kept == [[9, 5, 1], [5, 3, 1], [3, 2, 1]]
    conv = torch.nn.Conv1d(1, 1, 3, stride=2, padding=1)
    assert conv(torch.zeros(1, 1, 5)).shape[2] == 3


def test_no_utterance_is_empty():
    masks = padding_masks(torch.tensor([1.0, 0.01]), torch.zeros(2, 9, 4), [1])
    assert (~masks[0]).sum(dim=2).flatten().tolist() == [9, 1]


def test_without_lengths_there_is_no_mask():
    assert padding_masks(None, torch.zeros(2, 9, 4), [1]) is None


def test_one_length_for_each_utterance():
    with pytest.raises(ValueError, match=r"each of the 3 .*\(2,\)"):
        padding_masks(torch.ones(2), torch.zeros(3, 9, 4), [1])


@pytest.mark.parametrize(
    "dtype, sizes",
    [
        # At 135 and 1027 a product in half precision is off by a frame.
        (torch.bfloat16, (1, 7, 135, 255)),
        (torch.float16, (1, 7, 255, 1027, 2047)),
        (torch.float32, (1, 7, 255, 2047)),
        (torch.float64, (1, 7, 255, 2047)),
    ],
)
def test_each_number_of_frames_in_each_dtype(dtype, sizes):
    for size in sizes:
        frames = torch.arange(1, size + 1)
        masks = padding_masks(
            (frames.double() / size).to(dtype), torch.zeros(size, size), [1]
        )
        assert torch.equal((~masks[0]).sum(dim=2).flatten(), frames)


@pytest.mark.parametrize(
    "dtype, most", [(torch.bfloat16, 255), (torch.float16, 2047)]
)
def test_dtypes_that_cannot_tell_frames_apart_are_refused(dtype, most):
    lengths = torch.tensor([1.0, 0.7], dtype=dtype)
    check_lengths(lengths, torch.zeros(2, most))
    with pytest.raises(TypeError, match=rf"{dtype} cannot .* {most + 1} fr"):
        check_lengths(lengths, torch.zeros(2, most + 1))


@pytest.mark.parametrize(
    "value", [0.0, -0.5, 1.2, 13, math.nan, math.inf, -math.inf]
)
def test_lengths_are_relative(value):
    lengths = torch.tensor([1.0, value])
    with pytest.raises(ValueError, match=r"relative, in \(0, 1\]; got"):
        check_lengths(lengths, torch.zeros(2, 9, 4))
    if value == int(value if math.isfinite(value) else 0.5):
        with pytest.raises(ValueError, match=r"relative, in \(0, 1\]; got"):
            check_lengths(lengths.long(), torch.zeros(2, 9, 4))


def test_rounding_above_one_is_no_fault():
    lengths = torch.tensor([1.0]).nextafter(torch.tensor(2.0))
    masks = padding_masks(lengths, torch.zeros(1, 200, 4), [1])
    assert not masks[0].any()


class _OnAnotherDevice(torch.Tensor):
    """A CPU tensor that claims to be on an accelerator."""

    @property
    def device(self):
        return torch.device("cuda")


def test_on_an_accelerator_the_host_does_not_wait(monkeypatch):
    """The outcome is read later, with those of other comparisons."""
    pending = mismatch._Pending(lambda differs: (differs, _Event()))
    monkeypatch.setattr(mismatch, "_pending", pending)
    lengths = torch.tensor([1.0, 7.0]).as_subclass(_OnAnotherDevice)
    check_lengths(lengths, torch.zeros(2, 9, 4))
    with pytest.raises(RuntimeError, match="that of utterance 1 was not"):
        mismatch.read_mismatches()
    check_lengths(
        torch.ones(2).as_subclass(_OnAnotherDevice), torch.zeros(2, 9, 4)
    )
    mismatch.read_mismatches()


class _Event:
    def query(self):
        return False

    def synchronize(self):
        pass


def test_checks_end_with_the_next_forward_pass(monkeypatch):
    """Without a backward pass too: nothing piles up."""
    event = _Event()
    pending = mismatch._Pending(lambda differs: (differs, event))
    monkeypatch.setattr(mismatch, "_pending", pending)
    lengths = torch.ones(2).as_subclass(_OnAnotherDevice)
    for _ in range(5):
        check_lengths(lengths, torch.zeros(2, 9, 4))
        assert len(pending._reports) + len(pending._copies) <= 2


def test_fake_lengths_are_not_looked_at():
    with fake_tensors():
        lengths, x = torch.rand(5000), torch.zeros(5000, 9, 4)
        assert padding_masks(lengths, x, [1])[0].shape == (5000, 1, 9, 1)


def test_a_compiler_does_not_read_lengths():
    lengths, x = torch.tensor([1.0, 0.6]), torch.zeros(2, 9, 4)
    compiled = torch.compile(padding_masks, fullgraph=True, backend="eager")
    found, expected = (f(lengths, x, [1, 2]) for f in (compiled, padding_masks))
    assert all(map(torch.equal, found, expected))


def test_masks_in_place():
    x = torch.tensor([[1.0, math.nan, math.inf]])
    padding = torch.tensor([[False, True, True]])
    assert mask(x, None) is x and mask(x, padding) is x
    assert x.tolist() == [[1.0, 0.0, 0.0]]
