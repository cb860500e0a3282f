"""Sums on the grid and their summaries: kernels against torch's operations."""

import pytest
import torch

from sb_memeff.ops.dispatch import DTYPES, fused_on_fake_tensors
from sb_memeff.ops.grid import add_on_grid, round_to_grid, subtract_on_grid
from sb_memeff.ops.summary import Summaries, checksum, is_dense
from sb_memeff.ops.triton.launch import watch_launches
from tests.unittests.ops.kernel import (
    DEVICE,
    force_stream_kernels,
    poison,
)

LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
}


@pytest.fixture
def launches(monkeypatch):
    """Kernels run wherever a GPU would run them; their names."""
    force_stream_kernels(monkeypatch)
    names = []
    with watch_launches(lambda name, arguments: names.append(name)):
        yield names


@pytest.fixture
def plain(monkeypatch):
    """Calls a function with the plain forms, even on a GPU."""

    def call(function, *args):
        with monkeypatch.context() as patch:
            force_stream_kernels(patch, False)
            return function(*args)

    return call


def on_grid(*shape, bits=12, scale=100.0):
    """A stream."""
    x = (scale * torch.randn(*shape) * 2.0**bits).round() * 2.0**-bits
    return x.to(DEVICE)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 9, 1000), (3, 2, 2047)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_subtracting_undoes_adding(
    monkeypatch, launches, plain, dtype, shape, layout
):
    torch.manual_seed(1)
    x = LAYOUTS[layout](on_grid(*shape))
    increment = LAYOUTS[layout](torch.randn(*shape, device=DEVICE)).to(dtype)
    expected = plain(add_on_grid, x, increment, 12)
    poison(monkeypatch)
    y = add_on_grid(x, increment, 12)
    assert torch.equal(y, expected)
    assert y.stride() == x.stride()
    again = subtract_on_grid(y, increment, 12)
    assert torch.equal(again, x) and torch.equal(y, expected)
    same = subtract_on_grid(y, increment, 12, overwrite=True)
    assert same is y and torch.equal(y, x)
    assert launches == 3 * ["_grid"]


@pytest.mark.parametrize("size", [1, 2047, 2048, 2049, 100_000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sum_leaves_the_summary_of_the_plain_form(
    launches, plain, size, dtype
):
    torch.manual_seed(size)
    x, increment = on_grid(size), torch.randn(size, device=DEVICE).to(dtype)
    for function in (add_on_grid, subtract_on_grid):
        summaries = Summaries()
        y = function(x, increment, 12, summaries)
        expected = plain(Summaries().of, y)
        assert summaries.of(y) == expected
        assert torch.equal(summaries.checksum(y), plain(checksum, y))
        # By reading it again, too.
        assert Summaries().of(y) == expected
    summaries = Summaries()
    rounded = round_to_grid(increment, 12, summaries)
    assert summaries.of(rounded) == plain(Summaries().of, rounded)
    # No kernel has left one.
    first, second = (plain(f, y) for f in (Summaries().checksum, checksum))
    assert torch.equal(first, second)
    assert launches == 2 * ["_grid", "_summarize"] + ["_grid"]


@pytest.mark.parametrize("odd", [torch.inf, -torch.inf, torch.nan])
def test_a_value_that_is_not_finite_is_the_largest(launches, plain, odd):
    x = on_grid(5000)
    increment = torch.zeros(5000, device=DEVICE, dtype=torch.float16)
    increment[4321] = odd
    summaries = Summaries()
    y = add_on_grid(x, increment, 12, summaries)
    for found in (summaries.of(y), plain(Summaries().of, y)):
        largest = found.largest_magnitude
        assert not largest.isfinite()
        assert largest.isnan() == (odd != odd)


def test_the_largest_magnitude_may_be_negative(launches, plain):
    x = on_grid(3000)
    x[2500] = -4000.5
    increment = torch.zeros(3000, device=DEVICE)
    summaries = Summaries()
    y = add_on_grid(x, increment, 12, summaries)
    for found in (summaries.of(y), plain(Summaries().of, y)):
        assert found.largest_magnitude == 4000.5


def test_a_summary_is_forgotten_with_its_tensor_or_its_values(launches):
    summaries = Summaries()
    x, increment = on_grid(100), torch.randn(100, device=DEVICE)
    y = add_on_grid(x, increment, 12, summaries)
    before = summaries.checksum(y)
    y[3] += 1
    assert summaries.checksum(y) != before
    assert len(summaries._known) == 1
    del y
    assert len(summaries._known) == 0


def test_a_summary_of_what_was_overwritten_is_that_of_the_result(launches):
    summaries = Summaries()
    x, increment = on_grid(100), torch.randn(100, device=DEVICE)
    first = summaries.of(x)
    y = add_on_grid(x, increment, 12, summaries)
    second = summaries.of(y)
    y = subtract_on_grid(y, increment, 12, summaries, overwrite=True)
    assert summaries.of(y) == first != second


def test_many_summaries_take_few_launches():
    """One for each table of them, besides the kernels'."""
    summaries = Summaries()
    rows = [summaries.new(torch.device(DEVICE)) for _ in range(600)]
    for i, (row, (largest, total)) in enumerate(rows):
        assert row.tolist() == [0, 0, 0, 0]
        row[:2] = torch.tensor([1.5, 0.0]).view(torch.int32)
        row[1] = i
        assert largest == 1.5 and total == i
    assert [int(summary.checksum) for _, summary in rows] == list(range(600))
    assert len({row.untyped_storage().data_ptr() for row, _ in rows}) == 3
    assert all(
        row.data_ptr() % 16 == rows[0][0].data_ptr() % 16 for row, _ in rows
    )


def test_other_strides_of_a_sum_take_the_plain_form(launches):
    """The kernel walks through memory."""
    x = on_grid(2, 6, 4, 5)
    increment = torch.randn(2, 6, 4, 5, device=DEVICE)
    last = LAYOUTS["channels_last"]
    for stream, given in (
        (x, last(increment)),
        (last(x), increment),
        (x[:, ::2], increment[:, ::2]),
        (x[..., 1:], increment[..., 1:]),
        (x[:1].expand(2, 6, 4, 5), increment[:1].expand(2, 6, 4, 5)),
        (x, increment.double()),
    ):
        expected = stream + (given * 2.0**12).round() * 2.0**-12
        if given.dtype == torch.float64:
            given = given.float().double()
        assert torch.equal(add_on_grid(stream, given, 12), expected)
    assert "_summarize" not in launches


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_half_of_a_tensor_is_rounded(launches, plain, dtype):
    """And is laid out as by the plain form."""
    x = torch.randn(2, 6, 4, 5, device=DEVICE).to(dtype)
    flat = x.flatten()
    for view in (
        *x.chunk(2, dim=1),
        *LAYOUTS["channels_last"](x).chunk(2, dim=1),
        x[:, ::2],
        x[..., 1:],
        x.transpose(1, 3),
        x.expand(3, 2, 6, 4, 5),
        flat[::2],
        flat[:1].expand(5),
    ):
        found, expected = (
            round_to_grid(view, 12),
            plain(round_to_grid, view, 12),
        )
        assert torch.equal(found, expected)
        assert found.stride() == expected.stride()
    assert launches


@pytest.mark.parametrize("forced", [False, True])
def test_a_sum_is_laid_out_as_the_stream(monkeypatch, forced):
    """The next function must not get the layout of the last one's result."""
    force_stream_kernels(monkeypatch, forced)
    x, increment = on_grid(2, 3, 5), torch.randn(2, 3, 5, device=DEVICE)
    for stream in (x, LAYOUTS["channels_last"](x)):
        for given in (increment, LAYOUTS["channels_last"](increment)):
            y = add_on_grid(stream, given, 12)
            assert y.stride() == stream.stride()
            again = subtract_on_grid(y, given, 12)
            assert again.stride() == stream.stride()
            assert torch.equal(again, x)
            same = subtract_on_grid(y, given, 12, overwrite=True)
            assert same is y and torch.equal(y, x)


def test_empty_streams(launches, plain):
    x = on_grid(0, 3)
    summaries = Summaries()
    y = add_on_grid(x, x.half(), 12, summaries)
    assert y.shape == round_to_grid(x, 12).shape == (0, 3)
    assert summaries.of(y) == plain(Summaries().of, y) == (0, 0)
    assert not launches


def test_dense_is_each_value_once_and_nothing_in_between():
    x = torch.rand(2, 3, 4, 5)
    last = LAYOUTS["channels_last"](x)
    for dense in (x, last, x.permute(3, 1, 0, 2), x[:1], x[0, 0, 0, 0]):
        assert is_dense(dense)
    for view in (x[:, 1:], last[:, 1:], x[..., ::2], x[:, :1].expand_as(x)):
        assert not is_dense(view)


def test_fake_tensors_are_counted_as_on_a_gpu():
    from sb_memeff.memory.fake import fake_tensors

    names = []
    launches = watch_launches(lambda name, arguments: names.append(name))
    with fake_tensors(), fused_on_fake_tensors(), launches:
        x = torch.zeros(2, 3)
        summaries = Summaries()
        y = add_on_grid(x, x.half(), 12, summaries)
        summaries.of(y)
        summaries.checksum(y)
        summaries.of(x)
    assert names == ["_grid", "_summarize"]
