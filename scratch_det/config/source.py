"""One YAML recipe as a list of dotted keys that remember their line, so that every complaint can name it."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from scratch_det.errors import ConfigError

BASE_KEY = "_BASE_"  # fvcore's word for the recipes a recipe is built on


class Entry(NamedTuple):
    """A dotted key, its value as PyYAML reads it, and ``file:line``."""

    key: str
    value: Any
    where: str


class Source(NamedTuple):
    """A parsed file: the recipes it is built on, in merging order, and its own entries."""

    path: Path
    bases: list[Entry]
    entries: list[Entry]


def read_source(path: Path, asked_by: str) -> Source:
    """Parse ``path``; ``asked_by`` says who named it, for the message when it is missing."""
    if not path.is_file():
        problem = "is a folder, not a recipe" if path.is_dir() else "does not exist"
        raise ConfigError(f"{asked_by}: {path} {problem}")
    loader = yaml.SafeLoader(b"")
    try:
        loader = yaml.SafeLoader(path.read_bytes())
        root = loader.get_single_node()
        if not isinstance(root, yaml.MappingNode):
            raise ConfigError(f"{path}: expected lines such as 'SOLVER:' and '  BASE_LR: 0.02', found no keys at all")
        found = list(_walk(loader, root, path, prefix=""))
    except yaml.YAMLError as error:
        raise ConfigError(_explain(path, error)) from None
    bases = [base for entry in found if entry.key == BASE_KEY for base in _bases(entry)]
    return Source(path, bases, [entry for entry in found if entry.key != BASE_KEY])


def base_path(source: Source, base: Entry) -> Path:
    """Where ``base`` lies: relative to the file that names it, ``~`` being the home folder, as in fvcore."""
    return Path(os.path.normpath(source.path.parent / os.path.expanduser(base.value)))


def _walk(loader: yaml.SafeLoader, node: yaml.MappingNode, path: Path, prefix: str) -> Iterator[Entry]:
    """Every leaf below ``node``; an empty section has none."""
    _refuse_duplicates(node, path, prefix)
    loader.flatten_mapping(node)  # resolves YAML's own "<<" merges
    for key_node, value_node in node.value:
        key = f"{prefix}{key_node.value}"
        if isinstance(value_node, yaml.MappingNode):
            yield from _walk(loader, value_node, path, f"{key}.")
        else:
            yield Entry(key, loader.construct_object(value_node, deep=True), f"{path}:{_line(key_node)}")


def _refuse_duplicates(node: yaml.MappingNode, path: Path, prefix: str) -> None:
    """PyYAML silently keeps the last of two equal keys; a recipe that says two things is a mistake."""
    first_line: dict[str, int] = {}
    for key_node, _ in node.value:
        name, line = str(key_node.value), _line(key_node)
        if name in first_line:
            raise ConfigError(
                f"{path}:{line}: {prefix}{name} is already in line {first_line[name]} of this file: merge the two"
            )
        first_line[name] = line


def _bases(entry: Entry) -> Iterator[Entry]:
    """``_BASE_`` is one file name or a list of them."""
    for name in entry.value if isinstance(entry.value, list) else [entry.value]:
        if not isinstance(name, str) or not name:
            raise ConfigError(f"{entry.where}: {BASE_KEY} is {name!r}, expected a file name or a list of file names")
        yield Entry(BASE_KEY, name, entry.where)


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1


def _explain(path: Path, error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f"{path}:{mark.line + 1}" if mark else str(path)
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    if isinstance(error, yaml.constructor.ConstructorError):
        return f"{where}: {problem}; a recipe holds plain values only, no Python objects"
    return f"{where}: not valid YAML: {problem}"
