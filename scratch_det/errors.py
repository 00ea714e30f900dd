"""User errors: one message, exit code 2, no partial output; and checks that raise the first error or collect all."""

import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Literal, TypeVar

Result = TypeVar("Result")

EXIT_CODE = 2
EXIT_UNEXPECTED = 70  # sysexits.h's EX_SOFTWARE: a bug, or a damaged file that no check knows
MOST_LINES, FIRST_LINES = 12, 10  # of a message; the first ones where it has more
LONGEST_LINE = 1000  # characters


class UserError(Exception):
    """What was found, what was expected, where, and the fix; ``args[0]`` is the message in full length."""

    def __str__(self) -> str:
        lines = [shortened(line) for line in super().__str__().split("\n")]
        if len(lines) > MOST_LINES:
            lines[FIRST_LINES:] = [f"and {len(lines) - FIRST_LINES} more"]
        return "\n".join(lines)


class ConfigError(UserError):
    """A recipe or an override that cannot be trained as written."""


class DataError(UserError):
    """A data set, json entry or image that is not what it claims to be."""


def raise_problems(problems: Iterable[str]) -> None:
    """Raise one ConfigError with a line for each of ``problems``, where there are any."""
    if lines := list(problems):
        raise ConfigError("\n".join(lines))


Severity = Literal["error", "notice"]  # an error stops the training; a notice is a likely mistake


@dataclass
class Section:
    """One part of the checks: facts (``lines`` for people, ``values`` for programs) and problems (severity, message).

    strict: the first error is raised; otherwise it becomes a problem and the checks go on.
    """

    name: str = ""
    strict: bool = False
    lines: list[str] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)
    problems: list[tuple[Severity, str]] = field(default_factory=list)

    def add(self, line: str, **values: Any) -> None:
        """Add a fact."""
        self.lines.append(line)
        self.values.update(values)

    def problem(self, severity: Severity, message: str) -> None:
        """Add a problem, unless the section has it already."""
        message = "\n".join(map(shortened, message.split("\n")))
        if (severity, message) not in self.problems:
            self.problems.append((severity, message))

    def attempt(self, action: Callable[..., Result], *arguments: Any) -> Result | None:
        """``action(*arguments)``. Its UserError is raised (strict), or recorded, and the result is None.

        Each line of the message that is not indented becomes a separate problem.
        """
        try:
            return action(*arguments)
        except (UserError, OSError) as error:
            if self.strict:
                raise
            text = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else error.args[0]
            for message in re.split(r"\n(?!\s)", text):
                self.problem("error", message)
        return None


@dataclass
class Report:
    """The sections of the checks in order; ``say`` receives each section when it is complete."""

    strict: bool = True
    say: Callable[[Section], object] = lambda section: None
    sections: list[Section] = field(default_factory=list)

    @contextmanager
    def section(self, name: str) -> Iterator[Section]:
        """A new section, complete at the end of the block."""
        self.sections.append(section := Section(name, self.strict))
        try:
            yield section
        finally:
            self.say(section)

    @property
    def ok(self) -> bool:
        """Whether a run would start: there are no errors so far."""
        return not self.messages("error")

    def messages(self, severity: Severity) -> list[str]:
        """The problems of this kind in all sections."""
        return [message for section in self.sections for found, message in section.problems if found == severity]


def listed(items: Sequence[object], most: int = 5, separator: str = ", ") -> str:
    """The first items, and ``...`` where there are more."""
    return separator.join([*map(str, items[:most]), *["..."] * (len(items) > most)])


def shortened(text: str, most: int = LONGEST_LINE) -> str:
    """``text`` of at most ``most`` characters, else its beginning and, as the fix is there, its end."""
    return f"{text[: most * 3 // 4]} ... {text[-most // 4 :]}" if len(text) > most else text


def counted(number: int, nouns: str) -> str:
    """``2 classes``, ``1 class``."""
    return f"{number:,} {nouns}" if number != 1 else f"1 {nouns.removesuffix('es' if nouns.endswith('sses') else 's')}"


def quoted(text: object) -> str:
    """``text`` as one word of a shell's command."""
    word = str(text)
    return f'"{word}"' if shlex.quote(word) != word and not re.search(r'["$`\\!]', word) else shlex.quote(word)


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """``; did you mean 'X'?`` for the closest known word, or an empty string when nothing is close."""
    close = get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""
