"""Statistics pooling."""

import math

import pytest
import torch

from sb_memeff.nnet.statistics_pooling import TemporalStatisticsPooling


def test_mean_and_standard_deviation():
    x = torch.randn(2, 3, 7, 4, dtype=torch.float64)
    y = TemporalStatisticsPooling(eps=0.0)(x)
    mean, std = x.mean(dim=2), x.std(dim=2, correction=0)
    expected = torch.cat((mean.flatten(1), std.flatten(1)), 1)
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("length", [None, 5])
def test_the_usual_eps_costs_no_digit_of_float32(length):
    x = torch.randn(2, 3, 7, 4, dtype=torch.float64)
    padding = None
    if length is not None:
        padding = (
            (torch.arange(7) >= length).view(1, 1, 7, 1).expand(2, 1, 7, 1)
        )
    std = TemporalStatisticsPooling()(x.clone(), padding)[:, 12:]
    expected = x[:, :, :length].std(dim=2, correction=0).flatten(1)
    torch.testing.assert_close(std, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("filling", [9.0, math.nan, math.inf])
def test_padded_frames_do_not_count(filling):
    x = torch.randn(1, 3, 5, 4)
    padded = torch.cat((x, torch.full((1, 3, 2, 4), filling)), dim=2)
    padded.requires_grad_()
    padding = torch.tensor([0, 0, 0, 0, 0, 1, 1]).bool().view(1, 1, 7, 1)
    pooling = TemporalStatisticsPooling()
    y = pooling(padded, padding)
    torch.testing.assert_close(y, pooling(x))
    (y * torch.linspace(-1, 1, y.numel())).sum().backward()
    assert padded.grad.isfinite().all() and not padded.grad[:, :, 5:].any()


def test_gradients_with_padding_are_those_without():
    x = torch.randn(2, 3, 7, 4, dtype=torch.float64, requires_grad=True)
    padding = (torch.arange(7) >= torch.tensor([[7], [4]]))[:, None, :, None]
    pooling = TemporalStatisticsPooling()
    torch.autograd.gradcheck(pooling, (x, padding))
    weight = torch.randn(24, dtype=torch.float64)
    (padded,) = torch.autograd.grad(pooling(x, padding)[1] @ weight, x)
    (alone,) = torch.autograd.grad(pooling(x[1:, :, :4])[0] @ weight, x)
    torch.testing.assert_close(padded, alone)


def test_frames_that_count_may_be_nan():
    x = torch.randn(1, 1, 5, 1)
    x[:, :, 2] = math.nan
    padding = (torch.arange(5) >= 4).view(1, 1, 5, 1)
    assert TemporalStatisticsPooling()(x, padding).isnan().all()


def test_constant_channels_have_a_finite_gradient():
    x = torch.ones(1, 1, 5, 1, requires_grad=True)
    TemporalStatisticsPooling()(x).sum().backward()
    assert torch.isfinite(x.grad).all()


def test_half_precision_is_summed_in_float32():
    x = (torch.randn(1, 1, 4000, 1) + 100).bfloat16()
    y = TemporalStatisticsPooling()(x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(
        y[0, 0], x.double().mean().float(), rtol=1e-6, atol=0
    )
