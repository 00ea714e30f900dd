"""Tables as Markdown, CSV and LaTeX. Their text may come from run folders, so each escapes what its language reads."""

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

from scratch_det import tables

LATEX = {
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "[": "{[}", "]": "{]}"},
    **{"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "±": r"$\pm$", "†": r"$^{\dagger}$"},
}


@dataclass(frozen=True)
class Table:
    """A table as text.

    Attributes:
        name: of its file, without an ending.
        title: one line.
        header: a word for each column.
        rows: as many cells each.
        notes: sentences below it.
    """

    name: str
    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


def as_markdown(table: Table) -> str:
    """The title in bold, the table, a paragraph for each note."""
    header, *rows = [[_markdown(cell) for cell in row] for row in (table.header, *table.rows)]
    return (
        "\n\n".join([f"**{_markdown(table.title)}**", tables.markdown(header, rows), *map(_markdown, table.notes)])
        + "\n"
    )


def as_csv(table: Table) -> str:
    """Header and rows."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([table.header, *table.rows])
    return text.getvalue()


def as_latex(table: Table) -> str:
    """A table environment for the booktabs package."""
    lines = [
        r"\begin{table}",
        r"\centering",
        f"\\caption{{{_latex(table.title)}}}",
        f"\\begin{{tabular}}{{l{'c' * (len(table.header) - 1)}}}",
        r"\toprule",
        _latex_row(table.header),
        r"\midrule",
        *map(_latex_row, table.rows),
        r"\bottomrule",
        r"\end{tabular}",
        *(f"\n{{\\footnotesize {_latex(note)}\\par}}" for note in table.notes),
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


FORMATS = {"md": as_markdown, "csv": as_csv, "tex": as_latex}


def on_one_line(text: str) -> str:
    """Without line ends and without signs that steer a terminal."""
    return "".join(sign for sign in " ".join(text.split()) if sign.isprintable())


def _markdown(text: str) -> str:
    text = re.sub(r"([\\`*|~\[\]])", r"\\\1", on_one_line(text))
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _latex(text: str) -> str:
    escaped = "".join(LATEX.get(sign, sign) for sign in on_one_line(text))
    return escaped.replace("--", "-{}-")  # two hyphens, no dash


def _latex_row(cells: Sequence[str]) -> str:
    return " & ".join(map(_latex, cells)) + r" \\"
