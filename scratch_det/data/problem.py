"""A kind of problem in a data set: how often it occurs, where first, and what mends it."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, TypeVar

Severity = Literal["error", "notice"]  # cannot be trained on; can, but is rarely meant
NUM_SHOWN = 5
Item = TypeVar("Item")


@dataclass(frozen=True)
class Problem:
    """One kind of problem.

    Attributes:
        kind: what is wrong, in words that follow a number: "images without file_name".
        count: number of offenders; ``first`` holds the first five, each as its json id with an explanation.
        mend: the change that helps, or nothing where ``kind`` says enough.
    """

    severity: Severity
    kind: str
    count: int = 0
    first: tuple[str, ...] = ()
    mend: str = ""

    def __str__(self) -> str:
        if not self.first:
            return self.kind
        more = ", ..." if self.count > len(self.first) else ""
        return f"{self.count} {self.kind}: id {', '.join(self.first)}{more}"


def error(kind: str, offenders: Iterable[Any], mend: str = "") -> Iterator[Problem]:
    """An error when there are offenders, else nothing."""
    return _found("error", kind, iter(offenders), mend)


def notice(kind: str, offenders: Iterable[Any], mend: str = "") -> Iterator[Problem]:
    """A notice when there are offenders, else nothing."""
    return _found("notice", kind, iter(offenders), mend)


def explain(path: Any, problems: list[Problem], most_lines: int = 6) -> str:
    """``problems`` of the file ``path`` as a message of at most ``most_lines`` lines."""
    if len(problems) == 1:
        only = problems[0]
        return f"{path}: {only}" + (f"\n  {only.mend}" if only.mend else "")
    lines = [f"  {one}" + (f"; {one.mend}" if one.mend else "") for one in problems]
    if len(lines) >= most_lines:
        left = len(lines) - (most_lines - 2)
        lines[most_lines - 2 :] = [f"  and {left} more kinds, which tools/check.py lists"]
    return "\n".join([f"{path}: {len(problems)} kinds of problems", *lines])


def split(items: Iterable[Item], test: Callable[[Item], bool]) -> tuple[list[Item], list[Item]]:
    """Those that pass the test, and the others."""
    passed: list[Item] = []
    others: list[Item] = []
    for item in items:
        (passed if test(item) else others).append(item)
    return passed, others


def _found(severity: Severity, kind: str, offenders: Iterator[Any], mend: str) -> Iterator[Problem]:
    first = tuple(str(one) for one in islice(offenders, NUM_SHOWN))
    if first:
        yield Problem(severity, kind, len(first) + sum(1 for _ in offenders), first, mend)
