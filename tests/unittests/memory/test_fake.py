"""Fake tensors with known small values."""

import logging

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from sb_memeff.memory.fake import fake_tensors, without_data


def test_values_computed_from_lengths_are_known():
    with fake_tensors():
        lengths = torch.tensor([0.5, 1.0])
        frames = (lengths * 10).round().long()
        mask = torch.arange(frames.max().item()) < frames[:, None]
        assert isinstance(mask, FakeTensor)
        assert mask.sum(1).tolist() == [5, 10]
        assert mask.nonzero().shape == (15, 2)
        assert frames.unbind()[0].item() == 5


def test_views_and_in_place_changes_keep_values():
    with fake_tensors():
        x = torch.zeros(2, 3, dtype=torch.long)
        x[1].add_(2)
        x.t()[0].fill_(7)
        assert x.tolist() == [[7, 0, 0], [7, 2, 2]]


def test_a_value_from_weights_is_not_known():
    with fake_tensors():
        y = nn.Linear(100, 100)(torch.rand(2, 100))
        with pytest.raises(ValueError, match="_local_scalar_dense.* needs"):
            y.sum().item()
        with pytest.raises(ValueError, match="nonzero.* needs"):
            (y > 0).nonzero()


def test_overwriting_with_unknown_values_makes_values_unknown():
    with fake_tensors():
        weight = torch.rand(1000, 1000)
        x = torch.zeros(4)
        view = x[1:]
        x[0] = weight.sum()
        for part in (x, view, x[2:]):
            with pytest.raises(ValueError, match="cannot be analysed"):
                part.tolist()


def test_an_lstm_of_known_values_in_half_precision():
    """A CPU cannot run it."""
    with fake_tensors(), torch.autocast("cpu", torch.float16):
        net = nn.LSTM(2, 2)
        for p in net.parameters():
            nn.init.zeros_(p)
        assert net(torch.ones(3, 1, 2))[0].dtype == torch.float16


def test_known_masks_choose_rows_of_unknown_tensors():
    with fake_tensors():
        x = torch.rand(1000, 8, 2)
        rows = torch.arange(8)
        assert x[:, rows < 3].shape == (1000, 3, 2)


def test_large_tensors_take_no_memory():
    with fake_tensors():
        # 4 PB.
        x = torch.zeros(10**9, 10**6)
        mask = torch.ones(10**15, dtype=torch.bool)
        assert (x + 1).shape == x.shape
        with pytest.raises(ValueError, match="cannot be analysed"):
            mask.sum().item()


def ctc(log_probs):
    """The loss of two samples, of 3 and of 2 targets."""
    return torch.nn.functional.ctc_loss(
        log_probs.log_softmax(-1),
        torch.tensor([[1, 2, 3], [4, 5, 0]]),
        torch.tensor([9, 5]),
        torch.tensor([3, 2]),
    )


def lstm(x):
    """A layer with its own weights."""
    return nn.LSTM(x.shape[-1], 96)(x)[0]


@pytest.mark.parametrize(
    ("function", "shape", "tolerance"),
    [
        # Lengths are a list there, a tensor here.
        (ctc, (9, 2, 30), 0.01),
        (lstm, (40, 4, 20), 0.03),
        (lstm, (10, 8, 500), 0.03),
    ],
)
def test_operators_that_fake_tensor_mode_does_not_support(
    function, shape, tolerance
):
    def saved():
        total = 0

        def pack(tensor):
            nonlocal total
            total += tensor.nbytes
            return tensor

        x = torch.rand(shape).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = function(x)
        y.sum().backward()
        return y.shape, x.grad.shape, total

    with fake_tensors():
        found = saved()
    *shapes, size = saved()
    assert list(found[:2]) == shapes
    assert found[2] == pytest.approx(size, rel=tolerance)


def test_random_numbers_are_not_used_up():
    before = torch.get_rng_state()
    with fake_tensors():
        torch.rand(3)
        nn.Linear(3, 3)
    assert torch.equal(before, torch.get_rng_state())


def test_real_tensors_stay_usable():
    before = torch.tensor([1, 2])
    with fake_tensors():
        assert torch.equal(before, before.clone())
        assert torch.equal(torch.get_rng_state(), torch.get_rng_state())


def test_a_copy_without_data():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    net[0].bias.requires_grad_(False)
    with FakeTensorMode():
        copied = without_data(net)
    for (name, x), y in zip(
        net.named_parameters(), copied.parameters(), strict=True
    ):
        assert isinstance(y, FakeTensor), name
        assert (x.shape, x.requires_grad) == (y.shape, y.requires_grad)
    assert not isinstance(net[0].weight, FakeTensor)


class Layouts(nn.Module):
    """Parameters and buffers of many strides."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        self.register_buffer("transposed", torch.ones(3, 5).t())
        self.register_buffer("expanded", torch.ones(3, 1).expand(3, 5))
        self.register_buffer("sliced", torch.ones(6, 5)[::2])
        self.half_size = nn.Parameter(torch.ones(3).bfloat16(), False)


@pytest.mark.parametrize("mode", [FakeTensorMode, fake_tensors])
def test_a_copy_without_data_has_the_layouts(mode):
    net = Layouts()
    with mode():
        copied = without_data(net)
        x = torch.ones(2, 3, 8, 8).to(memory_format=torch.channels_last)
        y = copied.conv(x)
    found = copied.state_dict(keep_vars=True)
    for name, x in net.state_dict(keep_vars=True).items():
        copy = found[name]
        assert isinstance(copy, FakeTensor), name
        assert (x.stride(), x.dtype) == (copy.stride(), copy.dtype), name
    # And so the activations are laid out.
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert not y.is_contiguous()


def test_a_copy_without_data_shares_what_is_cached():
    class Net(nn.Linear):
        def __init__(self):
            super().__init__(3, 3)
            self.memo = {"lengths": (1, [torch.tensor([1, 3])])}
            self.positions = torch.arange(3.0)
            self.hidden = [nn.Parameter(torch.ones(3))]
            self.scale = torch.ones(3, requires_grad=True)

    net = Net()
    with fake_tensors():
        copied = without_data(net)
        lengths = copied.memo["lengths"][1][0]
        assert (lengths + torch.ones(2).long()).tolist() == [2, 4]
        assert copied.hidden[0].requires_grad
        assert copied.scale.requires_grad and copied.scale is not net.scale
        y = copied(copied.hidden[0] * copied.positions)
        y.sum().backward()
        lengths += 1
        copied.positions.zero_()
    assert copied.hidden[0].grad.shape == (3,)
    assert net.memo["lengths"][1][0].tolist() == [1, 3]
    assert net.positions.tolist() == [0, 1, 2]
    assert net.hidden[0].grad is None and net.weight.grad is None


# --- tensors that were there before ------------------------------------------


def test_real_tensors_meet_fake_ones():
    scale = torch.arange(3.0)
    with fake_tensors():
        y = torch.ones(1000, 1000, 3) * scale
        assert isinstance(y, FakeTensor) and y.shape == (1000, 1000, 3)
        assert (torch.ones(3) + scale[1:].sum()).tolist() == [4, 4, 4]


def test_real_tensors_get_their_values_back():
    count, view = torch.zeros(3), torch.arange(6.0)
    large, spoilt = torch.zeros(10_000), torch.ones(3)
    with pytest.raises(ArithmeticError), fake_tensors():
        count += 1
        view[2:4].mul_(torch.full((2,), 10.0))
        torch.add(torch.ones(3), 1, out=view[:3])
        large.add_(1)
        spoilt.add_(torch.rand(1000, 1000).sum())
        # Meanwhile they have those that were written.
        assert count.tolist() == [1, 1, 1]
        assert (view + torch.zeros(6)).tolist() == [2, 2, 2, 30, 4, 5]
        assert view[2:].sum().item() == 41
        assert large.sum().item() == 10_000
        with pytest.raises(ValueError, match="cannot be analysed"):
            spoilt[1:].sum().item()
        raise ArithmeticError
    assert count.tolist() == [0, 0, 0]
    assert view.tolist() == [0, 1, 2, 3, 4, 5]
    assert not large.any()
    assert spoilt.tolist() == [1, 1, 1]


def test_real_tensors_without_gradients_only():
    weight = torch.ones(3, requires_grad=True)
    with fake_tensors():
        with torch.no_grad():
            assert (weight * torch.ones(3)).shape == (3,)
        with pytest.raises(ValueError, match=r"\[3\] that existed before"):
            weight * torch.ones(3)
    assert weight.grad is None


def test_fake_tensors_of_another_analysis():
    with fake_tensors():
        x = torch.ones(3)
    with fake_tensors(), pytest.raises(ValueError, match="another analysis"):
        x + 1


def test_modules_that_are_imported_meanwhile_are_real(tmp_path, monkeypatch):
    (tmp_path / "imports_the_other.py").write_text(
        "from imported_by_the_other import ONE\n"
        "import torch\nTWO = ONE + torch.ones(1)\n"
    )
    (tmp_path / "imported_by_the_other.py").write_text(
        "import torch\nONE = torch.ones(1)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with fake_tensors():
        import imports_the_other as found

        assert isinstance(torch.ones(1), FakeTensor)
    assert type(found.TWO) is torch.Tensor and found.TWO.item() == 2
    assert type(found.ONE) is torch.Tensor
    # As if nothing had been done to it.
    loader = found.__spec__.loader
    assert loader is found.__loader__
    assert type(loader).__name__ == "SourceFileLoader"


def test_errors_are_raised_and_not_logged_too():
    log = logging.getLogger("torch._subclasses.fake_tensor")
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    log.addHandler(handler)
    try:
        with pytest.raises(RuntimeError, match="overflow"), fake_tensors():
            torch.empty(2**31, 1) * torch.empty(1, 2**31)
        assert not records
        assert not log.disabled
        # What is not ours logs as before.
        with pytest.raises(RuntimeError, match="overflow"), FakeTensorMode():
            torch.empty(2**31, 1) * torch.empty(1, 2**31)
        assert records
    finally:
        log.removeHandler(handler)
