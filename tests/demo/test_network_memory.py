"""The demo's tables of networks and optimizers.

Authors
 * The sb_memeff authors 2026
"""

from network_memory import list_networks, print_states, print_table


def row(network, peak_bytes, step_s, depth=34):
    """A row as compare returns it."""
    return {
        "network": network,
        "depth": depth,
        "base_channels": 8,
        "shape": [32, 200, 80],
        "parameters": 660_000,
        "saved_bytes": peak_bytes // 2,
        "peak_bytes": peak_bytes,
        "step_s": step_s,
    }


def test_networks_are_compared_with_the_first_of_their_size(capsys):
    print_table(
        [
            row("ResNet34", 600 * 2**20, 0.5),
            row("RevNet34 Type II", 150 * 2**20, 1.0),
            row("ResNet293", 60000 * 2**20, None, depth=293),
            row("RevNet293 Type II", 2000 * 2**20, None, depth=293),
        ]
    )
    _, title, head, *lines = capsys.readouterr().out.splitlines()
    assert title == "depth 34, width 8, batch 32 x 200 frames x 80 bands"
    assert "150 MiB  1/4.0    1.00" in lines[1]
    assert {len(line) for line in lines[:2]} == {len(head)}
    assert "depth 293" in lines[3] and lines[6].endswith("2000 MiB 1/30.0")


def test_states_are_compared_in_pairs(capsys):
    print_states(
        [
            {"optimizer": "SGD", "state_bytes": 60 * 2**20},
            {"optimizer": "SGD8bit", "state_bytes": 15 * 2**20},
        ]
    )
    line = capsys.readouterr().out.splitlines()[-1].split()
    assert line == "SGD 60.0 MiB SGD8bit 15.0 MiB 1/4.0".split()


def test_the_networks_of_a_depth_are_built():
    for name, build in list_networks(34, 2).items():
        assert name.startswith(("ResNet34", "RevNet34"))
        assert sum(p.numel() for p in build().parameters()) > 0
