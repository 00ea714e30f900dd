"""What all tools share: the argument parser, the exit on user errors, and ``--project`` (see projects/README.md)."""

import errno
import os
import sys
from argparse import SUPPRESS, Action, ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from scratch_det.errors import EXIT_CODE, UserError

UNUSABLE = {  # what is wrong with a path, and the fix
    **dict.fromkeys((errno.EACCES, errno.EPERM), "change its permissions"),
    **dict.fromkeys((errno.EEXIST, errno.ENOTDIR, errno.EISDIR), "move away what is there"),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "make room on its disk"),
    errno.EROFS: "make its disk writable",
    errno.ENAMETOOLONG: "shorten its name",
    errno.ELOOP: "fix its links, which form a circle",
}
UNREAD = "standard output was closed before the command had finished; start it again"


@contextmanager
def exit_on_user_error(prints: bool = True, unread: str = UNREAD, reading_only: bool = False) -> Iterator[None]:
    """Turn a UserError, or a file that may not be read or written, into ``error: message`` on stderr and exit code 2.

    prints: False in the ranks that leave the message to another one; only the exit code is set.
    unread: the message when standard output is closed early, as by ``| head``: work may be unfinished.
    reading_only: the block only prints what it found, so an output that is closed early is no error: exit code 0.
    """
    try:
        yield
        sys.stdout.flush()  # now, not when Python ends: a reader that is gone is noticed only here
        return
    except UserError as error:
        message = str(error)
    except BrokenPipeError:
        try:
            print(flush=True)  # any other pipe may be the broken one: that is an error of ours
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still to be flushed
        else:
            raise
        if reading_only:
            raise SystemExit(0) from None
        message = unread
    except OSError as error:
        if error.errno not in UNUSABLE or not error.filename:
            raise
        message = f"{error.filename}: {error.strerror}; {UNUSABLE[error.errno]}, or name another"
    if prints:
        print(f"error: {message}", file=sys.stderr)
    raise SystemExit(EXIT_CODE)


class ToolParser(ArgumentParser):
    """Prints the description, a tool's docstring, with its line breaks; rejects abbreviated flags."""

    def __init__(self, **keywords: Any):
        super().__init__(**keywords, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False)


GIVEN: list[str] = []  # the folders of --project, as they were given
LOADED: set[Path] = set()


def add_project_flag(parser: ArgumentParser) -> None:
    """``--project FOLDER``: loaded while the command line is parsed, so it is not among the parsed arguments."""
    what = "add the keys and models of this package: projects/NAME"
    parser.add_argument("--project", action=_Load, metavar="FOLDER", default=SUPPRESS, help=what)


def project_flags() -> list[str]:
    """The ``--project`` flags of this command line, for the runs that it starts."""
    return [word for folder in GIVEN for word in ("--project", folder)]


def load_project(folder: Path) -> None:
    """Import the package in ``folder`` and call its ``add()``. Raises UserError for a folder that is no project."""
    folder = folder.resolve()
    if not (folder / "__init__.py").is_file():
        raise UserError(
            f"--project {folder} is no folder with an __init__.py; give one such as projects/timm_backbones"
        )
    if not folder.name.isidentifier():
        raise UserError(f"--project {folder}: {folder.name} is no name for a Python package; rename the folder")
    if str(folder.parent) not in sys.path:
        sys.path.append(str(folder.parent))
    package = import_module(folder.name)
    if Path(str(package.__file__)).resolve().parent != folder:
        raise UserError(f"--project {folder}: {package.__file__} has the same name; rename the folder")
    if not hasattr(package, "add"):
        raise UserError(f"--project {folder}: {package.__file__} has no function add(), see projects/README.md")
    package.add()
    LOADED.add(folder)


def missing_project(recipe: Path) -> Path | None:
    """The folder of the project that a recipe belongs to, or None when it is loaded or there is none."""
    folders = (folder for folder in recipe.absolute().parents if (folder / "__init__.py").is_file())
    project = next(folders, None)
    return project if project and project.resolve() not in LOADED else None


class _Load(Action):
    def __call__(self, _parser: ArgumentParser, _args: Namespace, folder: Any, _flag: str | None = None) -> None:
        with exit_on_user_error():
            load_project(Path(folder))
        GIVEN.append(folder)
