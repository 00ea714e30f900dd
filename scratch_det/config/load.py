"""Load a recipe strictly: its chain of ``_BASE_`` files, then the overrides of the command line.

A recipe that loads here means the same to stock detectron2 (``get_cfg().merge_from_file``): bases in their order, then
the file itself, each value decoded and coerced by yacs's rules.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fvcore.common.config import CfgNode

from scratch_det.config.defaults import get_cfg
from scratch_det.config.keys import explain_unknown, flatten, set_key
from scratch_det.config.source import BASE_KEY, Entry, Source, base_path, read_source
from scratch_det.config.values import accept
from scratch_det.errors import ConfigError, refuse
from scratch_det.project import missing_project

COMMAND_LINE = "command line"


class LoadedConfig(NamedTuple):
    """A configuration and where its values come from.

    explicit: the dotted keys that a recipe or an override set, as opposed to defaults.
    overridden: those of them that the command line set.
    file_cfg: the configuration without the command line's overrides.
    """

    cfg: CfgNode
    explicit: frozenset[str]
    overridden: frozenset[str]
    file_cfg: CfgNode


def load_config(
    config_file: str | Path, overrides: Sequence[Any] = (), defaults: CfgNode | None = None
) -> LoadedConfig:
    """The defaults, changed by ``config_file`` and its bases, then by ``overrides`` (``KEY VALUE KEY VALUE ...``).

    defaults: all keys there are, by default ``get_cfg()``; a backend may know more. Raises one ConfigError that names
    every unknown key and every wrong type with file and line.
    """
    in_files = [entry for source in _chain(Path(config_file), COMMAND_LINE, ()) for entry in source.entries]
    in_command = _override_entries(overrides)
    cfg = defaults.clone() if defaults else get_cfg()
    known = flatten(cfg)
    problems = _apply(cfg, in_files, known)
    file_cfg = cfg.clone()
    problems += _apply(cfg, in_command, known)
    if problems and (project := missing_project(Path(config_file))):
        problems.append(f"{config_file} is a recipe of a project; give --project {project}")
    refuse(dict.fromkeys(problems))
    explicit, overridden = (frozenset(entry.key for entry in entries) for entries in (in_files, in_command))
    return LoadedConfig(cfg, explicit | overridden, overridden, file_cfg)


def _chain(path: Path, asked_by: str, ancestors: tuple[Path, ...]) -> Iterator[Source]:
    """The sources in merging order: all bases of a file before the file."""
    if path.resolve() in ancestors:
        raise ConfigError(f"{asked_by}: {BASE_KEY} {path} leads back to itself: remove it from one of the files")
    source = read_source(path, asked_by)
    for base in source.bases:
        yield from _chain(base_path(source, base), base.where, (*ancestors, path.resolve()))
    yield source


def _apply(cfg: CfgNode, entries: list[Entry], defaults: dict[str, Any]) -> list[str]:
    """Set what can be set; the problems of the others."""
    problems: list[str] = []
    for entry in entries:
        try:
            set_key(cfg, entry.key, _checked(entry, defaults))
        except ConfigError as problem:
            problems.append(str(problem))
    return problems


def _checked(entry: Entry, defaults: dict[str, Any]) -> Any:
    if entry.key not in defaults:
        raise ConfigError(f"{entry.where}: {explain_unknown(entry.key, list(defaults))}")
    return accept(entry.key, entry.value, defaults[entry.key], entry.where)


def _override_entries(overrides: Sequence[Any]) -> list[Entry]:
    for token in overrides:
        if isinstance(token, str) and token.startswith("--"):
            raise ConfigError(f"{COMMAND_LINE}: flag {token} must come before the first KEY VALUE pair")
    keys = [str(token) for token in overrides[::2]]
    for key in keys:
        if "=" in key:
            name, _, value = key.partition("=")
            raise ConfigError(f"{COMMAND_LINE}: '{key}' joins key and value: write {name} {value}")
    if len(overrides) % 2:
        raise ConfigError(
            f"{COMMAND_LINE}: '{keys[-1]}' has no value: overrides come in pairs, KEY VALUE KEY VALUE ..."
        )
    return [Entry(key, value, COMMAND_LINE) for key, value in zip(keys, overrides[1::2], strict=True)]
