"""Keeps the states of an optimizer in 8 bits.

    python examples/eight_bit_optimizer.py

Authors
 * The sb_memeff authors 2026
"""

import torch
from torch import nn

from sb_memeff.optim import AdamW8bit, state_bytes


def main():
    """Trains the same network with torch's AdamW and with ours."""
    data = torch.randn(256, 128)
    target = data.roll(1, dims=1).tanh()
    found = {}
    for optimizer_class in (torch.optim.AdamW, AdamW8bit):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(128, 512), nn.ReLU(), nn.Linear(512, 128))
        optimizer = optimizer_class(net.parameters(), lr=2e-3)
        for _ in range(200):
            loss = (net(data) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        found[optimizer_class.__name__] = loss.item(), state_bytes(optimizer)
        print(
            f"{optimizer_class.__name__:9s} loss {loss.item():.1e}, "
            f"states {state_bytes(optimizer) / 1e6:.2f} MB"
        )
    return found


if __name__ == "__main__":
    main()
