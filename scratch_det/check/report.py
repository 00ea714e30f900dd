"""What the check found, by section: told as it goes, or as json at the end."""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from scratch_det.data.problem import Severity
from scratch_det.errors import UserError

Result = TypeVar("Result")
WIDTH = 11  # columns that the longest name of a section and a gap take


@dataclass
class Section:
    """Facts as lines for people and as values for programs; problems as (severity, message)."""

    name: str
    lines: list[str] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)
    problems: list[tuple[Severity, str]] = field(default_factory=list)

    def add(self, line: str, **values: Any) -> None:
        """A fact."""
        self.lines.append(line)
        self.values.update(values)

    def problem(self, severity: Severity, message: str) -> None:
        """Something to mend, or to know; what was said before is not said again."""
        if (severity, message) not in self.problems:
            self.problems.append((severity, message))

    def attempt(self, action: Callable[..., Result], *arguments: Any) -> Result | None:
        """What ``action(*arguments)`` returns; None, and errors of this section, when it refuses.

        Each line of a refusal that is not indented is an error of its own.
        """
        try:
            return action(*arguments)
        except UserError as error:
            for message in re.split(r"\n(?!\s)", str(error)):
                self.problem("error", message)
        except OSError as error:
            self.problem("error", f"{error.filename}: {error.strerror}")
        return None

    def as_text(self) -> str:
        """The name, then a line for each fact and problem, errors before notices."""
        errors_first = sorted(self.problems, key=lambda problem: problem[0])
        lines = [*self.lines, *(f"{severity}: {message}" for severity, message in errors_first)]
        return self.name.ljust(WIDTH) + "\n".join(lines).replace("\n", "\n" + " " * WIDTH)


class Report:
    """Sections in their order; ``say`` receives each as text as soon as it is complete."""

    def __init__(self, say: Callable[[str], object]):
        self.sections: list[Section] = []
        self.say = say

    @contextmanager
    def section(self, name: str) -> Iterator[Section]:
        """A new section, complete at the end of the block."""
        section = Section(name)
        self.sections.append(section)
        yield section
        self.say(section.as_text())

    def count(self, severity: Severity) -> int:
        """How many problems of this kind there are in all sections."""
        return sum(found == severity for section in self.sections for found, _ in section.problems)

    @property
    def ok(self) -> bool:
        """Whether a run would start: there are no errors so far."""
        return not self.count("error")

    def verdict(self) -> str:
        """The last line."""
        counts = [(self.count("error"), "error"), (self.count("notice"), "notice")]
        named = " and ".join(f"{count} {noun}{'s' if count > 1 else ''}" for count, noun in counts if count)
        return f"{'ready to train' if self.ok else 'not ready to train'}: {named or 'nothing to mend'}"

    def as_json(self) -> str:
        """One object: ok, the sections with their facts, all problems."""
        content = {
            "ok": self.ok,
            "sections": [{"name": one.name, "lines": one.lines, "values": one.values} for one in self.sections],
            "problems": [
                {"severity": severity, "section": one.name, "message": message}
                for one in self.sections
                for severity, message in one.problems
            ],
        }
        return json.dumps(content, indent=2)
