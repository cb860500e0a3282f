"""Statistics pooling."""

import torch

from sb_memeff.nnet.pooling import TemporalStatisticsPooling


def test_mean_and_standard_deviation():
    x = torch.randn(2, 3, 7, 4, dtype=torch.float64)
    y = TemporalStatisticsPooling(eps=0.0)(x)
    mean, std = x.mean(dim=2), x.std(dim=2, correction=0)
    expected = torch.cat((mean.flatten(1), std.flatten(1)), 1)
    torch.testing.assert_close(y, expected)


def test_padded_frames_do_not_count():
    x = torch.randn(1, 3, 5, 4)
    padded = torch.cat((x, torch.full((1, 3, 2, 4), 9.0)), dim=2)
    padding = torch.tensor([0, 0, 0, 0, 0, 1, 1]).bool().view(1, 1, 7, 1)
    pooling = TemporalStatisticsPooling()
    torch.testing.assert_close(pooling(padded, padding), pooling(x))


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
