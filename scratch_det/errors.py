"""User errors: one message, exit code 2, no partial output."""

import errno
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path

EXIT_CODE = 2
UNUSABLE = {  # what is wrong with a path, and the fix
    **dict.fromkeys((errno.EACCES, errno.EPERM), "change its permissions"),
    **dict.fromkeys((errno.EEXIST, errno.ENOTDIR, errno.EISDIR), "move away what is there"),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "make room on its disk"),
    errno.EROFS: "make its disk writable",
    errno.ENAMETOOLONG: "shorten its name",
    errno.ELOOP: "fix its links, which form a circle",
}


class UserError(Exception):
    """What was found, what was expected, where, and the fix."""


class ConfigError(UserError):
    """A recipe or an override that cannot be trained as written."""


class DataError(UserError):
    """A data set, json entry or image that is not what it claims to be."""


def refuse(problems: Iterable[str]) -> None:
    """Raise one ConfigError with a line for each of ``problems``, where there are any."""
    if lines := list(problems):
        raise ConfigError("\n".join(lines))


@contextmanager
def exit_on_user_error(prints: bool = True) -> Iterator[None]:
    """Turn a UserError, or a file that may not be read or written, into ``error: message`` on stderr and exit code 2.

    Without ``prints`` only the exit code is set: another process prints the same message.
    """
    try:
        yield
    except UserError as error:
        message = str(error)
    except OSError as error:
        if error.errno not in UNUSABLE or not error.filename:
            raise
        message = f"{error.filename}: {error.strerror}; {UNUSABLE[error.errno]}, or name another"
    else:
        return
    if prints:
        print(f"error: {message}", file=sys.stderr)
    raise SystemExit(EXIT_CODE)


def not_yaml(path: Path, error: Exception) -> str:
    """``file:line: not valid YAML: ...`` for PyYAML's error."""
    mark = getattr(error, "problem_mark", None)
    where = f"{path}:{mark.line + 1}" if mark else str(path)
    return f"{where}: not valid YAML: {getattr(error, 'problem', None) or str(error).splitlines()[0]}"


def listed(items: Sequence[object], most: int = 5, separator: str = ", ") -> str:
    """The first items, and ``...`` where there are more."""
    return separator.join([*map(str, items[:most]), *["..."] * (len(items) > most)])


def did_you_mean(word: str, known: list[str]) -> str:
    """``; did you mean 'X'?`` for the closest known word, or an empty string when nothing is close."""
    close = get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""
