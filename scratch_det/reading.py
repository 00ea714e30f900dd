"""Reading YAML, JSON and JSON lines that a person wrote or a crash has damaged: plain values, of the expected types."""

import json
import math
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import yaml

from scratch_det.errors import ConfigError, DataError
from scratch_det.log import logger

MOST_BYTES = 2**20  # of a YAML file; the largest here has 12,000
MOST_NODES = 100_000  # keys and values in it, those that aliases repeat included
DEEPEST = 40  # lists and sections in each other
STRING, TIMESTAMP, MERGE = (f"tag:yaml.org,2002:{name}" for name in ("str", "timestamp", "merge"))
RESTORE = "restore it from a copy"


def regular(path: Path) -> Path:
    """``path``. Raises DataError for a folder, pipe or device, whose end may never come, OSError where nothing is."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise DataError(f"{path} is a folder, a pipe or a device, expected a file; move it away, or name another")
    return path


class PlainLoader(yaml.composer.Composer, getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """PyYAML's safe loader, for plain values: no tags, a date is a text, and so is a key, which occurs once.

    Aliases may not refer to what they are in, and what they repeat counts. The events come from libyaml where PyYAML
    has it, ten times as fast.
    """

    yaml_implicit_resolvers: ClassVar = {
        letter: [pair for pair in pairs if pair[0] != TIMESTAMP]
        for letter, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, content: bytes):
        super(yaml.composer.Composer, self).__init__(content)
        yaml.composer.Composer.__init__(self)
        self.depth = self.count = 0
        self.sizes: dict[yaml.Node, int] = {}  # nodes in a node that is complete

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        event, before = self.peek_event(), self.count
        self.depth += 1
        if getattr(event, "tag", None) not in (None, "!"):
            self.reject(event, f"the tag {event.tag} is not allowed: plain values only, no Python objects")
        if self.depth > DEEPEST:
            self.reject(event, f"more than {DEEPEST} lists and sections in each other")
        node = super().compose_node(parent, index)
        if isinstance(event, yaml.AliasEvent) and node not in self.sizes:
            self.reject(event, f"*{event.anchor} refers to what it is in")
        self.count += self.sizes.get(node, 1)
        if self.count > MOST_NODES:
            self.reject(event, f"more than {MOST_NODES:,} values, those that aliases repeat included")
        self.sizes.setdefault(node, self.count - before)
        self.depth -= 1
        return node

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node, lines = super().compose_mapping_node(anchor), dict[str, int]()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                self.reject(key, "a key is a list or a section, expected a word")
            if key.value in lines:
                self.reject(key, f"{key.value} is already in line {lines[key.value]} of this file: merge the two")
            lines[key.value] = key.start_mark.line + 1
            key.tag = MERGE if key.tag == MERGE else STRING
        return node

    @staticmethod
    def reject(at: yaml.Event | yaml.Node, problem: str) -> None:
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=at.start_mark)


@contextmanager
def yaml_loader(path: Path) -> Iterator[PlainLoader]:
    """To read a file in the block. Raises ConfigError, with file and line, for anything but a YAML of plain values."""
    try:
        if (found := regular(path).stat().st_size) > MOST_BYTES:
            raise ValueError(f"it has {found:,} bytes, more than {MOST_BYTES:,}")
        yield PlainLoader(path.read_bytes())
    except (yaml.YAMLError, ValueError) as error:  # ValueError: of a number with thousands of digits
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        is_ours = type(error) is yaml.MarkedYAMLError  # see ``PlainLoader.reject``
        raise ConfigError(f"{where}: {'' if is_ours else 'not valid YAML: '}{problem}") from None


def read_yaml(path: Path) -> Any:
    """The content of a YAML file, None of an empty one. Raises as ``yaml_loader``."""
    with yaml_loader(path) as loader:
        return loader.get_single_data()


def read_json(path: Path, schema: Any = dict[str, Any], fix: str = RESTORE) -> dict[str, Any]:
    """The object in a json file, with its further keys; an empty one where there is no file.

    schema: a msgspec.Struct, whose keys and types it has to have. Raises DataError that says at which key it has not.
    """
    try:
        content = b"{}"
        with suppress(FileNotFoundError, NotADirectoryError):
            content = regular(path).read_bytes()
        found = msgspec.json.decode(content)
        msgspec.convert(found, schema)
    except (OSError, ValueError, RecursionError) as error:
        reason = f"cannot be read ({error.strerror})" if isinstance(error, OSError) else f"is damaged: {error}"
        raise DataError(f"{path} {reason}; {fix}") from None
    return found


def read_lines(path: Path, most: int | None = None) -> Iterator[dict[str, Any]]:
    """The lines of a metrics.json, those in its last ``most`` bytes; empty when there is no file.

    Each is an object with an iteration. Others are left out: with a warning, unless a kill has cut off the last one.
    """
    if not path.exists():
        return
    with open(regular(path), "rb") as file:
        if most is not None:
            file.seek(max(0, path.stat().st_size - most))
        lines, damaged = file.read().decode(errors="replace").splitlines(), 0
    for line in lines:
        row = None
        with suppress(ValueError, RecursionError):
            row = json.loads(line)
        if isinstance(row, dict) and type(row.get("iteration")) is int:
            yield row
        else:
            damaged += line not in (lines[-1], lines[0] if most else "")
    if damaged:
        logger.warning(f"{path}: {damaged} damaged lines are left out")


def read_series(path: Path, last: int) -> dict[str, list[tuple[int, float]]]:
    """The numbers in the metrics.json of a run of ``last`` iterations by key: (completed iterations, value), in order.

    A line holds the 0-based iteration after which it was written, that of the last evaluation the number of iterations.
    After a resume an iteration may occur twice: the last one counts. Null, nan and text are left out.
    """
    values: dict[str, dict[int, float]] = {}
    for row in read_lines(path):
        for key, value in row.items():
            if isinstance(value, int | float) and math.isfinite(value):
                values.setdefault(key, {})[min(row["iteration"] + 1, last)] = value
    return {key: sorted(points.items()) for key, points in values.items()}
