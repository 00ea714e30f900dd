"""The command line of a tool.

Projects: packages beside this one that add to it and that it does not know; see projects/README.md.
"""

import sys
from argparse import SUPPRESS, Action, ArgumentParser, Namespace, RawDescriptionHelpFormatter
from importlib import import_module
from pathlib import Path
from typing import Any

from scratch_det.errors import UserError, exit_on_user_error


class ToolParser(ArgumentParser):
    """Shows the description, a tool's docstring, as it is written; takes no abbreviated flags, nor do its commands."""

    def __init__(self, **keywords: Any):
        super().__init__(**keywords, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False)


GIVEN: list[str] = []  # the folders of --project, as they were written
LOADED: set[Path] = set()


def add_project_flag(parser: ArgumentParser) -> None:
    """``--project FOLDER``, which leaves no argument behind: what it adds is there when the others are looked at."""
    parser.add_argument(
        "--project",
        action=_Load,
        metavar="FOLDER",
        default=SUPPRESS,
        help="know its keys and models too: projects/NAME",
    )


def project_flags() -> list[str]:
    """The ``--project`` flags of this command line, for those of runs that it starts."""
    return [word for folder in GIVEN for word in ("--project", folder)]


def load_project(folder: Path) -> None:
    """Import the package in ``folder`` and let it add what it has. Raises UserError for a folder that is no project."""
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
    """The project that a recipe lies in, where that is not known yet."""
    folders = (folder for folder in recipe.absolute().parents if (folder / "__init__.py").is_file())
    project = next(folders, None)
    return project if project and project.resolve() not in LOADED else None


class _Load(Action):
    def __call__(self, _parser: ArgumentParser, _args: Namespace, folder: Any, _flag: str | None = None) -> None:
        with exit_on_user_error():
            load_project(Path(folder))
        GIVEN.append(folder)
