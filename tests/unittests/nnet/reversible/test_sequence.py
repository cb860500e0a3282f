"""The contract of the reversible engine, point by point."""

import copy

import pytest
import torch
from torch import nn

from sb_memeff.nnet.reversible import (
    AdditiveCoupling,
    ReversibleSequence,
    SpaceToDepth,
    check_invertible,
)
from tests.unittests.nnet.reversible.chains import (
    assert_same_state,
    body,
    chain,
    gradients,
    images,
    mixed_chain,
    relative_error,
    stored,
)

# --- gradients ---------------------------------------------------------------


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("depth", [1, 4, 16, 50])
def test_float64_gradients_equal_autograd(depth, dims):
    net = chain(depth, dims=dims).double()
    x = images(dims, dtype=torch.float64)
    y, ours, state = gradients(net, x)
    y_ref, reference, state_ref = gradients(stored(net), x)
    assert torch.equal(y, y_ref)
    assert relative_error(ours, reference) < 1e-9
    assert torch.equal(state, state_ref)


def test_float64_gradients_with_other_blocks_in_the_chain():
    net = mixed_chain().double()
    x = images(channels=3, dtype=torch.float64)
    twin = stored(net)
    _, ours, _ = gradients(net, x)
    _, reference, _ = gradients(twin, x)
    assert relative_error(ours, reference) < 1e-9
    assert_same_state(net, twin)


def test_input_that_needs_no_gradient_still_gives_the_weights_theirs():
    net = chain(3, dropout=0.0)
    x = images()
    net(x).square().sum().backward()
    twin = stored(net)
    twin.zero_grad()
    twin(x).square().sum().backward()
    ours = [p.grad for p in net.parameters()]
    assert relative_error(ours, [p.grad for p in twin.parameters()]) < 1e-5


def test_frozen_weights_get_no_gradient_and_the_others_theirs():
    net = chain(4).double()
    for parameter in net.blocks[1].parameters():
        parameter.requires_grad_(False)
    net.blocks[2].g[0].bias.requires_grad_(False)
    x = images(dtype=torch.float64)
    _, ours, _ = gradients(net, x)
    _, reference, _ = gradients(stored(net), x)
    assert [g is None for g in ours] == [g is None for g in reference]
    assert relative_error(ours, reference) < 1e-9


def test_nothing_needs_a_gradient():
    net = chain(2).requires_grad_(False)
    assert not net(images()).requires_grad


def test_autograd_grad_on_chosen_inputs():
    net = chain(2, dropout=0.0).double()
    x = images(dtype=torch.float64)
    weight = net.blocks[0].f[0].weight
    (ours,) = torch.autograd.grad(net(x).square().sum(), [weight])
    twin = stored(net)
    (reference,) = torch.autograd.grad(
        twin(x).square().sum(), [twin.blocks[0].f[0].weight]
    )
    assert relative_error([ours], [reference]) < 1e-9
    assert all(p.grad is None for p in net.parameters())


def test_weights_shared_between_blocks_add_up():
    f, g = body(4), body(4)
    net = ReversibleSequence(
        [AdditiveCoupling(f, g), AdditiveCoupling(g, f)]
    ).double()
    x = images(dtype=torch.float64)
    _, ours, _ = gradients(net, x)
    _, reference, _ = gradients(stored(net), x)
    assert relative_error(ours, reference) < 1e-9


class Inside(nn.Module):
    """A module that holds a reversible sequence."""

    def __init__(self):
        super().__init__()
        self.net = chain(2)

    def forward(self, x):
        return self.net(x).relu()


@pytest.mark.parametrize("coupled", [True, False])
def test_a_sequence_inside_a_sequence(coupled):
    block = Inside()
    if coupled:
        block = AdditiveCoupling(Inside(), Inside())
    net = ReversibleSequence([block, block]).double()
    x = images(channels=16 if coupled else 8, dtype=torch.float64)
    twin = stored(net)
    _, ours, _ = gradients(net, x)
    _, reference, _ = gradients(twin, x)
    assert [g is None for g in ours] == [g is None for g in reference]
    assert relative_error(ours, reference) < 1e-9
    assert_same_state(net, twin)


def test_gradient_accumulation():
    net = chain(3).double()
    twin = stored(net)
    for seed in (1, 2, 3):
        x = images(dtype=torch.float64) * seed
        _, ours, _ = gradients(net, x, seed=seed)
        _, reference, _ = gradients(twin, x, seed=seed)
    assert relative_error(ours, reference) < 1e-9


def test_two_forwards_before_one_backward():
    net = chain(3, dropout=0.5).double()
    twin = stored(net)
    found = []
    for module in (net, twin):
        torch.manual_seed(3)
        x = images(dtype=torch.float64).requires_grad_()
        first, second = module(x), module(2 * x)
        (first * second).sum().backward()
        found.append([x.grad, *(p.grad for p in module.parameters())])
    assert relative_error(*found) < 1e-9
    assert_same_state(net, twin)


# --- state -------------------------------------------------------------------


def train(module, steps=3, **options):
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    for step in range(steps):
        optimizer.zero_grad()
        gradients(module, images(dtype=torch.float64), seed=step, **options)
        optimizer.step()


@pytest.mark.parametrize("momentum", [0.1, None])
def test_state_dict_after_training_steps(momentum):
    net = chain(3, momentum=momentum).double()
    twin = stored(net)
    train(net)
    train(twin)
    counts = [v for k, v in net.state_dict().items() if "num_batches" in k]
    assert all(count == 3 for count in counts)
    for (key, ours), reference in zip(
        net.state_dict().items(), twin.state_dict().values()
    ):
        torch.testing.assert_close(
            ours, reference, rtol=1e-12, atol=1e-14, msg=key
        )


def test_running_statistics_of_one_step_are_bit_equal():
    net = chain(4)
    twin = stored(net)
    gradients(net, images())
    gradients(twin, images())
    assert_same_state(net, twin)


def test_frozen_batch_norm():
    net = chain(3).double()
    for part in net.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.eval()
    before = {k: v for k, v in net.state_dict().items() if "running" in k}
    before = copy.deepcopy(before)
    twin = stored(net)
    x = images(dtype=torch.float64)
    _, ours, _ = gradients(net, x)
    _, reference, _ = gradients(twin, x)
    assert relative_error(ours, reference) < 1e-9
    for key, value in before.items():
        assert torch.equal(net.state_dict()[key], value), key


class CountingNorm(nn.BatchNorm2d):
    """A batch norm that another part of the program puts in later."""

    calls = 0

    def forward(self, x):
        type(self).calls += 1
        return super().forward(x)


def test_modules_converted_after_construction_are_the_ones_used():
    net = chain(2)
    for block in net.blocks:
        for half in (block.f, block.g):
            half[1] = CountingNorm(4)
    CountingNorm.calls = 0
    net(images()).sum().backward()
    assert CountingNorm.calls == 8  # 4 norms, forward and replay
    assert all(
        m.num_batches_tracked == 1
        for m in net.modules()
        if isinstance(m, CountingNorm)
    )


def test_sync_batch_norm_converted_after_construction():
    # Without a process group it computes like a batch norm, on the CPU too.
    net = nn.SyncBatchNorm.convert_sync_batchnorm(chain(2))
    assert isinstance(net.blocks[0].f[1], nn.SyncBatchNorm)
    twin = stored(net)
    _, ours, _ = gradients(net, images())
    _, reference, _ = gradients(twin, images())
    assert relative_error(ours, reference) < 1e-5
    assert_same_state(net, twin)
    assert net.blocks[0].f[1].num_batches_tracked == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_sync_batch_norm_on_cuda(tmp_path):
    torch.distributed.init_process_group(
        "nccl", init_method=f"file://{tmp_path}/s", rank=0, world_size=1
    )
    try:
        net = nn.SyncBatchNorm.convert_sync_batchnorm(chain(3)).cuda()
        twin = stored(net)
        gradients(net, images().cuda())
        gradients(twin, images().cuda())
        assert_same_state(net, twin)
    finally:
        torch.distributed.destroy_process_group()


def test_eval_and_no_grad_are_a_plain_forward():
    net = chain(3)
    twin = stored(net)
    x = images()
    with torch.no_grad():
        torch.manual_seed(0)
        y = net(x)
        torch.manual_seed(0)
        assert torch.equal(y, twin(x))
    assert y.grad_fn is None
    assert torch.equal(net.eval()(x), twin.eval()(x))


def test_save_memory_can_be_switched_at_any_time():
    net = chain(2, save_memory=False)
    assert "OutputNode" not in type(net(images()).grad_fn).__name__
    net.save_memory = True
    assert "OutputNode" in type(net(images()).grad_fn).__name__


# --- precision ---------------------------------------------------------------


def test_bf16_autocast_with_backward_outside():
    net = chain(4)
    y, ours, _ = gradients(net, images(), autocast=torch.bfloat16)
    twin = stored(net)
    y_ref, reference, _ = gradients(twin, images(), autocast=torch.bfloat16)
    assert y.dtype == torch.float32
    assert torch.equal(y, y_ref)
    assert relative_error(ours, reference) < 1e-6
    # The precision inside f was really bf16.
    full, _, _ = gradients(stored(net), images())
    assert relative_error([full], [y]) > 1e-4


def test_autocast_hands_no_weight_without_history_to_others():
    net = chain(1, dropout=0.0)
    x = images()
    with torch.autocast("cpu", torch.bfloat16):
        net(x)
        net.save_memory = False
        net(x).sum().backward()
    assert net.blocks[0].f[0].weight.grad is not None


def test_pure_bfloat16():
    net = chain(3).bfloat16()
    y, ours, _ = gradients(net, images().bfloat16())
    twin = stored(net)
    y_ref, reference, _ = gradients(twin, images().bfloat16())
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, y_ref)
    assert relative_error(ours, reference) < 1e-2


def test_exact_stream_at_50_blocks_with_bf16():
    net = chain(50, channels=16, dropout=0.0)
    x = torch.randn(4, 32, 12, 12)
    with torch.autocast("cpu", torch.bfloat16):
        exact = check_invertible(net, x)
        net.exact = False
        loose = check_invertible(net, x)
    print(exact, loose, sep="\n")
    assert exact.inversion_error == 0.0
    assert exact.gradient_error < 1e-6
    # Without the grid the same check fails: the test can fail.
    assert loose.inversion_error > 0
    assert loose.gradient_error > 1e-2


def test_exact_stream_in_float32():
    net = chain(50)
    assert check_invertible(net, images()).inversion_error == 0.0
    _, ours, _ = gradients(net, images())
    _, reference, _ = gradients(stored(net), images())
    assert relative_error(ours, reference) < 1e-5


def test_rounding_moves_the_output_by_no_more_than_half_a_grid_step():
    net = chain(1, dropout=0.0).eval()
    x = images()
    rounded = net(x)
    net.exact = False
    plain = net(x)
    # x1, x2 and f(x2) are each rounded once before y1.
    limit = 2 * 2.0**-13 * 1.01
    assert (rounded[:, :4] - plain[:, :4]).abs().max() < limit + 1e-4
    assert not torch.equal(rounded, plain)
    assert torch.equal(rounded * 4096, (rounded * 4096).round())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_fp16_with_grad_scaler_on_cuda():
    net = chain(8, channels=16).cuda()
    twin = stored(net)
    x = images(channels=32).cuda()
    for module in (net, twin):
        torch.manual_seed(0)
        torch.cuda.manual_seed(0)
        scaler = torch.amp.GradScaler("cuda")
        optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
        with torch.autocast("cuda", torch.float16):
            loss = module(x).square().mean()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
    ours = [p.grad for p in net.parameters()]
    assert relative_error(ours, [p.grad for p in twin.parameters()]) < 1e-3


# --- inverse -----------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 8, 8, 8), (2, 8, 7, 5), (1, 8, 1, 9)])
def test_inverse_with_down_sampling(shape):
    torch.manual_seed(0)
    net = ReversibleSequence(
        [
            AdditiveCoupling(body(4), body(4)),
            SpaceToDepth(2),
            AdditiveCoupling(body(16), body(16)),
            SpaceToDepth((2, 1)),
            AdditiveCoupling(body(32), body(32)),
        ]
    ).eval()
    x = torch.randn(shape)
    back = net.inverse(net(x), input_shape=shape)
    # x itself lies beside the grid.
    assert (back - x).abs().max() <= 2.0**-13
    again = net.inverse(net(back), input_shape=shape)
    assert torch.equal(again, back)


def test_inverse_counts_nothing_in_training_mode():
    net = chain(2, dropout=0.0)
    x = images()
    y = net(x)
    before = copy.deepcopy(net.state_dict())
    net.inverse(y)
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_inverse_errors():
    net = chain(2, dropout=0.5)
    y = net(images())
    with pytest.raises(RuntimeError, match=r"blocks\.1 drew random numbers"):
        net.inverse(y)
    with pytest.raises(ValueError, match=r"blocks\.0 \(Conv2d\)"):
        mixed_chain().inverse(y)
    down = ReversibleSequence([SpaceToDepth(2)])
    with pytest.raises(ValueError, match=r"\(1, 2, 9, 9\)"):
        down.inverse(torch.zeros(1, 8, 2, 2), input_shape=(1, 2, 9, 9))
    # No input has this output: a multiple of 8 channels would.
    with pytest.raises(ValueError, match="holds streams of"):
        down.inverse(torch.zeros(1, 6, 2, 2))


# --- errors ------------------------------------------------------------------


def test_bad_input():
    net = chain(1)
    with pytest.raises(ValueError, match=r"\(2, 7, 4, 4\).*even"):
        net(torch.zeros(2, 7, 4, 4))
    with pytest.raises(TypeError, match="int64"):
        net(torch.zeros(2, 8, 4, 4, dtype=torch.int64))
    with pytest.raises(TypeError, match="list"):
        net([1, 2])
    with pytest.raises(ValueError, match="no blocks"):
        ReversibleSequence([])
    with pytest.raises(ValueError, match="grid_bits"):
        chain(1, grid_bits=24)


@pytest.mark.parametrize("save_memory", [True, False])
def test_functions_that_do_not_fit(save_memory):
    def sequence(f):
        return ReversibleSequence(
            [AdditiveCoupling(f, nn.Identity())], save_memory=save_memory
        )

    with pytest.raises(ValueError, match=r"blocks\.0\.f changed the shape"):
        sequence(nn.Conv2d(4, 4, 3))(images())
    with pytest.raises(ValueError, match=r"blocks\.0\.f changed the shape"):
        sequence(nn.Conv2d(4, 1, 1))(images())  # would broadcast

    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    with pytest.raises(TypeError, match=r"blocks\.0\.f returned tuple"):
        sequence(Pair())(images())


def test_an_empty_batch():
    net = chain(2, dropout=0.0).eval()
    x = torch.randn(0, 8, 7, 6, requires_grad=True)
    net(x).sum().backward()
    assert x.grad.shape == x.shape
    assert all(not p.grad.any() for p in net.parameters())
