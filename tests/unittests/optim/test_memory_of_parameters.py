"""Parameters and gradients whose memory is not what it seems.

Authors
 * The sb_memeff authors 2026
"""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.nn import Parameter

from sb_memeff.optim import Adam8bit, AdamW8bit, SGD8bit

STEPS = 3
SGD = {"lr": 1.0, "momentum": 0.5}


@pytest.fixture(params=["1", "off"], ids=["kernels", "plain"])
def form(request, monkeypatch):
    monkeypatch.setenv("SB_MEMEFF_KERNELS", request.param)


@pytest.fixture
def two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def trained(optimizer, params):
    for _ in range(STEPS):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", [SGD8bit, Adam8bit, AdamW8bit])
def test_the_default_dtype_changes_nothing(form, kind, dtype):
    found = []
    for default in (torch.float32, dtype):
        p = Parameter(torch.linspace(-1, 1, 4096, dtype=torch.float32))
        before = torch.get_default_dtype()
        torch.set_default_dtype(default)
        try:
            options = {"momentum": 0.9} if kind is SGD8bit else {}
            trained(kind([p], lr=0.1, **options), [p])
        finally:
            torch.set_default_dtype(before)
        found.append(p.detach())
    assert torch.equal(*found)


PAIRS = {
    "the same": lambda x: (x, x),
    "views": lambda x: (x[:-256], x[256:]),
    "strided": lambda x: (x.view(-1, 2)[:, 0], x.view(-1, 2)[:, 0]),
    "others": lambda x: (x[:512], x[512:]),
}


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_that_overlap_are_updated_as_often_as_by_torch(
    form, pair, dtype
):
    found = []
    for kind, options in (
        (SGD8bit, {"min_8bit_size": 0}),
        (torch.optim.SGD, {}),
    ):
        x = torch.zeros(1024, dtype=dtype)
        params = [*map(Parameter, PAIRS[pair](x))]
        trained(kind(params, **SGD, **options), params)
        found.append(x)
    assert torch.equal(*found)


def test_threads_do_not_share_values(two_threads):
    x = torch.zeros(256 * 4097)
    y = x.clone()
    for kind, values in ((SGD8bit, x), (torch.optim.SGD, y)):
        params = [Parameter(values[:-256]), Parameter(values[256:])]
        trained(kind(params, **SGD), params)
    assert torch.equal(x, y)


@pytest.mark.parametrize("size", [1, 2])  # contiguous, and not
def test_a_gradient_with_a_negative_bit(form, size):
    found = []
    for kind, options in (
        (SGD8bit, {"min_8bit_size": 0}),
        (torch.optim.SGD, {}),
    ):
        p = Parameter(torch.zeros(size))
        optimizer = kind([p], **SGD, **options)
        for _ in range(STEPS):
            p.grad = torch.tensor(size * [1j]).conj().imag
            assert p.grad.is_neg()
            optimizer.step()
        found.append(p.detach())
    assert torch.equal(*found)


@pytest.mark.parametrize("kind", [SGD8bit, Adam8bit])
def test_a_step_in_inference_mode_is_a_step(form, kind):
    found = []
    for mode in (False, True):
        p = Parameter(torch.ones(4096))
        optimizer = kind([p], lr=0.1)
        for step in range(4):
            p.grad = torch.ones_like(p)
            with torch.inference_mode(mode and step == 1):
                optimizer.step()
        found.append(p.detach())
    assert torch.equal(*found)


def test_at_the_end_of_the_program_one_thread_does_all(
    two_threads, monkeypatch
):
    def submit(*args):
        raise RuntimeError("cannot schedule new futures")

    monkeypatch.setattr(ThreadPoolExecutor, "submit", submit)
    x = torch.zeros(256 * 1024)
    p = Parameter(x)
    trained(SGD8bit([p], **SGD), [p])
    assert x.eq(x[0]).all() and x[0] == -4.25


def test_a_gradient_of_another_shape_is_refused_before_any_update(form):
    params = [Parameter(torch.zeros(20, 30)) for _ in range(2)]
    optimizer = SGD8bit(params, **SGD, min_8bit_size=0)
    trained(optimizer, params)
    before = [p.detach().clone() for p in params]
    params[1].grad.data = torch.ones(1)
    with pytest.raises(
        RuntimeError, match=r"Parameter 1 .* group 0 .*\(20, 30\).*\(1,\)"
    ):
        optimizer.step()
    assert all(map(torch.equal, before, params))


@pytest.mark.parametrize(
    "kind, name",
    [
        (SGD8bit, "nesterov"),
        (SGD8bit, "maximize"),
        (Adam8bit, "amsgrad"),
        (AdamW8bit, "maximize"),
    ],
)
def test_text_is_no_switch(kind, name):
    options = {"momentum": 0.9} if kind is SGD8bit else {}
    with pytest.raises(TypeError, match=f"{name}='no' must be True or False"):
        kind([Parameter(torch.zeros(2))], lr=0.1, **options, **{name: "no"})
