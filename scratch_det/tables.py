"""Rows of text in columns that line up, words to the left."""

from collections.abc import Sequence

Rows = Sequence[Sequence[str]]


def aligned(rows: Rows) -> list[str]:
    """A line for each row, two spaces between columns."""
    return ["  ".join(row).rstrip() for row in _padded(rows)]


def markdown(header: Sequence[str], rows: Rows) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in _padded([header, ["---"] * len(header), *rows]))


def _padded(rows: Rows) -> list[list[str]]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
