"""The promises of every kernel; a new one is a line in ``kernels.py``.

Authors
 * The sb_memeff authors 2026
"""

import contextlib
import itertools

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from sb_memeff.ops import dispatch
from tests.unittests.ops.kernel import error, poison
from tests.unittests.ops.kernels import KERNELS

CASES = [
    pytest.param(*case, id="-".join(map(str, [name, *case[1:]])))
    for name, kernel in KERNELS.items()
    for case in itertools.product(
        [kernel], kernel.shapes, kernel.bounds, kernel.settings
    )
]


def assert_near(found, exact, bound):
    """The same where it is not finite, and within a bound elsewhere."""
    assert found.shape == exact.shape
    found, exact = found.double(), exact.double()
    finite = exact.isfinite()
    torch.testing.assert_close(
        found[~finite], exact[~finite], rtol=0, atol=0, equal_nan=True
    )
    found, exact = found[finite], exact[finite]
    assert error(found, exact) <= bound
    if not bound:
        # -0 is another number.
        assert torch.equal(found.signbit(), exact.signbit())


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's
@pytest.mark.parametrize("kernel, shape, dtype, settings", CASES)
def test_as_the_plain_form_in_float64(
    monkeypatch, kernel, shape, dtype, settings
):
    """Nothing is left unwritten, and no input is changed."""
    inputs = kernel.draw(shape, dtype)
    before = tree_map(torch.clone, inputs)
    wide = tree_map(
        lambda x: x.double() if x.is_floating_point() else x, inputs
    )
    exact = kernel.plain(*wide, **settings)
    poison(monkeypatch)
    found = kernel.fused(*inputs, **settings)
    plain = kernel.plain(*inputs, **settings)
    for a, b, c in zip(found, exact, plain, strict=True):
        assert a.dtype == c.dtype
        assert_near(a, b, kernel.bounds[dtype])
    for x, y in zip(tree_leaves(inputs), tree_leaves(before), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


class Launched(Exception):
    pass


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_the_switch(monkeypatch, kernel):
    """The environment variable chooses between kernel and plain form."""
    inputs = kernel.draw(kernel.shapes[-1], [*kernel.bounds][0])
    call = kernel.dispatched or kernel.plain

    def launch(*args, **kwargs):
        raise Launched

    for function in (InterpretedFunction, JITFunction):
        monkeypatch.setattr(function, "run", launch)
    # Tensors say that they are on a GPU.
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.delenv(dispatch.SWITCH, raising=False)
    with pytest.raises(Launched):
        call(*inputs, **kernel.settings[-1])
    monkeypatch.setenv(dispatch.SWITCH, "0")
    call(*inputs, **kernel.settings[-1])
