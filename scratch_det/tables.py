"""Text and Markdown tables, and CSV."""

import csv
import io
import re
from collections.abc import Iterable, Sequence

from tabulate import tabulate

Rows = Sequence[Sequence[str]]
# What a spreadsheet would compute, were it the start of a cell; not numbers: -9.0 ± 1.4 (n = 2).
FORMULA = re.compile(r"[=@\t\r]|[-+](?![-+\d\s.,±()/%en=]*$)")


def aligned(rows: Rows, align: Sequence[str] | None = None) -> list[str]:
    """A line for each row, two spaces between columns; ``align`` as in ``markdown``."""
    text = tabulate(rows, tablefmt="plain", disable_numparse=True, colalign=align)
    return [line.rstrip() for line in text.splitlines()]


def markdown(header: Sequence[str], rows: Rows, align: Sequence[str] | None = None) -> str:
    """A Markdown table; ``align``: "left" or "right" for each column, all left by default."""
    return tabulate(rows, header, tablefmt="pipe", disable_numparse=True, colalign=align or ["left"] * len(header))


def as_csv(rows: Iterable[Sequence[object]]) -> str:
    """The text of a CSV file; a ' in front keeps a spreadsheet from running a cell as a formula, see ``from_csv``."""
    text = io.StringIO()
    cells = ([f"'{cell}" if FORMULA.match(str(cell)) else cell for cell in row] for row in rows)
    csv.writer(text, lineterminator="\n").writerows(cells)
    return text.getvalue()


def from_csv(cell: str) -> str:
    """A cell as it was before ``as_csv``."""
    return cell[1:] if cell[:1] == "'" and FORMULA.match(cell[1:]) else cell
