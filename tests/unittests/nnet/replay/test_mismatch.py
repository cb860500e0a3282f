"""Noticing differences, and when the host reads them."""

import pytest
import torch

from sb_memeff.nnet.replay import mismatch
from sb_memeff.nnet.replay.mismatch import checksum


class Event:
    """Of a device whose progress the test decides."""

    def __init__(self):
        self.done = False
        self.waits = 0

    def query(self):
        """Whether the copy has arrived."""
        return self.done

    def synchronize(self):
        """Counts the waits that would have taken time."""
        self.waits += not self.done


@pytest.fixture
def device():
    """Pending comparisons of a slow device, and its events."""
    events = []

    def copy(tensor):
        events.append(Event())
        return tensor, events[-1]

    return mismatch._Pending(copy), events


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
        torch.complex64,
        torch.int8,
        torch.int64,
        torch.bool,
    ],
)
def test_one_bit_changes_the_checksum_and_the_layout_does_not(dtype):
    x = (torch.rand(4, 5, 6) * 10).to(dtype)
    assert torch.equal(checksum(x), checksum(x.permute(2, 0, 1)))
    assert torch.equal(checksum(x[:, ::2]), checksum(x[:, ::2].clone()))
    changed = x.clone()
    flat = changed.flatten()
    flat[7] = ~flat[7] if dtype == torch.bool else flat[7] * 2 + 1
    assert not torch.equal(checksum(x), checksum(flat))


def test_a_difference_is_an_error_at_once_on_the_cpu():
    with pytest.raises(RuntimeError, match="^block 2$"):
        mismatch.report_mismatches(
            torch.tensor([False, False, True]), "block {}".format
        )


def test_a_device_is_read_when_it_is_ready(device):
    pending, events = device
    pending.report(torch.tensor([True]), "block {}".format)
    pending.next_forward()
    events[0].done = True
    with pytest.raises(RuntimeError, match="block 0"):
        pending.next_forward()
    assert events[0].waits == 0


def test_a_device_is_read_in_the_next_backward_at_the_latest(device):
    pending, events = device
    pending.report(torch.tensor([False]), "block {}".format)
    pending.report(torch.tensor([True]), "block {}".format)
    assert events == []
    pending.next_forward()
    pending.next_forward()
    with pytest.raises(RuntimeError, match="block 0"):
        pending.report(torch.tensor([False]), "other {}".format)


def test_a_step_without_a_difference_never_waits_within_itself(device):
    pending, events = device
    for step in range(3):
        pending.next_forward()
        for _ in range(4):
            pending.report(torch.tensor([False]), str)
        # One copy of each step before, which backward has waited for.
        assert [e.waits for e in events] == [1] * step


def test_reading_waits_for_all(device):
    pending, events = device
    pending.report(torch.tensor([True]), "block {}".format)
    with pytest.raises(RuntimeError, match="block 0"):
        pending.read()
    assert events[0].waits == 1
    pending.read()


def test_an_error_is_raised_once(device):
    """Whoever catches it and goes on hears no more of that step."""
    pending, _ = device
    pending.report(torch.tensor([True]), "first {}".format)
    pending.next_forward()
    with pytest.raises(RuntimeError, match="first 0"):
        pending.report(torch.tensor([True]), "second {}".format)
    pending.next_forward()
    pending.read()


def test_warnings_are_logged_once(device, caplog):
    pending, _ = device
    pending.action = "warn"
    for _ in range(2):
        pending.report(torch.tensor([True]), "block {} differs".format)
        pending.read()
    assert caplog.text.count("block 0 differs") == 1


def test_an_unknown_action_is_refused():
    with pytest.raises(ValueError, match="'ignore'"):
        mismatch.set_mismatch_action("ignore")


def test_the_message_is_that_of_the_comparison(device):
    pending, _ = device
    pending.report(torch.tensor([False, False]), "first {}".format)
    pending.report(torch.tensor([False, True]), "second {}".format)
    with pytest.raises(RuntimeError, match="^second 1$"):
        pending.read()
