"""Linear layers in half precision, against float64.

Authors
 * The sb_memeff authors 2026
"""

import pytest
import torch
from torch import nn

from sb_memeff.nnet.transducer_loss.half_linear import Float32WeightGradients


def gradients(dtype, autocast, rows=2000, wide=True, bias=True):
    """Output, and gradients of input, weight and bias, for output.sum()."""
    torch.manual_seed(0)
    layer = nn.Linear(6, 4, bias=bias)
    x, upstream = torch.randn(rows, 1, 2, 6), torch.randn(rows, 1, 2, 4)
    x, upstream = x.to(dtype), upstream.to(dtype)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(p.to(dtype))
    layer = layer if autocast else layer.to(dtype)
    x = x.float() if autocast else x
    x.requires_grad_()
    sums = {id(p): torch.zeros(p.shape) for p in layer.parameters() if wide}
    with torch.autocast("cpu", dtype, enabled=autocast):
        with Float32WeightGradients(sums):
            y = layer(x)
    y.backward(upstream.to(y.dtype))
    weights = list(sums.values()) or [p.grad for p in layer.parameters()]
    assert all(p.grad is None for p in layer.parameters()) or not wide
    exact = [
        torch.einsum("atui,atuj->ij", upstream.double(), x.detach().double()),
        upstream.double().sum((0, 1, 2)),
    ]
    return layer, y, x, upstream, weights, exact


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weight_gradients_are_float32(dtype, autocast):
    *_, weights, exact = gradients(dtype, autocast)
    for found, expected in zip(weights, exact, strict=True):
        assert found.dtype == torch.float32
        error = (found - expected).norm() / expected.norm()
        assert error < 1e-5


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_values_and_gradients_of_inputs_are_those_of_torch(dtype, autocast):
    layer, y, x, upstream, *_ = gradients(dtype, autocast)
    twin = x.detach().requires_grad_()
    with torch.autocast("cpu", dtype, enabled=autocast):
        expected = layer(twin)
    assert torch.equal(y, expected) and y.dtype == expected.dtype
    expected.backward(upstream.to(expected.dtype))
    assert torch.equal(x.grad, twin.grad)


def test_other_weights_get_their_gradients():
    """Those that are no leaves: of weight norm, for one."""
    *_, weights, exact = gradients(torch.bfloat16, False, wide=False)
    for found, expected in zip(weights, exact, strict=True):
        assert found.dtype == torch.bfloat16
        assert (found - expected).norm() < 0.01 * expected.norm()


def test_sums_go_on():
    layer = nn.Linear(3, 2, bias=False).half()
    total = torch.ones(2, 3)
    mode = Float32WeightGradients({id(layer.weight): total})
    for factor in (None, torch.tensor(0.25)):
        with mode:
            y = layer(torch.ones(4, 3).half())
        mode.factor = factor
        y.sum().backward()
    assert torch.equal(total, torch.full((2, 3), 1.0 + 4 + 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_layers_are_left_alone(dtype):
    layer = nn.Linear(3, 2).to(dtype)
    total = torch.zeros(2, 3)
    x = torch.ones(4, 3, dtype=dtype)
    with Float32WeightGradients({id(layer.weight): total}):
        y = layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            # Autocast does not touch float64.
            z = layer(x)
    assert torch.equal(y, layer(x))
    assert z.dtype == (dtype if dtype == torch.float64 else torch.bfloat16)
    y.sum().backward()
    assert layer.weight.grad is not None and not total.any()


def test_errors_are_those_of_torch():
    refused = pytest.raises(RuntimeError, match="same dtype")
    with Float32WeightGradients({}), refused:
        nn.Linear(3, 2)(torch.ones(4, 3).half())
