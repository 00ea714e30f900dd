"""docs/gpu.md and its tables."""

import json
from pathlib import Path

from conftest import ROOT
from gpu.report import BEGIN, END, NONE, with_tables

RESULT = {
    "card": "a card", "torch": "2.14.1", "cuda": "13.0", "python": "3.11.7", "cores": 16, "date": "2026-11-30",
    "checks": [
        {"check": "iteration[GN, TF32]", "outcome": "passed", "seconds": 12.3, "ms": 101.5, "GiB": 3.25},
        {"check": "float16", "outcome": "failed", "seconds": 1.0, "message": "no scale"},
    ],
}  # fmt: skip


def test_the_page_is_up_to_date() -> None:
    page = (ROOT / "docs/gpu.md").read_text()
    assert with_tables(page, ROOT / "results/gpu") == page


def test_a_table_for_each_card(tmp_path: Path) -> None:
    page = f"before\n{BEGIN}old\n{END}\nafter\n"
    assert with_tables(page, tmp_path) == f"before\n{BEGIN}{NONE}{END}\nafter\n"
    (tmp_path / "a_card.json").write_text(json.dumps(RESULT))
    filled = with_tables(page, tmp_path)
    assert with_tables(filled, tmp_path) == filled
    assert "### a card\n\n2026-11-30, torch 2.14.1, CUDA 13.0, 16 CPU cores\n\n" in filled
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in filled.splitlines() if line.startswith("|")]
    assert lines[0] == ["check", "outcome", "seconds", "figures"]
    assert lines[2:] == [
        ["iteration[GN, TF32]", "passed", "12.3", "ms 101.5; GiB 3.25"],
        ["float16", "failed", "1", "message no scale"],
    ]
