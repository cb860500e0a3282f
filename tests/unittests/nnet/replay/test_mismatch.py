"""Noticing differences, and when the host reads them."""

import pytest
import torch

from sb_memeff.nnet.replay import mismatch
from sb_memeff.nnet.replay.mismatch import Summary
from sb_memeff.ops.summary import checksum


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
def slow_device():
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
        torch.complex128,
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


@pytest.mark.parametrize("bit", [0, 31, 32, 63])
def test_each_bit_of_a_double_counts(bit):
    x = torch.rand(9, dtype=torch.float64)
    changed = x.clone()
    changed.view(torch.int64)[4] ^= 1 << bit if bit < 63 else -(1 << 63)
    assert not torch.equal(checksum(x), checksum(changed))


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_difference_in_any_of_several_tensors(place):
    tensors = [torch.ones(4), torch.ones(2, 3), torch.ones(5)]
    before = Summary(tensors)
    assert not before.differs(before.summarize(tensors))
    tensors[place] = tensors[place] + 1
    assert before.differs(before.summarize(tensors))


def test_more_or_fewer_tensors_are_a_difference():
    x = torch.ones(3)
    for first, second in (([x, x], [x]), ([x], [x, x])):
        before = Summary(first)
        assert before.differs(before.summarize(second))
    assert not Summary([]).differs(Summary([]))


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize(
    "dtype, relative",
    [
        (torch.bfloat16, 2**-7),
        (torch.float16, 2**-10),
        (torch.float32, 2**-22),
        (torch.float64, 2**-50),
        (torch.complex64, 2**-22),
        (torch.complex128, 2**-50),
    ],
)
def test_the_size_of_a_difference(dtype, relative, place):
    """Down to the last bits, and of whatever tensor is off most."""
    tensors = [torch.ones(300, dtype=dtype), 2 * torch.ones(7, dtype=dtype)]
    before = Summary(tensors, sampled=True)
    # The values of forward count, also where they are changed later.
    tensors[place] *= 1 + relative
    now = before.summarize(tensors)
    assert before.relative_error(now).item() == pytest.approx(relative)
    size = before.size_of_difference(now)
    assert size.startswith(f" by {relative:.2g} of")


def test_the_size_is_relative_to_the_value_of_forward():
    before = Summary([torch.ones(3)], sampled=True)
    assert before.relative_error(before.summarize([4 * torch.ones(3)])) == 3.0


@pytest.mark.parametrize("action, sampled", [("error", False), ("warn", True)])
def test_values_are_kept_if_a_difference_is_to_be_described(
    monkeypatch, action, sampled
):
    """As the action was in forward, whatever it is in backward."""
    monkeypatch.setattr(mismatch._pending, "action", action)
    x = torch.ones(3)
    before = Summary([x])
    other = "error" if action == "warn" else "warn"
    monkeypatch.setattr(mismatch._pending, "action", other)
    now = before.summarize([2 * x])
    assert bool(before.samples) == bool(now.samples) == sampled
    described = " by 1 of the largest value (in a sample)" if sampled else ""
    assert before.size_of_difference(now) == described


def test_a_difference_is_an_error_at_once_on_the_cpu():
    with pytest.raises(RuntimeError, match="^block 2$"):
        mismatch.report_mismatches(
            torch.tensor([False, False, True]), "block {}".format
        )


def test_a_device_is_read_when_it_is_ready(slow_device):
    pending, events = slow_device
    pending.report(torch.tensor([True]), "block {}".format)
    pending.next_forward()
    events[0].done = True
    with pytest.raises(RuntimeError, match="block 0"):
        pending.next_forward()
    assert events[0].waits == 0


def test_finished_copies_are_read_at_the_next_forward(slow_device):
    _, events = slow_device
    events.append(Event())
    events[0].done = True
    pending = mismatch._Pending(lambda differs: (differs, events[0]))
    pending.report(torch.tensor([True]), "block {}".format)
    with pytest.raises(RuntimeError, match="block 0"):
        pending.next_forward()


def test_a_device_is_read_in_the_next_backward_at_the_latest(slow_device):
    pending, events = slow_device
    pending.report(torch.tensor([False]), "block {}".format)
    pending.report(torch.tensor([True]), "block {}".format)
    assert events == []
    pending.next_forward()
    pending.next_forward()
    with pytest.raises(RuntimeError, match="block 0"):
        pending.report(torch.tensor([False]), "other {}".format)


def test_a_step_without_a_difference_never_waits_within_itself(slow_device):
    pending, events = slow_device
    for step in range(3):
        pending.next_forward()
        for _ in range(4):
            pending.report(torch.tensor([False]), str)
        # One copy of each step before, which backward has waited for.
        assert [e.waits for e in events] == [1] * step


def test_reading_waits_for_all(slow_device):
    pending, events = slow_device
    pending.report(torch.tensor([True]), "block {}".format)
    with pytest.raises(RuntimeError, match="block 0"):
        pending.read()
    assert events[0].waits == 1
    pending.read()


def test_an_error_is_raised_once(slow_device):
    """After the error is caught, that step raises no further errors."""
    pending, _ = slow_device
    pending.report(torch.tensor([True]), "first {}".format)
    pending.next_forward()
    with pytest.raises(RuntimeError, match="first 0"):
        pending.report(torch.tensor([True]), "second {}".format)
    pending.next_forward()
    pending.read()


def test_warnings_are_logged_once(slow_device, caplog):
    pending, _ = slow_device
    pending.action = "warn"
    for _ in range(2):
        pending.report(torch.tensor([True]), "block {} differs".format)
        pending.read()
    assert caplog.text.count("block 0 differs") == 1


def test_an_unknown_action_is_refused_without_effect(monkeypatch):
    monkeypatch.setattr(mismatch._pending, "action", "warn")
    with pytest.raises(ValueError, match="'ignore'"):
        mismatch.set_mismatch_action("ignore")
    assert mismatch.mismatch_action() == "warn"


def test_the_message_is_that_of_the_comparison(slow_device):
    pending, _ = slow_device
    pending.report(torch.tensor([False, False]), "first {}".format)
    pending.report(torch.tensor([False, True]), "second {}".format)
    with pytest.raises(RuntimeError, match="^second 1$"):
        pending.read()


def test_all_differences_of_one_report_are_logged(slow_device, caplog):
    pending, _ = slow_device
    pending.action = "warn"
    pending.report(torch.tensor([True, False, True]), "block {}".format)
    pending.read()
    assert "block 0" in caplog.text and "block 2" in caplog.text


def test_comparisons_of_several_devices(slow_device):
    """Each device sends its own, in one copy."""
    copied = []

    def copy(tensor):
        copied.append(tensor.device.type)
        host = torch.ones(tensor.shape, dtype=torch.bool)
        return (host if tensor.is_meta else tensor), Event()

    pending = mismatch._Pending(copy)
    on_meta = torch.tensor([False], device="meta")
    for differs in (torch.tensor([False]), on_meta, torch.tensor([False])):
        pending.report(differs, f"{differs.device} {{}}".format)
    with pytest.raises(RuntimeError, match="^meta 0$"):
        pending.read()
    assert copied == ["cpu", "meta"]


@pytest.mark.parametrize("sent", [False, True])
def test_an_error_drops_what_else_was_waiting(slow_device, sent):
    """Reports of the same step, and copies of other steps."""
    pending, events = slow_device
    pending.report(torch.tensor([True]), "first {}".format)
    pending.next_forward()
    events[0].done = True
    pending._reports.append(
        mismatch._Report(torch.tensor([True]), "second {}".format)
    )
    if sent:
        pending._send()
    with pytest.raises(RuntimeError, match="first 0"):
        pending.read_arrived()
    pending.next_forward()
    pending.read()
