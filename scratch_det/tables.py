"""Text and Markdown tables."""

from collections.abc import Sequence

from tabulate import tabulate

Rows = Sequence[Sequence[str]]


def aligned(rows: Rows, align: Sequence[str] | None = None) -> list[str]:
    """A line for each row, two spaces between columns; ``align`` as in ``markdown``."""
    text = tabulate(rows, tablefmt="plain", disable_numparse=True, colalign=align)
    return [line.rstrip() for line in text.splitlines()]


def markdown(header: Sequence[str], rows: Rows, align: Sequence[str] | None = None) -> str:
    """A Markdown table; ``align``: "left" or "right" for each column, all left by default."""
    return tabulate(rows, header, tablefmt="pipe", disable_numparse=True, colalign=align or ["left"] * len(header))
