"""Tables in Markdown, and tables for a terminal.

Authors
 * The sb_memeff authors 2026
"""


def print_head(*names):
    """Prints the head of a Markdown table."""
    print_row(*names)
    print("|" + "---|" * len(names), flush=True)


def print_row(*cells):
    """Prints a row of a Markdown table, at once."""
    cells = [f" {cell} |" if cell else " |" for cell in map(str, cells)]
    print("|" + "".join(cells), flush=True)


def aligned(rows, left=1):
    """Lines of a table for a terminal.

    Arguments
    ---------
    rows : list
        Tuples of str of the same length, the head first.
    left : int
        This many columns are aligned at the left, the others at the right.

    Returns
    -------
    list of str
        The lines.
    """
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    ]
