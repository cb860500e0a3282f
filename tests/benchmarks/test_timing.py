"""How the benchmarks time steps.

Authors
 * The sb_memeff authors 2026
"""

import torch
from timing import median_seconds, seconds, training_step


class Clock:
    """Moves when it is told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def step(self, name, durations, order):
        """A step that takes one after the other of some durations."""
        left = iter(durations)

        def step():
            order.append(name)
            self.now += next(left)

        return step


def test_seconds_of_a_step():
    clock = Clock()
    clock.now = 5.0
    assert seconds(clock.step("a", [3.0], []), clock) == 3.0


def test_steps_take_turns_and_the_first_round_does_not_count():
    clock, order = Clock(), []
    steps = {
        "a": clock.step("a", [100, 1, 9, 2], order),
        "b": clock.step("b", [0, 4, 4, 5], order),
    }
    assert median_seconds(steps, 3, clock) == {"a": 2, "b": 4}
    assert order == ["a", "b"] * 4


def test_a_training_step_updates_and_leaves_no_gradient():
    net, x = torch.nn.Linear(2, 1), torch.ones(3, 2)
    before = net.weight.detach().clone()
    training_step(net, x)()
    assert torch.equal(net.weight, before)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    training_step(net, x, optimizer)()
    assert not torch.equal(net.weight, before)
    assert net.weight.grad is None


def test_forward_runs_under_autocast():
    seen = []

    class Net(torch.nn.Linear):
        def forward(self, x):
            y = super().forward(x)
            seen.append(y.dtype)
            return y

    net, x = Net(2, 1), torch.ones(3, 2)
    training_step(net, x)()
    training_step(
        net, x, autocast=lambda: torch.autocast("cpu", torch.bfloat16)
    )()
    assert seen == [torch.float32, torch.bfloat16]
