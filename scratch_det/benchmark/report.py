"""Figures of a benchmark as a table, with the machine that they were measured on. Needs no torch."""

import math
import os
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import distributions
from pathlib import Path
from statistics import median

from scratch_det.backends import is_installed
from scratch_det.benchmark.measure import Cost
from scratch_det.distributed.launch import usable_cores
from scratch_det.tables import markdown

PACKAGES = ("torch", "torchvision", "numpy", "detectron2", "pycocotools", "hotcoco", "pillow")
HEADER = ("what", "unit", "beside", "peer", "ours", "times better", "")
ALIGN = ("left", "left", "left", "right", "right", "right", "left")
UNITS = {  # -> the field of Cost, and the factor
    "wall s": ("seconds", 1), "CPU s": ("cpu_seconds", 1), "peak MB": ("peak_mb", 1), "private MB": ("private_mb", 1),
    "wall ms": ("seconds", 1000), "CPU ms": ("cpu_seconds", 1000),
}  # fmt: skip
IN_S, IN_MS = ("wall s", "CPU s"), ("wall ms", "CPU ms")


@dataclass(frozen=True)
class Figure:
    """A line of the table; ``ours`` and ``theirs`` are the raw numbers, taken in turns where both are equally many.

    beside: what ``theirs`` are of, or why there are none.
    """

    what: str
    unit: str
    ours: Sequence[float]
    beside: str = ""
    theirs: Sequence[float] = field(default_factory=list)
    note: str = ""

    def times_better(self) -> float:
        """The median over the pairs of theirs / ours, or of ours / theirs if more is better."""
        pairs = zip(self.ours, self.theirs, strict=True) if self.theirs else ()
        return _median([ours / theirs if self.unit.endswith("/s") else theirs / ours for ours, theirs in pairs])

    def cells(self) -> list[str]:
        """By HEADER."""
        numbers = (_median(self.theirs), _median(self.ours), self.times_better())
        return [self.what, self.unit, self.beside, *map(number, numbers), self.note]

    def __str__(self) -> str:
        peer = f"; {self.beside}" + (f" {number(_median(self.theirs))}" if self.theirs else "")
        better = f"; {number(self.times_better())} times better" if self.theirs else ""
        return f"{self.what}: {number(_median(self.ours))} {self.unit}{peer if self.beside else ''}{better} {self.note}"

    def raw(self) -> str:
        """Every number, in the order in which it was measured."""
        peer, ours = (" ".join(map(number, found)) for found in (self.theirs, self.ours))
        return f"- {self.what}, {self.unit}: ours {ours}" + (f"; {self.beside} {peer}" if peer else "")


def figures(
    what: str, units: Sequence[str], costs: Sequence[Sequence[Cost]], beside: str = "", note: str = ""
) -> Iterator[Figure]:
    """A figure for each of ``units``, those of UNITS; costs: ours, and the peer's where there are any."""
    for unit in units:
        name, factor = UNITS[unit]
        ours, theirs = ([getattr(cost, name) * factor for cost in one] for one in (*costs, ())[:2])
        yield Figure(what, unit, ours, beside, theirs, note)


def beside(library: str, what: str = "") -> str:
    """The peer's name, or that it is missing."""
    return ", ".join(filter(None, (library, what))) if is_installed(library) else f"{library} is not installed"


def number(value: float) -> str:
    """Three digits or more; "-" for nan."""
    if math.isnan(value):
        return "-"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value) or 1)))}f}"


def machine() -> list[str]:
    """Lines on this machine and its libraries."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    cpu = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())
    versions = {name: next((one.version for one in distributions(name=name)), "not installed") for name in PACKAGES}
    return [
        f"- {time.strftime('%Y-%m-%d')}; {cpu}, {usable_cores()} cores, load {os.getloadavg()[0]:.2f} at the start",
        f"- Python {platform.python_version()}, " + ", ".join(f"{name} {one}" for name, one in versions.items()),
    ]


def document(command: str, about: Sequence[str], found: Sequence[Figure]) -> str:
    """The Markdown file: how it was made, the table of medians, raw numbers."""
    table = markdown(HEADER, [figure.cells() for figure in found], ALIGN)
    paragraphs = [
        "# Benchmarks",
        f"Written by `{command}`.",
        "\n".join(about),
        "Medians of the raw numbers below; the last number is the median over the pairs. Private memory is what a\n"
        "process adds after its imports; MB are 10^6 bytes.",
        table,
        "## Raw numbers",
        "\n".join(figure.raw() for figure in found if figure.ours),
    ]
    return "\n\n".join(paragraphs) + "\n"


def _median(values: Sequence[float]) -> float:
    return median(values) if values else math.nan
