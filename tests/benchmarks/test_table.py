"""Tables of benchmarks and demo.

Authors
 * The sb_memeff authors 2026
"""

from table import aligned, print_head, print_row


def test_markdown(capsys):
    print_head("network", "", "step")
    print_row("ResNet34", 34, "")
    assert capsys.readouterr().out.splitlines() == [
        "| network | | step |",
        "|---|---|---|",
        "| ResNet34 | 34 | |",
    ]


def test_columns_of_a_terminal():
    rows = [("network", "peak", ""), ("a", "1.5 GB", "1/1.0"), ("b", "2", "")]
    assert aligned(rows) == [
        "network    peak",
        "a        1.5 GB  1/1.0",
        "b             2",
    ]
    assert aligned([("a", "bcd", "e"), ("fg", "h", "ij")], left=2) == [
        "a   bcd   e",
        "fg  h    ij",
    ]
