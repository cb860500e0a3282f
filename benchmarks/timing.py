"""Times of steps that are compared.

Authors
 * The sb_memeff authors 2026
"""

import contextlib
import statistics
import time

import torch


def synchronize():
    """Waits for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(step, clock=time.perf_counter):
    """Seconds until a step is done, on the device too."""
    synchronize()
    started = clock()
    step()
    synchronize()
    return clock() - started


def median_seconds(steps, rounds, clock=time.perf_counter):
    """Times steps that take turns.

    So whatever else the machine does meets all of them.

    Arguments
    ---------
    steps : dict
        Name to a function without arguments.
    rounds : int
        How often each is timed; one more round before sets up kernels and
        memory.
    clock : callable
        Returns seconds.

    Returns
    -------
    dict
        Name to the median of its seconds.
    """
    times = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            times[name].append(seconds(step, clock))
    return {name: statistics.median(t[1:]) for name, t in times.items()}


def training_step(net, x, optimizer=None, autocast=contextlib.nullcontext):
    """A training step of a network.

    Arguments
    ---------
    net : torch.nn.Module
        The network.
    x : torch.Tensor
        Its input.
    optimizer : torch.optim.Optimizer
        Of its parameters; None leaves them as they are.
    autocast : callable
        Returns the context of forward.

    Returns
    -------
    callable
        The step, without arguments.
    """

    def step():
        with autocast():
            y = net(x)
        y.float().square().mean().backward()
        if optimizer:
            optimizer.step()
        net.zero_grad()

    return step
