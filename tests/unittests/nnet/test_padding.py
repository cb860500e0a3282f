"""Which frames are padding."""

import pytest
import torch

from sb_memeff.nnet.padding import padding_masks


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


def test_without_lengths_there_is_nothing_to_mask():
    assert padding_masks(None, torch.zeros(2, 9, 4), [1]) is None


def test_one_length_for_each_utterance():
    with pytest.raises(ValueError, match=r"each of the 3 .*\(2,\)"):
        padding_masks(torch.ones(2), torch.zeros(3, 9, 4), [1])
