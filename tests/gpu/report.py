"""The tables of docs/gpu.md, from the files in results/gpu/."""

import json
import re
from pathlib import Path
from typing import Any

from scratch_det.tables import markdown

BEGIN, END = "<!-- gpu checks -->\n", "<!-- end of gpu checks -->"
NONE = "None so far: these checks have not run on a GPU.\n"
COMMON = ("check", "outcome", "seconds")  # of every line


def tables(folder: Path) -> str:
    """A heading and a table for each card; NONE without any."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return "\n".join(table(one) for one in found) or NONE


def table(result: dict[str, Any]) -> str:
    """The machine, and a row for each check."""
    rows = []
    for line in result["checks"]:
        figures = "; ".join(f"{name} {value}" for name, value in line.items() if name not in COMMON)
        rows.append([line["check"].replace("_", " "), line["outcome"], f"{line['seconds']:g}", figures])
    machine = f"{result['date']}, torch {result['torch']}, CUDA {result['cuda']}, {result['cores']} CPU cores"
    aligned = markdown(["check", "outcome", "seconds", "figures"], rows, ["left", "left", "right", "left"])
    return f"### {result['card']}\n\n{machine}\n\n{aligned}\n"


def with_tables(page: str, folder: Path) -> str:
    """``page`` with the tables of ``folder`` between its two marks."""
    return re.sub(f"(?<={BEGIN}).*(?={END})", lambda _: tables(folder), page, flags=re.DOTALL)


def write_page(root: Path) -> None:
    """Bring docs/gpu.md up to date."""
    page = root / "docs/gpu.md"
    page.write_text(with_tables(page.read_text(), root / "results/gpu"))
