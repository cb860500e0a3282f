"""The demo's table of losses.

Authors
 * The sb_memeff authors 2026
"""

import loss_memory


def test_memory_of_the_losses(monkeypatch, capsys):
    monkeypatch.setattr(loss_memory, "SHAPE", (2, 60, 40, 8, 200))
    rows = loss_memory.compare()
    loss_memory.print_comparison(rows)
    batched, samplewise, tiled = (row["extra_bytes"] for row in rows)
    # All logits are 4 MB in float32; a tile's are 1.6 MB, an utterance's 2.
    assert batched > 2 * 60 * 41 * 200 * 4
    assert tiled < samplewise < batched
    assert all(row["gradient_error"] < 1e-5 for row in rows)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[3:6]] == [
        "batched",
        "samplewise",
        "tiled",
    ]
    assert {len(line) for line in lines[2:6]} == {len(lines[2])}
